"""From a CLIP and a run on it to small files and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import torch

from tools.world.build import pack_base, pack_model, trained_model
from tools.world.contrastive import load_contrastive_config
from zs3fast import Segmenter, weights
from zs3fast.data.world import CLASS_NAMES, WorldDataset
from zs3fast.text import TextEncoder
from zs3fast.weights.packing import BASE


def test_a_run_takes_its_text_tower_along(clip: Path, run: Path) -> None:
    """A CLIP without a name has no other place to get it from."""
    assert "text_encoder.token_embedding.weight" in weights.load(run)[1]
    seg = Segmenter.from_pretrained(run)
    encoder = TextEncoder.from_open_clip(load_contrastive_config().clip, clip, cache=False)
    assert torch.equal(seg.text_encoder.encode(["red bricks"]), encoder.encode(["red bricks"]))
    assert seg.model.class_names == list(CLASS_NAMES)


def test_a_run_that_is_there_is_not_trained_again(clip: Path, run: Path) -> None:
    before = run.stat().st_mtime_ns
    assert trained_model("tagclip", run.parents[1], clip) == run and run.stat().st_mtime_ns == before


@torch.no_grad()
def test_packed_models_are_the_same_to_half_precision(clip: Path, run: Path, tmp_path: Path) -> None:
    packed = tmp_path / "tagclip.safetensors"
    pack_base(clip, tmp_path / BASE)
    pack_model(run, packed, tmp_path / BASE)
    trained, _ = weights.load(run)
    again, tower = weights.load(packed)
    ours, own = again.state_dict(), trained.state_dict()
    assert ours.keys() == own.keys() and all(torch.equal(ours[name], own[name].half().float()) for name in own)
    assert {**again.config, "pretrained": None} == {**trained.config, "pretrained": None}
    assert packed.stat().st_size < 0.4 * sum(tensor.numel() * 2 for tensor in own.values())
    with safetensors.safe_open(packed, framework="pt") as file:
        assert not any(name.startswith("encoder.transformer") for name in file.keys())

    image = WorldDataset("val")[0].image
    first, second = (Segmenter.from_pretrained(path)(image) for path in (run, packed))
    assert (first.labels == second.labels).mean() > 0.97
    assert tower["text_encoder.token_embedding.weight"].shape == (49408, 128)


def test_a_packed_model_without_its_base(clip: Path, run: Path, tmp_path: Path) -> None:
    pack_base(clip, tmp_path / BASE)
    pack_model(run, tmp_path / "tagclip.safetensors", tmp_path / BASE)
    (tmp_path / BASE).unlink()
    with pytest.raises(FileNotFoundError, match=f"no file .*{BASE}"):
        weights.load(tmp_path / "tagclip.safetensors")
