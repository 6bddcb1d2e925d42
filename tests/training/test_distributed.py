"""Two processes compute what one computes; every way of spreading a model trains it."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.training import tiny_run
from zs3fast import weights
from zs3fast.training import checkpoints
from zs3fast.training.config import TrainConfig, load_config, save_config
from zs3fast.training.logs import RunLog
from zs3fast.training.loop import train
from zs3fast.training.optimiser import freeze
from zs3fast.training.setup import build_model, build_step, open_data, shares, text_embeddings, unused_parameters
from zs3fast.training.validation import validate
from zs3fast.utils.distributed import DistEnv


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_close(first: Path, second: Path) -> None:
    """Weights agree to rounding; AdamW turns rounding of tiny gradients into steps, so the bound is on the norm."""
    a, b = (safetensors.torch.load_file(path) for path in (first, second))
    for name in a:
        error = float((a[name] - b[name]).norm() / a[name].norm().clamp_min(1e-6))
        assert error < (1.0 if name.endswith("k.bias") else 2e-3), f"{name}: {error:.1e}"


def run_two(config: TrainConfig, folder: Path, resume: bool = False) -> Path:
    """Two processes with torchrun's environment, from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.tiny_run", "zs3fast.training.loop"])
    port = tiny_run.free_port()
    config = replace(config, output=str(folder))
    processes = [
        context.Process(target=tiny_run.train_as, args=(rank, 2, port, torch.get_num_threads(), config, resume))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_run.config(tmp_path_factory.mktemp("one"), "tagclip")
    return train(config).folder


@pytest.fixture(scope="module")
def two(one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save_config(replace(load_config(one / "config.yaml"), output=str(folder / "run")), folder / "config.yaml")
    done = tiny_run.run(2, str(folder / "config.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr  # of arguments that DDP no longer likes, of parameters it looks for in vain
    return folder / "run"


def test_two_processes_agree_with_one(one: Path, two: Path) -> None:
    """Dropout is on: a micro-batch draws the same masks in whichever process it runs."""
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert_close(one / "weights.safetensors", two / "weights.safetensors")


def test_going_on_in_another_number_of_processes(one: Path, two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    checkpoints.checkpoint_path(folder, 6).unlink()
    facts = checkpoints.read_checkpoint(checkpoints.checkpoint_path(folder, 4))[1]
    assert facts["world"] == 2
    config = replace(load_config(folder / "config.yaml"), output=str(folder))
    train(config, resume=True)
    assert losses(folder)[:4] == losses(two)[:4]
    assert losses(folder)[4:] == pytest.approx(losses(two)[4:], rel=1e-4)
    assert_close(folder / "weights.safetensors", two / "weights.safetensors")


def test_resume_with_two_processes_is_bit_exact(two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    checkpoints.checkpoint_path(folder, 6).unlink()
    run_two(load_config(folder / "config.yaml"), folder, resume=True)
    a, b = (safetensors.torch.load_file(path / "weights.safetensors") for path in (folder, two))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_batches_that_do_not_divide(one: Path) -> None:
    config = load_config(one / "config.yaml")
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 processes, got 4"):
        shares(config, 3)
    with pytest.raises(
        ValueError, match=r"micro_batch: expected a divisor of the 1 images a process has, got 2 \(batch_size 4 on 4"
    ):
        shares(config, 4)
    assert shares(config, 2).micro_batches == 1


@pytest.mark.parametrize("spare", [False, True])
def test_parameters_without_gradient_are_looked_for(spare: bool, tmp_path: Path) -> None:
    """DDP waits for the gradient of every parameter, unless it is told that some have none."""
    config = tiny_run.config(tmp_path, "clip_rc")
    dataset = open_data(config)
    model = build_model(config, dataset)
    if spare:
        model.spare = torch.nn.Parameter(torch.zeros(1))
    freeze(model)
    step = build_step(config, dataset, model, text_embeddings(config, dataset, model), torch.device("cpu"))
    assert unused_parameters(config, dataset, step) == (["spare"] if spare else [])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sharded_encoder(one: Path, tmp_path: Path) -> None:
    """FSDP2: the same losses, the scores of the whole model, and the same files in the end."""
    config = load_config(one / "config.yaml")
    shown = replace(config.validation, every=3, metric="miou", pictures=1)
    config = replace(config, parallel="fsdp", validation=shown)
    folder = run_two(config, tmp_path / "run")
    assert losses(folder) == pytest.approx(losses(one), rel=1e-3)
    assert_close(one / "weights.safetensors", folder / "weights.safetensors")
    entries = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [entry.pop("iteration") for entry in entries] == [3, 6]
    assert len(list((folder / "predictions").glob("*_v0.png"))) == 2 and (folder / "best.safetensors").is_file()
    model, _ = weights.load(folder / "weights.safetensors")
    alone, config = DistEnv(0, 1, torch.device("cpu")), replace(config, output=str(tmp_path / "alone"))
    log = RunLog(config.folder, alone, 0, 6, 4, False)
    text = text_embeddings(config, open_data(config), model)
    scores = validate(config, model, text, alone, log, 6)
    log.close()
    assert {name: entries[1][name] for name in scores} == pytest.approx(scores)
