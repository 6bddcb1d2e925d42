"""Safe reading, strict loading, and files that claim more than they hold."""

from __future__ import annotations

import json
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from tests.tiny import tiny_inputs, tiny_model
from zs3fast import weights
from zs3fast.utils.checkpoint_io import plain_name, read_state_dict, sketch, strict_load, unwrap_state_dict
from zs3fast.utils.errors import CheckpointError, FileLimitError, Zs3fastError

META = {
    "best_score": np.float64(0.5),
    "epoch": np.int64(7),
    "flag": np.bool_(True),
    "name": np.str_("voc"),
    "PALETTE": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "mean": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.array([1, 2], ">i4"),
    "CLASSES": np.array(["cat", "dog"]),
    "none": np.zeros((0, 3)),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_mmcv_checkpoints_hold_numpy_values(tmp_path: Path, legacy: bool) -> None:
    """`best_score` and PALETTE in `meta` made a file "pickled objects" that were refused."""
    content = {"meta": META, "state_dict": {"a": torch.arange(3), "b": np.arange(4.0)}}
    torch.save(content, tmp_path / "mmcv.pth", _use_new_zipfile_serialization=not legacy)
    state = read_state_dict(tmp_path / "mmcv.pth")
    assert torch.equal(state["a"], torch.arange(3)) and torch.equal(state["b"], torch.arange(4.0).double())


def test_files_of_numpy_1_are_read(tmp_path: Path) -> None:
    """There the module was `numpy.core`."""
    torch.save({"meta": META, "state_dict": {"a": torch.ones(2)}}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as old, zipfile.ZipFile(tmp_path / "old.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"numpy._core.", b"numpy.core."))
    assert list(read_state_dict(tmp_path / "old.pth")) == ["a"]


@pytest.mark.parametrize(
    "value", [np.array([{"a": 1}], dtype=object), np.zeros(2, [("x", "f4")]), np.datetime64("2020")]
)
def test_other_numpy_values_are_refused(tmp_path: Path, value: object) -> None:
    torch.save({"meta": value, "state_dict": {"a": torch.ones(2)}}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="odd.pth: "):
        read_state_dict(tmp_path / "odd.pth")


def test_a_numpy_type_whose_state_is_forged_reaches_no_numpy(tmp_path: Path) -> None:
    """A dtype's flags say what bytes are pointers: with NumPy's own __setstate__ this file would be read as objects."""

    class Forged:
        def __reduce__(self) -> object:
            return np.dtype, ("f8", False, True), (3, "|", None, ("x",), {"x": (np.dtype("O"), 0)}, 8, 8, 0)

    torch.save({"meta": Forged(), "state_dict": {"a": torch.ones(2)}}, tmp_path / "forged.pth")
    with pytest.raises(CheckpointError, match="forged.pth: "):
        read_state_dict(tmp_path / "forged.pth")


@pytest.mark.parametrize(
    "name",
    ["a.b", "module.a.b", "_orig_mod.a.b", "module._orig_mod.a.b", "_orig_mod.module.a.b", "module.module.a.b"]
    + ["a._orig_mod.b", "module.a._orig_mod.b"],
)
def test_prefixes_of_wrappers(name: str) -> None:
    assert plain_name(name) == "a.b"
    assert list(unwrap_state_dict({"model": {name: torch.ones(1)}}, "x")) == ["a.b"]


def test_names_that_only_look_like_prefixes_stay() -> None:
    for name in ("modules.a", "a.module.b", "a.modules._orig_mods.b", "my_orig_mod.a"):
        assert plain_name(name) == name
    with pytest.raises(CheckpointError, match="x: two tensors are named 'a', one of them as 'module.a'"):
        unwrap_state_dict({"a": torch.ones(1), "module.a": torch.ones(1)}, "x")


def test_a_compiled_model_is_saved_as_itself(tmp_path: Path) -> None:
    """Its names began with `_orig_mod.`, and the file could not be loaded."""
    model = tiny_model("zegclip")
    expected = model(*tiny_inputs()).mask_logits
    weights.save(torch.compile(model), tmp_path / "whole.safetensors")
    model.encoder = torch.compile(model.encoder)
    weights.save(model, tmp_path / "part.safetensors")
    for name in ("whole", "part"):
        again, extra = weights.load(tmp_path / f"{name}.safetensors")
        assert not extra and torch.equal(again(*tiny_inputs()).mask_logits, expected)


def test_strict_load_changes_nothing_unless_all_fits() -> None:
    model = nn.Linear(2, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"(?s)^x: .*missing \(1\): bias.*unexpected \(1\): b.*\(1\): weight \[2, 2\]"
    ):
        strict_load(model, {"weight": torch.ones(2, 2), "b": torch.ones(1)}, "x")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    state = {"weight": torch.ones(3, 2, dtype=torch.half), "b": torch.ones(1), "a": torch.ones(1)}
    left_out = strict_load(model, state, "x", optional=lambda n: n == "bias", spare=lambda n: n in "ab")
    assert left_out == ["a", "b"] and model.weight.dtype == torch.float32 and (model.weight == 1).all()
    assert torch.equal(model.bias, before["bias"])


def header_of(path: Path, config: object) -> None:
    """A safetensors file of one number, with a zs3fast header."""
    text = config if isinstance(config, str) else json.dumps(config)
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"zs3fast": text})


GOOD = tiny_model("zegclip").config


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[" * 50_000,
        "null",
        [1, 2],
        {"clip": "ViT-B-16"},
        {"method": 5},
        {"method": "zegclop"},
        {**GOOD, "surprise": 1},
        {**GOOD, "clip": 7},
        {**GOOD, "clip": {"embed_dim": 32, "vision_cfg": 3}},
        {**GOOD, "clip": {"embed_dim": "a", "vision_cfg": GOOD["clip"]["vision_cfg"]}},
        {**GOOD, "num_prompts": "many"},
        {**GOOD, "image_size": None},
        {**GOOD, "seen": 5},
        {**GOOD, "class_names": "cat"},
        {**GOOD, "decoder_heads": 0},
        GOOD,
    ],
    ids=range(17),
)
def test_a_header_that_is_wrong_names_the_file(tmp_path: Path, config: object) -> None:
    path = tmp_path / "bad.safetensors"
    header_of(path, config)
    with pytest.raises(CheckpointError) as caught:
        weights.load(path)
    assert str(caught.value).startswith(f"{path}: ") and isinstance(caught.value, (Zs3fastError, ValueError))


LARGE = [
    {"clip": {**GOOD["clip"], "vision_cfg": {**GOOD["clip"]["vision_cfg"], "width": 200_000}}},
    {"clip": {**GOOD["clip"], "vision_cfg": {**GOOD["clip"]["vision_cfg"], "layers": 10**6}}},
    {"clip": {**GOOD["clip"], "embed_dim": 10**7}},
    {"num_classes": 10**10, "seen": None},
    {"num_prompts": 10**9},
    {"image_size": 10**7},
    {"decoder_layers": 10**6},
]


@pytest.mark.parametrize("large", LARGE, ids=range(len(LARGE)))
def test_sizes_are_compared_before_they_are_allocated(tmp_path: Path, large: dict[str, object]) -> None:
    """257 bytes asked for hundreds of GB; now for less than half a GB beyond what torch itself takes."""
    header_of(tmp_path / "large.safetensors", {**GOOD, **large})
    code = """
import resource, sys, time
from zs3fast import weights
import zs3fast.models.zegclip
start, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
try:
    weights.load(sys.argv[1])
except ValueError as error:
    print(str(error)[:300])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
assert grown < 500_000, f"{grown} kB"
assert time.time() - begun < 20
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large.safetensors")],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30)),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'large.safetensors'}: ")


def test_official_sizes_are_compared_too() -> None:
    """The number of layers is read off the names: one name asked for a billion of them."""
    from tests.weights.test_weights import OPTIONS, official

    state = official()
    state["backbone.transformer.resblocks.999999999.ln_1.weight"] = torch.ones(48)
    with pytest.raises(CheckpointError, match="checkpoint: its sizes are those of a far larger model"):
        weights.load_official(state, **OPTIONS)


def test_a_sketch_is_made_of_nothing() -> None:
    model = sketch(lambda: nn.Linear(1000, 1000), [torch.ones(1000, 1000)], "x")
    assert model.weight.is_meta and model.weight.shape == (1000, 1000)
    with pytest.raises(CheckpointError, match="x: its sizes"):
        sketch(lambda: nn.Linear(10**5, 10**5), [torch.ones(10)], "x")
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(20 << 20, dtype=torch.uint8)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as old:
        with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    monkeypatch.setenv("ZS3FAST_FILE_LIMIT", "10")
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    with pytest.raises(FileLimitError, match="bomb.pth: .* would take 20 MiB, .* to 10; set ZS3FAST_FILE_LIMIT"):
        read_state_dict(tmp_path / "bomb.pth")
    assert len(read_state_dict(tmp_path / "plain.pth")["a"]) == 20 << 20  # as large as the file itself: no bomb
    monkeypatch.setenv("ZS3FAST_FILE_LIMIT", "lots")
    with pytest.raises(ValueError, match="ZS3FAST_FILE_LIMIT: expected a number of MiB above 0, got 'lots'"):
        read_state_dict(tmp_path / "bomb.pth")


def test_a_tensor_that_repeats_one_number_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "views.pth")
    with pytest.raises(FileLimitError, match="views.pth: its tensors would take"):
        read_state_dict(tmp_path / "views.pth")


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02.", pickle.dumps({"a": 1}), b"PK\3\4", struct.pack("<Q", 2**62) + b"{}"]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_weights_name_themselves(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"bad{suffix}: "):
        read_state_dict(path)
