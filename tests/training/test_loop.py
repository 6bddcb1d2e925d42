"""Whole runs in one process: what they leave behind, how they go on, what they refuse."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import typer
import yaml
from typer.testing import CliRunner

from tests.full_disk import files_up_to
from tests.training import tiny_run
from zs3fast import cli, weights
from zs3fast.encoders.clip_vit import resize_positions
from zs3fast.training import checkpoints, command, loop, setup
from zs3fast.training.config import GENERATORS, from_dict, list_configs, load_config, save_config
from zs3fast.training.loop import RunResult, train
from zs3fast.training.schedules import learning_rate
from zs3fast.utils.packed_clip import tiny_clip_state
from zs3fast.weights import CheckpointError

METHODS = ("zegclip", "tagclip", "clip_rc")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(first: Path, second: Path) -> bool:
    a, b = (safetensors.torch.load_file(path) for path in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Six iterations that nothing interrupted."""
    return train(tiny_run.config(tmp_path_factory.mktemp("reference")))


def test_a_run_leaves_everything_behind(reference: RunResult) -> None:
    folder = reference.folder
    assert load_config(folder / "config.yaml").iterations == 6
    names = [path.name for path in checkpoints.list_checkpoints(folder)]
    assert names == ["iteration_00000004.safetensors", "iteration_00000006.safetensors"]
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in entries] == list(range(6))
    assert all(entry["loss"] == pytest.approx(entry["loss_mask"] + entry["loss_dice"]) for entry in entries)
    assert not list(folder.rglob(".*.safetensors"))
    tensors, facts = checkpoints.read_checkpoint(checkpoints.list_checkpoints(folder)[-1])
    assert (facts["iteration"], facts["position"], facts["config"]["seed"]) == (6, 24, 3)
    stored = {name.removeprefix("weights.") for name in tensors if name.startswith("weights.")}
    model, _ = weights.load(reference.weights)
    assert stored == model.trainable().keys()  # nothing of the frozen weights, in weights or optimiser
    assert not any("resblocks" in name for name in tensors)
    assert model.class_names[0] == "aeroplane" and model.seen == list(range(15))


def test_frozen_weights_stay(reference: RunResult) -> None:
    config = load_config(reference.folder / "config.yaml")
    fresh = setup.build_model(config, setup.open_data(config)).state_dict()
    model, _ = weights.load(reference.weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name]) == (name not in model.trainable()), name


def test_resume_is_bit_exact(reference: RunResult, tmp_path: Path) -> None:
    """The folder as a kill right after iteration 5 would have left it: checkpoint 4, a log ahead of it, scraps."""
    folder = tmp_path / "run"
    shutil.copytree(reference.folder, folder)
    checkpoints.checkpoint_path(folder, 6).unlink()
    (folder / "weights.safetensors").unlink()
    (folder / "checkpoints/.iteration_00000006.abc.safetensors").write_bytes(b"half a file")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"iteration": 6, "lo')
    config = replace(load_config(folder / "config.yaml"), output=str(folder))
    result = train(config, resume=True)
    assert same_weights(result.weights, reference.weights)
    assert losses(folder) == losses(reference.folder)
    assert not list(folder.rglob(".*.safetensors"))


def test_killed_at_any_moment_resumes_to_the_same_weights(reference: RunResult, tmp_path: Path) -> None:
    """kill -9 wherever it hits, a reading worker on, then to the end."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    config = load_config(reference.folder / "config.yaml")
    config = replace(
        config,
        output=str(tmp_path / "run"),
        data=replace(config.data, workers=1),
        checkpoint=replace(config.checkpoint, every=1),
        log=replace(config.log, every=1),
    )
    save_config(config, tmp_path / "config.yaml")
    arguments = (str(tmp_path / "config.yaml"), "--resume")
    log = tmp_path / "run/log.jsonl"
    kills = 0
    for wanted in (2,):
        process = subprocess.Popen(
            tiny_run.command(1, *arguments),
            env=tiny_run.environment(),
            cwd=tiny_run.ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") >= wanted:
                time.sleep(rng.uniform(0, 0.05))
                break
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills, "the run ended before it could be killed"
    done = tiny_run.run(1, *arguments)
    assert done.returncode == 0, done.stderr
    assert same_weights(tmp_path / "run/weights.safetensors", reference.weights)
    assert losses(tmp_path / "run") == losses(reference.folder)


@pytest.mark.parametrize("method", METHODS)
def test_losses_fall(method: str, tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, method, iterations=40, checkpoint={"every": 40}, optimizer={"lr": 1e-2})
    train(config)
    found = losses(config.folder)
    assert np.mean(found[-5:]) < 0.8 * np.mean(found[:5])


def test_self_training_starts_from_inductive_weights(tmp_path: Path) -> None:
    """TagCLIP on VOC: the trusty token is dropped, as published."""
    first = tiny_run.config(tmp_path, "tagclip", iterations=2, checkpoint={"every": 2, "export_at": [1]})
    train(first)
    start = first.folder / "weights_00000001.safetensors"
    values = tiny_run.values(tmp_path, "tagclip", setting="transductive", iterations=2, output=str(tmp_path / "second"))
    values["model"] |= {"trusty_token": False, "trusty_weighting": "off"}
    with pytest.raises(ValueError, match="init_from: self-training starts from weights"):
        train(from_dict(values))
    result = train(from_dict({**values, "init_from": str(start)}))
    model, _ = weights.load(result.weights)
    assert model.seen_offset == 0 and model.trusty_token is None
    values["model"]["num_prompts"] = 3
    with pytest.raises(ValueError, match=r"(?s)init_from: .*prompt_embeddings \[1, 2, 48\], expected \[1, 3, 48\]"):
        train(from_dict({**values, "init_from": str(start), "output": str(tmp_path / "third")}))


def test_validation_keeps_the_best(tmp_path: Path) -> None:
    config = tiny_run.config(
        tmp_path,
        iterations=4,
        validation={"every": 2, "metric": "miou", "pictures": 1},
        log={"every": 2, "tensorboard": True},
    )
    result = train(config)
    entries = [json.loads(line) for line in (config.folder / "validation.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in entries] == [2, 4]
    best = max(entries, key=lambda entry: entry["miou"])
    assert result.best == {"metric": "miou", "value": best["miou"], "iteration": best["iteration"]}
    assert weights.load(config.folder / "best.safetensors")[0].method == "zegclip"
    assert len(list((config.folder / "predictions").glob("*_v0.png"))) == 2
    assert list((config.folder / "tensorboard").glob("events*"))
    without = replace(config, output=str(tmp_path / "without"), validation=replace(config.validation, every=0))
    assert same_weights(train(without).weights, result.weights)  # looking at a run does not change it


def test_the_best_of_another_metric_does_not_compare(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, iterations=2, validation={"every": 2, "metric": "pacc", "limit": 1})
    assert train(config).best["metric"] == "pacc"
    path = checkpoints.list_checkpoints(config.folder)[-1]
    tensors, facts = checkpoints.read_checkpoint(path)
    path.unlink()
    facts |= {"iteration": 1, "best": {**facts["best"], "value": 100.0, "iteration": 1}}
    checkpoints.write_checkpoint(config.folder, tensors, facts, keep=1)
    (config.folder / "best.safetensors").unlink()
    other = replace(config, validation=replace(config.validation, metric="miou"))
    best = train(other, resume=True).best
    assert (best["metric"], best["iteration"]) == ("miou", 2) and best["value"] < 100
    assert (config.folder / "best.safetensors").is_file()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_when_its_turn_comes(workers: int, tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    config = replace(config, data=replace(config.data, workers=workers))
    broken = Path(config.data.root) / "JPEGImages/t3.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"^image: \S+t3.jpg[^\n]*$"):
        train(config)


def test_recomputing_and_workers_change_nothing(reference: RunResult, tmp_path: Path) -> None:
    config = load_config(reference.folder / "config.yaml")
    config = replace(
        config, output=str(tmp_path / "run"), checkpoint_activations=True, data=replace(config.data, workers=2)
    )
    assert same_weights(train(config).weights, reference.weights)


def test_refusals_before_the_first_step(reference: RunResult, tmp_path: Path) -> None:
    config = load_config(reference.folder / "config.yaml")
    folder = tmp_path / "run"
    shutil.copytree(reference.folder, folder)
    config = replace(config, output=str(folder))
    newest = checkpoints.checkpoint_path(folder, 6)

    with pytest.raises(ValueError, match=r"output: .* holds a run with checkpoints up to iteration_00000006.*--resume"):
        train(config)
    changed = replace(config, optimizer=replace(config.optimizer, lr=1.0), batch_size=8)
    with pytest.raises(ValueError, match=r"another configuration: batch_size: 4 -> 8; optimizer.lr: 0.003 -> 1.0"):
        train(changed, resume=True)
    with pytest.raises(ValueError, match=r"iterations: expected at least 6, which .*_00000006.safetensors has, got 5"):
        train(replace(config, iterations=5), resume=True)
    other = tiny_run.text_file(tmp_path / "other.npy", width=32)
    np.save(other, -np.load(other))
    with pytest.raises(ValueError, match="frozen weights or text embeddings differ"):
        train(replace(config, text=replace(config.text, embeddings=str(other))), resume=True)

    listing = Path(config.data.root) / "ImageSets/Segmentation/train.txt"
    names = listing.read_text()
    listing.write_text(names + "v0\n")
    with pytest.raises(ValueError, match=r"trained on other data: voc20 train, 10 items, ids \w{8}; .* 11 items, ids"):
        train(config, resume=True)
    listing.write_text(names.replace("t0", "v0"))
    with pytest.raises(ValueError, match=r"trained on other data: voc20 train, 10 items, .* 10 items, ids"):
        train(config, resume=True)
    listing.write_text(names)

    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"iteration_00000006.*damaged.*delete it to go on from an earlier one"):
        train(config, resume=True)
    newest.write_bytes(whole[:-100] + bytes(byte ^ 1 for byte in whole[-100:]))
    with pytest.raises(CheckpointError, match="do not match their digest"):
        train(config, resume=True)
    shutil.copy(reference.weights, newest)
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        train(config, resume=True)
    newest.unlink()
    assert same_weights(train(config, resume=True).weights, reference.weights)  # from iteration 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 3}, "micro_batch: expected a divisor of the 4 images a process has, got 3"),
        ({"model": {"num_promts": 3}}, "unknown key 'model.num_promts'; did you mean num_prompts"),
        ({"data": {"root": None}}, "data.root: expected the folder of voc20"),
        ({"text": {"embeddings": None}}, "text.embeddings: expected a .npy file"),
        ({"validation": {"every": 1, "metric": "hioo"}}, "validation.metric: expected one of hiou"),
        ({"parallel": "fsdp"}, "parallel: fsdp shards over processes"),
    ],
)
def test_bad_configurations(changes: dict, message: str, tmp_path: Path) -> None:
    values = tiny_run.values(tmp_path)
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    with pytest.raises(ValueError, match=message):
        train(from_dict(values))
    assert not (tmp_path / "run/checkpoints").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    with checkpoints.run_lock(config.folder):
        for _ in range(2):  # a refusal leaves the lock where it is
            with pytest.raises(ValueError, match="another run is training in"):
                train(config)
        other = multiprocessing.get_context("fork").Process(target=holds_the_lock, args=(config.folder, None))
        other.start()
        other.join()
        assert other.exitcode == 1
    with checkpoints.run_lock(config.folder):
        pass


def holds_the_lock(folder: Path, ready: Connection | None) -> None:
    """What a run with a reading worker does: the lock, then a child that outlives it."""
    checkpoints._held.clear()  # of the process this one was forked from
    with checkpoints.run_lock(folder):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        ready.send(worker.pid)
        time.sleep(60)


def test_workers_that_outlive_a_killed_run_do_not_hold_its_folder(tmp_path: Path) -> None:
    ready, far = multiprocessing.Pipe()
    run = multiprocessing.get_context("fork").Process(target=holds_the_lock, args=(tmp_path, far))
    run.start()
    worker = ready.recv()
    with pytest.raises(ValueError, match="another run is training in"), checkpoints.run_lock(tmp_path):
        pass
    run.kill()
    run.join()
    os.kill(worker, 0)  # it is still there
    try:
        with checkpoints.run_lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, optimizer={"lr": 1e30}, schedule={"warmup_iterations": 0})
    with pytest.raises(RuntimeError, match=r"iteration \d: the loss is not finite"):
        train(config)


def test_the_weights_stay_those_before_a_bad_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One term of iteration 3 is infinite and the log looks after iteration 6."""
    config = tiny_run.config(
        tmp_path, iterations=6, checkpoint={"every": 100}, log={"every": 100, "tensorboard": False}
    )
    models: list[torch.nn.Module] = []
    plain = setup.build_step

    def watched(*arguments: object) -> torch.nn.Module:
        step = plain(*arguments)
        models.append(step.model)
        return step

    def infinite(*arguments: object) -> dict[str, torch.Tensor]:
        terms = gradients(*arguments)
        return {**terms, "loss_dice": terms["loss_dice"] * float("inf")} if arguments[-1][1] == 3 else terms

    gradients = loop.gradients
    monkeypatch.setattr(setup, "build_step", watched)
    monkeypatch.setattr(loop, "gradients", infinite)
    with pytest.raises(RuntimeError, match=r"^iteration 3: the loss is not finite \(loss_dice inf\)"):
        train(config)
    three = replace(config, output=str(tmp_path / "three"), checkpoint=replace(config.checkpoint, every=3))
    with pytest.raises(RuntimeError, match="iteration 3"):
        train(three)
    tensors, facts = checkpoints.read_checkpoint(checkpoints.checkpoint_path(three.folder, 3))
    assert facts["iteration"] == 3
    for name, parameter in models[0].trainable().items():
        assert torch.equal(parameter, tensors[f"weights.{name}"]), name


def test_a_checkpoint_s_header_is_digested(reference: RunResult, tmp_path: Path) -> None:
    """ "iteration": 6 edited to 3 went on from there, to other weights."""
    newest = checkpoints.checkpoint_path(reference.folder, 6).read_bytes()
    path = tmp_path / "iteration_00000006.safetensors"
    for old, new in ((b'\\"iteration\\": 6', b'\\"iteration\\": 3'), (b'\\"position\\": 24', b'\\"position\\": 42')):
        assert newest.count(old) == 1
        path.write_bytes(newest.replace(old, new))
        with pytest.raises(CheckpointError, match="its contents do not match their digest"):
            checkpoints.read_checkpoint(path)
    path.write_bytes(newest)
    assert checkpoints.read_checkpoint(path)[1]["iteration"] == 6


def test_a_run_can_be_extended(reference: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reference.folder, folder)
    result = train(replace(load_config(folder / "config.yaml"), output=str(folder), iterations=8), resume=True)
    assert result.iterations == 8 and losses(folder)[:6] == losses(reference.folder) and len(losses(folder)) == 8
    text = " ".join(capsys.readouterr().out.split())
    assert "of 6 iterations before: from here on the learning rate is that of a run of 8" in text
    assert "iteration 8/8: loss" in text and "eta 0:00:00" in text and "MiB" in text
    rates = [json.loads(line)["lr"] for line in (folder / "log.jsonl").read_text().splitlines()]
    schedule = load_config(folder / "config.yaml").schedule
    assert rates[6:] == [learning_rate(schedule, t, 8, 3e-3) for t in (6, 7)]


def test_a_missing_logger_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It used to end the run after all weights were loaded, and to leave a lock and a configuration behind."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = tiny_run.config(tmp_path, iterations=1, log={"every": 1, "tensorboard": True})
    with caplog.at_level(logging.WARNING, "zs3fast"):
        assert train(config).weights.is_file()
    told = [record.getMessage() for record in caplog.records if "tensorboard" in record.getMessage()]
    assert len(told) == 1 and "pip install 'zs3fast[train]'" in told[0]
    assert not (config.folder / ".lock").exists()


def test_a_refused_run_leaves_nothing_and_resume_says_where_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run.config(tmp_path, output=str(tmp_path / "some/where"), model={"num_promts": 1})
    with pytest.raises(ValueError, match="model.num_promts"):
        train(config, resume=True)
    assert "holds no checkpoint to resume: the run starts at its beginning" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "some").exists()
    (tmp_path / "kept").mkdir()  # not ours to delete
    with pytest.raises(ValueError, match="model.num_promts"):
        train(replace(config, output=str(tmp_path / "kept")))
    assert list((tmp_path / "kept").iterdir()) == []


def test_position_tables_follow_the_crop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = train(tiny_run.config(tmp_path, iterations=1)).weights
    values = tiny_run.values(tmp_path, init_from=str(first), output=str(tmp_path / "second"))
    values["data"] |= {"crop_size": 48}
    config = from_dict(values)
    with caplog.at_level(logging.WARNING, "zs3fast"):
        model = setup.build_model(config, setup.open_data(config))
    before = weights.load(first)[0].encoder.positional_embedding
    after = model.encoder.positional_embedding
    side = int((len(after) - 1) ** 0.5)
    assert len(after) > len(before) and torch.equal(after, resize_positions(before, (side, side)))
    assert f"encoder.positional_embedding resized from 2 x 2 to {side} x {side} patches" in caplog.text


@pytest.mark.parametrize("name", [name for name in list_configs() if name.endswith("_world")])
def test_settings_of_the_world_start_from_the_package_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_config(name)
    dataset = setup.open_data(config)
    if config.method in GENERATORS:
        pytest.importorskip("transformers", reason="the proposals extra is not installed")
    model = setup.build_model(config, dataset)
    if config.method in GENERATORS:
        assert setup.text_embeddings(config, dataset, model).shape == (64, 0)
        return
    state = tiny_clip_state()
    name = "conv1.weight"
    assert model.weights_loaded and torch.equal(model.encoder.state_dict()[name], state[f"visual.{name}"])
    rows = setup.text_embeddings(config, dataset, model)
    assert rows.shape == (64, 128)


def test_show_prints_every_key(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command.train)
    shown = CliRunner().invoke(app, ["tagclip_voc20_transductive", "--show", "--set", "data.crop_size=256"]).stdout
    values = yaml.safe_load(shown)
    model = values["model"]
    assert model["image_size"] == 256 and model["seen_offset"] == 0.0 and model["decoder_heads"] == 8
    assert model["trusty_token"] is False and model["prompt_depth"] is None and model["layout"] == "a_n_n"
    assert values["optimizer"]["betas"] == [0.9, 0.999]
    assert "# of the dataset unless set: model.num_classes, model.class_names, model.seen" in " ".join(shown.split())
    again = from_dict(values)
    assert setup.whole_config(again) == setup.whole_config(from_dict({**values, "model": again.model}))
    listed = CliRunner().invoke(app, []).stdout.splitlines()
    assert "tagclip_voc20_transductive  tagclip, voc20" in listed and max(map(len, listed)) <= 80
    assert len(listed) == 2 * len(list_configs())


def test_command_line(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command.train)
    save_config(tiny_run.config(tmp_path, iterations=2), tmp_path / "config.yaml")
    bad = CliRunner().invoke(app, [str(tmp_path / "config.yaml"), "--set", "optimizer.lrr=1"])
    assert bad.exit_code == 2 and "did you mean optimizer.lr" in bad.stderr
    good = CliRunner().invoke(app, [str(tmp_path / "config.yaml"), "-o", str(tmp_path / "there")])
    assert good.exit_code == 0 and "2 iterations done" in good.stdout, good.output
    assert weights.load(tmp_path / "there/weights.safetensors")[0].method == "zegclip"
    assert "clip_rc_voc20_inductive" in CliRunner().invoke(app, []).stdout
    shown = CliRunner().invoke(app, ["maft_voc20_inductive", "--show", "--data", "it's here"]).stdout
    assert from_dict(yaml.safe_load(shown)).data.root == "it's here"


@pytest.mark.parametrize(("size", "name"), [(100, "config.yaml"), (20_000, "iteration_00000002.safetensors")])
def test_a_full_disk_is_one_line(size: int, name: str, tmp_path: Path) -> None:
    save_config(tiny_run.config(tmp_path, iterations=2), tmp_path / "config.yaml")
    with files_up_to(size):
        done = CliRunner().invoke(cli.app, ["train", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "run")])
    last = done.stderr.strip().splitlines()[-1]
    assert done.exit_code == 1 and last.startswith("error ") and last.endswith(f"{name}: File too large")
    assert not list((tmp_path / "run").rglob(".*"))


def test_compiling_without_a_compiler_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.check_compiler(torch.device("cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="compile: torch.compile needs a compiler, 'no-such-compiler' is not on PATH"):
        train(tiny_run.config(tmp_path, compile=True))
    assert not checkpoints.list_checkpoints(tmp_path / "run")
