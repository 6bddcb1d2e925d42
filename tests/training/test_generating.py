"""Training of mask generators: targets, losses, runs, and MAFT upon what they find."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the proposals extra is not installed")
pytest.importorskip("scipy", reason="the proposals extra is not installed")

from tests.proposals.tiny_generators import OPTIONS, RESNET
from tests.tiny_clip import CONFIG as CLIP
from tests.training import tiny_run
from tests.training.test_distributed import run_two
from zs3fast.proposals import load_mask_proposer
from zs3fast.proposals.generator import ProposalGenerator, load_generator
from zs3fast.training import batch_size, checkpoints
from zs3fast.training.config import TrainConfig, changed_keys, from_dict, load_config
from zs3fast.training.generating import GeneratorStep, region_iou
from zs3fast.training.loop import train
from zs3fast.training.optimiser import freeze, make_optimizer, set_learning_rate
from zs3fast.utils.distributed import DistEnv

SEEN = (0, 2, 5)


def step(method: str = "maskformer", **options: Any) -> GeneratorStep:
    torch.manual_seed(0)
    model = ProposalGenerator(method=method, image_size=64, options={**OPTIONS[method], **options})
    return GeneratorStep(model, torch.zeros(6, 0), classes=SEEN, ignore_index=255)


def batch(images: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(6, (images, 4, 4), generator=generator)
    blocks[0] = torch.tensor([1, 3])[torch.randint(2, (4, 4), generator=generator)]  # nothing that is seen
    labels = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    labels[:, :3] = 255
    return {"images": torch.randn(images, 3, 64, 64, generator=generator), "labels": labels}


def test_targets_are_the_seen_classes_of_an_image() -> None:
    labels = torch.tensor([[[5, 0], [1, 255]], [[1, 1], [3, 255]]])
    first, second = step().masks(labels)
    assert first.tolist() == [[[0, 1], [0, 0]], [[1, 0], [0, 0]]]  # 0, then 5; 1 is not seen
    assert second.shape == (0, 2, 2)


@pytest.mark.parametrize("method", OPTIONS)
def test_the_loss_is_the_library_s_own(method: str) -> None:
    one = step(method).eval()
    given = batch()
    masks = one.masks(given["labels"])
    assert [len(some) for some in masks][0] == 0 and sum(map(len, masks)) > 4
    torch.manual_seed(7)
    terms = one(given)
    torch.manual_seed(7)
    labels = [torch.zeros(len(some), dtype=torch.int64) for some in masks]
    asked = {"mask_labels": masks, "class_labels": labels, "output_hidden_states": True}
    expected = one.model.network(pixel_values=given["images"], **asked).loss
    assert float(terms["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert set(terms) == {"loss", "loss_mask", "loss_dice", "loss_cross_entropy"}
    assert all(float(value.detach()) > 0 for value in terms.values())


def test_any_split_of_a_batch_has_the_same_loss() -> None:
    one = step().eval()
    given = batch()
    whole = one(given)
    average = one.count(given) / 2
    parts = [one({name: value[i : i + 2] for name, value in given.items()}, average) for i in (0, 2)]
    for name, value in whole.items():
        got = sum(float(part[name].detach()) for part in parts) / 2
        assert got == pytest.approx(float(value.detach()), rel=1e-5), name
    plain = sum(float(one({n: v[i : i + 2] for n, v in given.items()})["loss"].detach()) for i in (0, 2)) / 2
    assert plain != pytest.approx(float(whole["loss"].detach()), rel=1e-4)


@pytest.mark.parametrize("method", OPTIONS)
def test_images_without_seen_classes_teach_that_there_is_no_object(method: str) -> None:
    one = step(method)
    terms = one({name: value[:1] for name, value in batch().items()})
    terms["loss"].backward()
    assert float(terms["loss_mask"].detach()) == 0 < float(terms["loss_cross_entropy"].detach())
    gradients = [p.grad for p in one.model.parameters() if p.grad is not None]
    assert gradients and all(bool(torch.isfinite(g).all()) for g in gradients)


def test_more_regions_than_queries() -> None:
    """The library leaves some without a query; the split stays exact."""
    one = step(decoder_config={**OPTIONS["maskformer"]["decoder_config"], "num_queries": 2}).eval()
    given = batch()
    assert max(map(len, one.masks(given["labels"]))) > 2
    average = one.count(given) / 2
    parts = [one({name: value[i : i + 2] for name, value in given.items()}, average)["loss"] for i in (0, 2)]
    assert float(sum(parts).detach()) / 2 == pytest.approx(float(one(given)["loss"].detach()), rel=1e-5)


def test_the_backbone_has_a_rate_of_its_own() -> None:
    model = ProposalGenerator(method="maskformer", options={**OPTIONS["maskformer"], "backbone_config": RESNET})
    freeze(model)
    config = load_config("maft_proposals_coco171").optimizer
    optimizer = make_optimizer(model, config)
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    backbone = model.backbone()
    found = {name: rates[id(p)] for name, p in model.trainable().items()}
    assert {rate for name, rate in found.items() if name in backbone} == {0.05}
    assert {rate for name, rate in found.items() if name not in backbone} == {0.5} and len(found) == len(rates)


def test_best_iou_of_true_regions() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 255, 1, 1]])
    masks = torch.zeros(3, 2, 4, dtype=torch.bool)
    masks[0, :, :2] = True  # all of 0, and a pixel that does not count
    masks[1, 0, :3] = True  # two of 0, one of 1
    assert region_iou(masks, labels, 255) == {0: 1.0, 1: pytest.approx(1 / 6)}
    assert region_iou(masks[1:], labels, 255)[0] == pytest.approx(2 / 4)
    assert region_iou(masks, torch.full((2, 4), 255), 255) == {}


# Runs -----------------------------------------------------------------------------------------------------------------


def run(folder: Path, method: str = "maskformer", **changes: Any) -> TrainConfig:
    values = tiny_run.values(folder, method)
    values |= {"model": {"options": OPTIONS[method]}, "optimizer": {"lr": 3e-3}}
    del values["text"]
    values["data"]["crop_size"] = 64
    values["validation"] = {"every": 3, "metric": "iou", "limit": 2, "split": "val"}
    return from_dict({**values, **changes})


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", OPTIONS)
def test_a_run_learns_resumes_and_is_scored(method: str, tmp_path: Path) -> None:
    config = run(tmp_path, method, iterations=30, checkpoint={"every": 10, "keep": 2})
    config = replace(config, validation=replace(config.validation, every=15))
    result = train(config)
    found = losses(config.folder)
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    entries = [json.loads(line) for line in (config.folder / "validation.jsonl").read_text().splitlines()]
    names = {f"{kind}{group}" for kind in ("iou", "recall") for group in ("", "_seen", "_unseen")}
    assert [entry["iteration"] for entry in entries] == [15, 30] and set(entries[0]) == {"iteration", *names}
    assert all(0 <= value <= 100 for entry in entries for name, value in entry.items() if name in names)
    assert result.best is not None and result.best["value"] == max(entry["iou"] for entry in entries)
    assert load_generator(config.folder / "best.safetensors").image_size == 64
    kept = safetensors.torch.load_file(result.weights)
    checkpoints.checkpoint_path(config.folder, 30).unlink()
    train(config, resume=True)
    again = safetensors.torch.load_file(result.weights)
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    """Mask losses are means over the masks of all processes, however few one of them has."""
    one = run(tmp_path, iterations=4)
    two = run_two(one, tmp_path / "two")
    train(one)
    assert losses(two) == pytest.approx(losses(one.folder), rel=1e-4)
    first, second = (safetensors.torch.load_file(path / "weights.safetensors") for path in (one.folder, two))
    # A group norm of one channel a group takes the biases of norms 0..2 away again: their gradient is rounding alone,
    # which Adam makes steps of the learning rate's size of.
    cancelled = re.compile(r"encoder\.hidden_states_norms\.[012]\.bias$")
    compared = {name: value for name, value in first.items() if not cancelled.search(name)}
    assert len(compared) == len(first) - 3
    assert max(float((value - second[name]).abs().max()) for name, value in compared.items()) < 3e-4
    entries, others = (
        [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        for folder in (one.folder, two)
    )
    assert entries[0] == pytest.approx(others[0], abs=0.5)


def test_maft_trains_on_what_it_finds(tmp_path: Path) -> None:
    first = run(tmp_path, iterations=2, checkpoint={"every": 2, "export_at": [1]})
    train(first)
    start = first.folder / "weights_00000001.safetensors"
    then = replace(first, output=str(tmp_path / "then"), init_from=str(start), iterations=1)
    assert losses(train(then).folder)[0] == pytest.approx(losses(first.folder)[1], rel=0.2)  # it goes on from there
    file = str(first.folder / "weights.safetensors")
    values = tiny_run.values(tmp_path, "maft", output=str(tmp_path / "maft"), iterations=2)
    values |= {"model": {"clip": CLIP, "start_layer": 1, "image_size": 32}, "proposals": {"proposer": file}}
    result = train(from_dict(values))
    assert result.terms["loss_ma"] > 0
    values["data"]["crop_size"] = 48
    with pytest.raises(ValueError, match=r"data.crop_size: expected a multiple of 32 for .*, got 48"):
        train(from_dict({**values, "output": str(tmp_path / "other")}))

    from zs3fast import Segmenter, weights

    model, _ = weights.load(result.weights)
    segmenter = Segmenter(model, proposer=load_mask_proposer(file), text_embeddings=torch.eye(20, 32))
    photo = next((tmp_path / "VOC2012" / "JPEGImages").iterdir())
    assert segmenter(photo, model.class_names).labels.shape == (56, 56)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "transductive"}, "for transductive training, got maskformer"),
        ({"parallel": "fsdp"}, "expected ddp and false"),
        ({"text": {"embeddings": "text.npy"}}, "text: maskformer reads no class names"),
        ({"validation": {"every": 2}}, "validation.metric: expected one of iou, iou_seen"),
        ({"model": {"num_prompts": 2}}, "unknown key 'model.num_prompts'"),
        ({"init_from": "VOC2012/nothing.safetensors"}, "no file .*nothing.safetensors"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(run(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_memory_is_measured_for_generators_too(tmp_path: Path) -> None:
    """What `--find-batch-size` runs in a process of its own: the loop's steps on made-up images."""
    classes = batch_size.Classes([f"class {i}" for i in range(20)], list(range(15)), 255)
    alone = DistEnv(0, 1, torch.device("cpu"))
    assert len(list(batch_size._iterations(run(tmp_path), classes, 2, alone))) == 1 + batch_size.TIMED


def test_runs_of_earlier_versions_may_go_on() -> None:
    """Their configuration does not have the keys that came later: those were at their defaults."""
    now = load_config("zegclip_world").to_dict()
    before = {**now, "optimizer": {name: v for name, v in now["optimizer"].items() if name != "backbone_lr"}}
    assert changed_keys(before, now) == []
    now["optimizer"]["backbone_lr"] = 0.1
    assert changed_keys(before, now) == ["optimizer.backbone_lr: 1.0 -> 0.1"]
