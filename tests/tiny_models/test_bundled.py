"""The trained models in the package do their job: they know classes of the world that they had no labels of."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image
from typer.testing import CliRunner

from tools.world.contrastive import load_contrastive_config
from tools.world.contrastive.probe import zero_shot_probe
from zs3fast import Segmenter, create_model, weights
from zs3fast.cli import app
from zs3fast.data.world import WorldDataset
from zs3fast.evaluation.scores import Scores
from zs3fast.inference.predictors import prepare
from zs3fast.inference.segmenter import TINY, TINY_DEFAULT, find_weights
from zs3fast.tiny.scoring import score, world_labeller, world_segmenter
from zs3fast.weights.packing import BASE, bundled, packed_models, unpack_clip

METHODS = ("clip_rc", "clsclip", "maft", "maskclip", "tagclip", "zegclip")
SCENES = 24


@functools.cache
def scores(method: str) -> Scores:
    scenes = WorldDataset("test", length=SCENES)
    return score(world_labeller(world_segmenter(find_weights(f"{TINY}-{method}"), scenes), scenes), scenes).scores


def test_all_methods_are_there_and_small() -> None:
    found = packed_models(bundled())
    assert set(found) == set(METHODS)
    assert sum(path.stat().st_size for path in bundled().iterdir()) <= 25e6
    assert find_weights(TINY) == found[TINY_DEFAULT] and find_weights(f"{TINY}-maft") == found["maft"]
    assert Segmenter.from_pretrained(TINY).model.method == TINY_DEFAULT
    with pytest.raises(FileNotFoundError, match="nor in the package .zs3fast-tiny, zs3fast-tiny-clip_rc"):
        find_weights("zs3fast-tiny-nothing")


@pytest.mark.parametrize("method", ["zegclip", "tagclip", "clip_rc"])
def test_unseen_classes_are_found(method: str) -> None:
    found, plain = scores(method).headline(), scores("maskclip").headline()
    assert found["mIoU(U)"] > 0.6 * found["mIoU(S)"] and found["pAcc"] > 50
    assert found["hIoU"] > 3 * plain["hIoU"]


@pytest.mark.parametrize("init", ["official", "intent"])
@torch.no_grad()
def test_what_patches_differ_in_before_clip_rc_is_trained(init: str) -> None:
    """The README on its start: of it the published decoder leaves a few percent of a patch, and logits are large."""
    trained = weights.load(find_weights(f"{TINY}-clip_rc"))[0]
    torch.manual_seed(0)
    model = create_model(**{**trained.config, "pretrained": None, "init": init, "output_gain": 1.0}).eval()
    model.encoder.load_state_dict(trained.encoder.state_dict())
    shares = []
    for part in (model.alignment, model.decoder.decoder_v.layers[-1]):
        part.register_forward_hook(lambda _module, _inputs, patches: shares.append(share_that_differs(patches)))
    scenes = WorldDataset("test", length=8)
    images = torch.stack([prepare(scene.image, 96, model.pixel_mean, model.pixel_std) for scene in scenes])
    text = torch.nn.functional.normalize(torch.randn(48, 128), dim=-1)
    masks = model(images, text).mask_logits
    before, after = shares
    assert before > 0.15 and (after < 0.1 if init == "official" else after > 0.9 * before)
    assert masks.std() > 3  # of scores that begin near 0 it would be less than 1
    model.decoder.decoder_q.layers[-1].norm3.weight.fill_(0.3)
    model.decoder.decoder_v.layers[-1].norm3.weight.fill_(0.3)
    assert model(images, text).mask_logits.std() < 1.5


def share_that_differs(patches: torch.Tensor) -> float:
    """Of the squared norm of patches [B, N, D], what is not their mean over the image."""
    return ((patches - patches.mean(1, keepdim=True)).square().sum() / patches.square().sum()).item()


def test_the_clip_names_things_and_stuff() -> None:
    clip = open_clip.CLIP(**load_contrastive_config().clip)
    clip.load_state_dict(unpack_clip(safetensors.torch.load_file(bundled() / BASE)))
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
    found = zero_shot_probe(clip, tokenizer, size=64, number=4)
    assert found["things"] == pytest.approx(0.625, abs=0.02) and found["stuff"] == pytest.approx(0.78, abs=0.02)
    assert found["colour"] == 1 and found["pattern"] > 0.98 and found["shape"] > 0.6


def test_the_default_on_one_scene() -> None:
    scene = WorldDataset("test")[5]
    result = Segmenter.from_pretrained(TINY)(scene.image)
    assert (result.labels == scene.labels).mean() > 0.6
    # A list of one's own, with a class that is not in it:
    names = sorted({result.class_names[c] for c in np.unique(scene.labels)})
    few = Segmenter.from_pretrained(TINY)(scene.image, [*names, "checkered green star"])
    truth = np.array([result.class_names[c] for c in scene.labels.ravel()])
    assert (np.array(few.class_names)[few.labels.ravel()] == truth).mean() > 0.7


def test_segment_on_the_command_line(tmp_path: Path) -> None:
    """Weights with a vocabulary of their own need no class names."""
    scene = WorldDataset("test")[0]
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    done = CliRunner().invoke(
        app, ["segment", str(tmp_path / "scene.png"), "--weights", TINY, "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "scene.json").read_text())
    labels = Segmenter.from_pretrained(TINY)(scene.image)
    found = np.bincount(labels.labels.ravel(), minlength=len(labels.class_names)) * 100 / labels.labels.size
    assert len(summary["classes"]) == 64 and np.count_nonzero(found) > 1
    for entry in summary["classes"]:
        assert entry["percent"] == pytest.approx(found[labels.class_names.index(entry["name"])], abs=0.01)


def test_demo(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "-o", str(tmp_path), "--scenes", "4"])
    assert done.exit_code == 0, done.output
    assert all(method in done.output for method in METHODS) and "hIoU" in done.output
    with Image.open(tmp_path / "demo.png") as picture:
        colours = {tuple(pixel) for pixel in np.asarray(picture.convert("RGB"))[::7, ::7].reshape(-1, 3).tolist()}
        assert picture.width > 1000 and len(colours) > 500


def test_words_that_the_small_models_have_not_met(tmp_path: Path) -> None:
    scene = tmp_path / "scene.png"
    Image.fromarray(WorldDataset("test")[0].image).save(scene)

    def segment(names: str) -> str:
        out = CliRunner().invoke(app, ["segment", str(scene), "-w", TINY, "-c", names, "-o", str(tmp_path / "out")])
        assert out.exit_code == 0, out.output
        return " ".join(out.output.split())

    assert "does not know cat, dog, sea, ...; photographs need other weights" in segment(
        "cat, Red sand, dog, sea, ship"
    )
    assert "note" not in segment("red sand, star")
