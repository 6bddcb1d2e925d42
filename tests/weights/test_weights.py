"""Official checkpoints in, safetensors out and in, and every way a file can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

import zs3fast
from tests.goldens_data import HEADS, SEEN, Golden, golden_files
from tests.tiny import tiny_inputs, tiny_model
from zs3fast.weights import CheckpointError, load, save

OPTIONS = {"seen": SEEN, "num_classes": 7, "heads": HEADS, "decoder_heads": HEADS}


def official(method: str = "zegclip") -> dict[str, torch.Tensor]:
    return Golden(golden_files(method)[0]).group("weight")


def test_file_wrappers_and_prefixes_are_opened(tmp_path: Path) -> None:
    state = official()
    torch.save({"state_dict": state, "meta": {"epoch": 1, "config": "x"}}, tmp_path / "mmcv.pth")
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "ddp.pth")
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "plain.safetensors")
    reference = zs3fast.load_official(state, **OPTIONS).state_dict()
    for name in ("mmcv.pth", "ddp.pth", "plain.safetensors"):
        got = zs3fast.load_official(tmp_path / name, **OPTIONS).state_dict()
        assert all(torch.equal(got[key], reference[key]) for key in reference), name


def test_sizes_are_read_off_the_keys() -> None:
    config = zs3fast.load_official(official(), **OPTIONS).config
    assert (config["num_prompts"], config["prompt_depth"], config["decoder_layers"], config["decoder_width"]) == (
        3,
        2,
        3,
        128,
    )
    assert config["image_size"] == 64 and config["clip"]["vision_cfg"]["width"] == 48
    model = zs3fast.load_official(official("tagclip"), image_size=96, **OPTIONS)
    assert model.config["layout"] == "a_n_n" and model.config["trusty_token"] and model.image_size == 96


@pytest.mark.parametrize("depth", [1, 0, -2, -3])
def test_prompt_depth_is_read_off_the_keys(depth: int) -> None:
    model = tiny_model("zegclip", prompt_depth=depth)
    state = {name: model.state_dict()[ours] for ours, name in zs3fast.weights.official_keys(model).items()}
    again = zs3fast.load_official(state, **OPTIONS)
    assert again.config["prompt_depth"] == depth
    images, text = tiny_inputs()
    assert torch.equal(again(images, text).mask_logits, model(images, text).mask_logits)


def test_dead_and_text_keys_are_dropped_but_nothing_else() -> None:
    state = official()
    state["decode_head.loss_decode.criterion.empty_weight"] = torch.ones(8)
    state["text_encoder.positional_embedding"] = torch.ones(77, 512)
    zs3fast.load_official(state, **OPTIONS)
    for key in [k for k in state if "self_attn" in k or "layers.2.linear" in k or "norm1" in k]:
        del state[key]
    zs3fast.load_official(state, **OPTIONS)
    state["decode_head.surprise"] = torch.ones(1)
    del state["backbone.ln_post.bias"]
    with pytest.raises(
        CheckpointError, match=r"(?s)missing \(1\): backbone.ln_post.bias.*unexpected \(1\): decode_head.surprise"
    ):
        zs3fast.load_official(state, **OPTIONS)


def test_wrong_shapes_are_listed() -> None:
    state = official()
    state["backbone.ln_post.bias"] = torch.ones(47)
    with pytest.raises(CheckpointError, match=r"wrong shape \(1\): encoder.ln_post.bias \[47\], expected \[48\]"):
        zs3fast.load_official(state, **OPTIONS)


def test_checkpoints_of_other_methods_are_recognised() -> None:
    with pytest.raises(CheckpointError, match="expected weights of 'tagclip', got those of 'zegclip'"):
        zs3fast.load_official(official(), method="tagclip", **OPTIONS)
    with pytest.raises(CheckpointError, match="this maft checkpoint has no 'IPCLIP.conv1.weight', which its sizes"):
        zs3fast.load_official({"IPCLIP.proj": torch.ones(1)})
    with pytest.raises(CheckpointError, match="no official checkpoint of a known method; its keys start with"):
        zs3fast.load_official({"layer1.weight": torch.ones(1)})


class Surprise:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch surprise",)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": official(), "extra": Surprise()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil.pth: holds pickled objects other than tensors and is not loaded"):
        zs3fast.load_official(tmp_path / "evil.pth")
    assert not (tmp_path / "surprise").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_and_foreign_files(tmp_path: Path, suffix: str) -> None:
    whole, cut, text = (tmp_path / f"{name}{suffix}" for name in ("whole", "cut", "text"))
    if suffix == ".pth":
        torch.save(official(), whole)
    else:
        safetensors.torch.save_file({k: v.contiguous() for k, v in official().items()}, whole)
    cut.write_bytes(whole.read_bytes()[:100_000])
    text.write_text("not a checkpoint")
    for path in (cut, text):
        with pytest.raises(CheckpointError, match=f"{path.name}: (not a readable|holds pickled)"):
            zs3fast.load_official(path)
    with pytest.raises(FileNotFoundError, match="path: no file"):
        zs3fast.load_official(tmp_path / f"absent{suffix}")


def test_entries_that_are_no_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": 1}}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"entries that are not named tensors: \['a'\]"):
        zs3fast.load_official(tmp_path / "odd.pth")


def test_weights_remember_the_clip_they_grew_from(tmp_path: Path) -> None:
    """Its text tower goes with them; the tag is not fetched again."""
    model = tiny_model("zegclip")
    model.note_origin("laion2b_s34b_b88k")
    save(model, tmp_path / "m.safetensors")
    again, _ = load(tmp_path / "m.safetensors")
    assert again.config["pretrained"] == "laion2b_s34b_b88k" and again.weights_loaded


@pytest.mark.parametrize("method", zs3fast.list_models())
def test_save_and_load_keep_weights_settings_and_companions(tmp_path: Path, method: str) -> None:
    model = tiny_model(method, class_names=list("abcdefg"), seen_offset=0.0)
    if method == "tagclip":
        model.trusty_weighting = "seen"
    save(model, tmp_path / "m.safetensors", {"text_encoder.ln_final.weight": torch.ones(3)})
    again, extra = load(tmp_path / "m.safetensors")
    assert again.config == model.config and not again.training
    assert list(extra) == ["text_encoder.ln_final.weight"]
    inputs = tiny_inputs(size=(96, 96) if method == "scclip" else (64, 64))  # it needs 31 patches
    if method == "maft":
        inputs = (*inputs, torch.ones(2, 3, 64, 64))
    assert torch.equal(again(*inputs).mask_logits, model(*inputs).mask_logits)


def test_config_of_every_model_is_json() -> None:
    for method in zs3fast.list_models():
        assert json.loads(json.dumps(tiny_model(method).config)) == tiny_model(method).config


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save(tiny_model("zegclip"), path)
    before = path.read_bytes()

    def full_disk(*args: object, **kwargs: object) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tiny_model("tagclip"), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_loading_files_that_are_not_ours(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="no zs3fast configuration inside. Official checkpoints go through"):
        load(tmp_path / "bare.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "absent.safetensors")
