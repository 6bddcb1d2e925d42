"""CLIP pre-training on the world: what a run leaves behind, how it goes on, what its weights are good for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import typer
from typer.testing import CliRunner

from tools.world.contrastive import load_contrastive_config, train_clip
from tools.world.contrastive.__main__ import train_clip as command
from tools.world.contrastive.config import ContrastiveConfig, contrastive_from_dict, save_contrastive_config
from tools.world.contrastive.probe import normalised, portraits, zero_shot_probe
from tools.world.contrastive.run import METADATA_KEY, Collate, ContrastiveStep, build_clip, rate
from zs3fast.data.world import ALL_STUFF, ALL_THINGS, CLASS_NAMES, VERSION, CaptionSet, arrange, draw
from zs3fast.data.world.captions import caption
from zs3fast.text import TextEncoder
from zs3fast.training import checkpoints
from zs3fast.training.config import list_configs
from zs3fast.training.loop import RunResult
from zs3fast.utils.open_clip import create_open_clip
from zs3fast.weights.packing import pack_clip, unpack_clip

CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def config(folder: Path, **changes: Any) -> ContrastiveConfig:
    values = {
        "clip": CLIP,
        "iterations": 4,
        "batch_size": 8,
        "seed": 3,
        "device": "cpu",
        "probe_images": 0,
        "output": str(folder / "run"),
        "data": {"size": 32, "workers": 0},
        "optimizer": {"lr": 1e-3, "no_decay": "norms_and_biases", "clip_norm": 1.0},
        "schedule": {"kind": "cyclic_cosine", "warmup_iterations": 1},
        "checkpoint": {"every": 2},
        "log": {"every": 2, "tensorboard": False},
        **changes,
    }
    return contrastive_from_dict(values)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(first: Path, second: Path) -> bool:
    a, b = (safetensors.torch.load_file(path) for path in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Four iterations that nothing interrupted."""
    return train_clip(config(tmp_path_factory.mktemp("reference")))


@pytest.fixture(scope="module")
def world_clip() -> tuple[torch.nn.Module, open_clip.SimpleTokenizer]:
    """The package's own configuration, untrained."""
    return build_clip(load_contrastive_config())


# Configuration -------------------------------------------------------------------------------------------------------


def test_the_package_s_configuration(tmp_path, world_clip):
    loaded = load_contrastive_config("world_clip")
    save_contrastive_config(loaded, tmp_path / "again.yaml")
    assert load_contrastive_config(tmp_path / "again.yaml") == loaded
    assert "world_clip" not in list_configs()  # it is no setting of `zs3fast train`
    clip, _ = world_clip
    body = sum(p.numel() for name, p in clip.named_parameters() if name != "token_embedding.weight")
    assert 1e6 < body < 8e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 1}, "unknown key 'seeds'; did you mean seed"),
        ({"clip": {"embed_dim": 8}}, "clip: the configuration lacks vision_cfg, text_cfg"),
        ({"clip": {**CLIP, "hub": "x"}}, "clip: unknown hub"),
        ({"data": {"size": 64}}, "data.size: expected clip.vision_cfg.image_size, 32, got 64"),
        ({"batch_size": 1}, "batch_size: expected at least 2, got 1"),
        ({"precision": "fp16"}, "precision: expected one of fp32, bf16, got 'fp16'"),
    ],
)
def test_bad_configurations(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_no_such_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="config: no file 'word_clip'; those of the package: world_clip"):
        load_contrastive_config("word_clip")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected keys and values, got list"):
        load_contrastive_config(tmp_path / "list.yaml")


def test_the_learning_rate_rises_and_falls(tmp_path):
    made = config(tmp_path, iterations=100, schedule={"kind": "cyclic_cosine", "min_lr": 0.0, "warmup_iterations": 9})
    rates = [rate(made, t) for t in range(100)]
    assert rates[0] == pytest.approx(1e-4) and int(np.argmax(rates)) == 9
    assert rates[50] == pytest.approx(5e-4) and rates[-1] < 1e-6
    assert (np.diff(rates[9:]) < 0).all()


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_behind(reference):
    folder = reference.folder
    assert load_contrastive_config(folder / "config.yaml").seed == 3
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in entries] == [0, 1, 2, 3]
    assert all(0 <= entry["matched"] <= 1 and entry["loss"] > 0 for entry in entries)
    assert [p.name for p in checkpoints.list_checkpoints(folder)][-1] == "iteration_00000004.safetensors"
    assert not list(folder.rglob(".*.safetensors"))
    with safetensors.safe_open(reference.weights, framework="pt") as file:
        assert json.loads(file.metadata()[METADATA_KEY]) == {"clip": CLIP, "world": VERSION, "seed": 3}


def test_resume_is_bit_exact(reference, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reference.folder, folder)
    checkpoints.checkpoint_path(folder, 4).unlink()
    (folder / "weights.safetensors").unlink()
    again = replace(config(tmp_path), data=replace(config(tmp_path).data, workers=1))
    result = train_clip(again, resume=True)
    assert same_weights(result.weights, reference.weights)
    assert losses(folder) == losses(reference.folder)


def test_refusals_of_a_folder_in_use(reference, tmp_path):
    made = load_contrastive_config(reference.folder / "config.yaml")
    with pytest.raises(ValueError, match="output: .* holds a run with checkpoints"):
        train_clip(made)
    with pytest.raises(ValueError, match="another configuration: batch_size: 8 -> 16"):
        train_clip(replace(made, batch_size=16), resume=True)
    with checkpoints.run_lock(tmp_path / "run"), pytest.raises(ValueError, match="another run is training"):
        train_clip(config(tmp_path))


def test_losses_fall(tmp_path):
    clip = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "layers": 2, "width": 64}}
    values = {"iterations": 150, "batch_size": 16, "checkpoint": {"every": 150}, "optimizer": {"lr": 2e-3}}
    made = config(tmp_path, clip=clip, **values)
    train_clip(made)
    found = losses(made.folder)
    assert np.mean(found[-20:]) < 0.9 * np.log(16)  # what guessing costs


def test_bf16_computes_nearly_the_same(reference, tmp_path):
    result = train_clip(config(tmp_path, precision="bf16"))
    assert losses(result.folder) == pytest.approx(losses(reference.folder), rel=0.02)


def test_the_loss_is_clip_s():
    torch.manual_seed(0)
    step = ContrastiveStep(open_clip.CLIP(**CLIP))
    images, tokens = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8), torch.randint(1, 49000, (5, 32))
    terms = step(images, tokens)
    pictures = F.normalize(step.clip.visual(normalised(images)), dim=-1)
    logits = step.clip.logit_scale.exp() * pictures @ F.normalize(step.clip.encode_text(tokens), dim=-1).t()
    both = [-torch.log_softmax(logits, dim).diagonal().mean() for dim in (0, 1)]
    assert terms["loss"].item() == pytest.approx(sum(both).item() / 2, rel=1e-5)
    assert terms["matched"].item() == pytest.approx(sum(logits.argmax(1) == torch.arange(5)).item() / 5)
    mean = normalised(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))[0, :, 0, 0]
    assert mean.tolist() == pytest.approx([(1 - 0.48145466) / 0.26862954, 1.5878 / 0.7593, 2.1459], abs=0.02)


# Words ---------------------------------------------------------------------------------------------------------------


def test_every_caption_fits_and_every_token_is_trained(world_clip):
    clip, tokenizer = world_clip
    trained = clip.token_embedding.weight.detach().abs().amax(1) > 0
    pairs = CaptionSet(32)
    sentences = [pairs[p]["caption"] for p in range(400)] + [f"a photo of a {name}." for name in CLASS_NAMES]
    tokens = tokenizer(sentences)
    assert trained[tokens[tokens > 0]].all() and 40 < trained.sum() < 60
    Collate(tokenizer)([{"images": torch.zeros(3, 32, 32, dtype=torch.uint8), "caption": s} for s in sentences])

    longest = sorted(ALL_THINGS, key=lambda t: -len(tokenizer.encode(" ".join(t))))[:3]
    ground = sorted(ALL_STUFF, key=lambda t: -len(tokenizer.encode(" ".join(t))))[:2]
    scene = arrange(np.random.default_rng(0), (64, 64), longest, ground)
    _, parts = draw(scene)
    lengths = [len(tokenizer.encode(caption(scene, parts, np.random.default_rng(s)))) + 2 for s in range(200)]
    assert max(lengths) <= tokenizer.context_length


def test_a_caption_that_would_be_cut_is_an_error():
    tokenizer = open_clip.SimpleTokenizer(context_length=6)
    item = {"images": torch.zeros(3, 32, 32, dtype=torch.uint8), "caption": "a striped red triangle on yellow sand"}
    with pytest.raises(ValueError, match="context_length: expected at least 9, for 'a striped red .*, got 6"):
        Collate(tokenizer)([item])


# Weights -------------------------------------------------------------------------------------------------------------


def test_open_clip_loads_the_weights(reference):
    state = safetensors.torch.load_file(reference.weights)
    clip = open_clip.CLIP(**CLIP).eval()
    clip.load_state_dict(state)
    split = create_open_clip(CLIP, str(reference.weights)).eval()  # the way models and text towers take it
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(split.visual(images), clip.visual(images))
    encoder = TextEncoder.from_open_clip(CLIP, reference.weights, cache=False)
    tokens = open_clip.SimpleTokenizer(context_length=32)(["a photo of a striped red triangle"])
    expected = F.normalize(clip.encode_text(tokens), dim=-1)
    assert torch.allclose(encoder.encode(["striped red triangle"], "single"), expected, atol=1e-6)


def test_packed_weights_are_small_and_the_same(reference, tmp_path):
    state = safetensors.torch.load_file(reference.weights)
    packed = safetensors.torch.load_file(reference.folder / "packed.safetensors")
    unpacked = unpack_clip(packed)
    assert unpacked.keys() == state.keys()
    assert all(torch.equal(unpacked[name], state[name].half().float()) for name in state)
    assert unpack_clip(pack_clip(unpacked)).keys() == state.keys()
    assert all(torch.equal(t, unpacked[n]) for n, t in unpack_clip(pack_clip(unpacked)).items())
    sizes = [(reference.folder / f"{name}.safetensors").stat().st_size for name in ("packed", "weights")]
    assert sizes[0] < 0.05 * sizes[1]


def test_the_package_s_clip_leaves_room_for_the_methods(world_clip):
    clip, _ = world_clip
    size = sum(t.numel() * t.element_size() for t in pack_clip(clip.state_dict()).values())
    assert size < 9e6


# Probe ---------------------------------------------------------------------------------------------------------------


class _Constant(torch.nn.Module):
    """Answers the first class whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))

    def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
        return torch.linspace(1, 0, len(tokens))[:, None]

    def encode_image(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
        assert not self.training
        return torch.ones(len(images), 1)


def test_the_probe_counts():
    """A model that always names the first class is right by chance, in words too."""
    fake = _Constant().train()
    found = zero_shot_probe(fake, lambda sentences: torch.zeros(len(sentences), 4), size=32, number=1)
    assert found == {"things": 1 / 48, "stuff": 1 / 16, "pattern": 1 / 4, "colour": 1 / 6, "shape": 1 / 6}
    assert fake.training


def test_portraits_show_one_thing():
    pictures = portraits([("plain", "red", "circle"), ("blue", "water")], 48, 2)
    assert pictures.shape == (4, 3, 48, 48) and pictures.dtype == torch.uint8
    assert not torch.equal(pictures[0], pictures[1])
    redness = pictures.float()[:, 0] - pictures.float()[:, 1:].amax(1)
    share = (redness > 120).float().mean((1, 2))
    assert (share[:2] > 0.04).all() and (share[2:] == 0).all()


# Command line --------------------------------------------------------------------------------------------------------


def test_command_line(tmp_path):
    app = typer.Typer()
    app.command()(command)
    save_contrastive_config(config(tmp_path, iterations=9, probe_images=1), tmp_path / "mine.yaml")
    arguments = [str(tmp_path / "mine.yaml"), "-o", str(tmp_path / "there"), "--iterations", "1", "--seed", "5"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert load_contrastive_config(tmp_path / "there/config.yaml").seed == 5
    assert (tmp_path / "there/packed.safetensors").is_file()
    probe = json.loads((tmp_path / "there/validation.jsonl").read_text())
    assert probe["iteration"] == 1 and 0 <= probe["shape"] <= 1
    assert CliRunner().invoke(app, ["no_such_clip"]).exit_code == 2
