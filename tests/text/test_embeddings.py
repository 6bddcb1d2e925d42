"""Prepared embedding files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from zs3fast.text import class_names, load_text_embeddings

DATA = os.environ.get("ZS3FAST_DATA")


@pytest.mark.skipif(not DATA, reason="ZS3FAST_DATA is not set: no official embedding files here")
@pytest.mark.parametrize(("file", "dataset"), [("voc12_single.npy", "voc20"), ("coco_multi.npy", "coco171")])
def test_official_files(file, dataset):
    path = Path(DATA) / "clip_vit_b16" / file
    rows = load_text_embeddings(path, num_classes=len(class_names(dataset)))
    stored = np.load(path)
    assert stored.dtype == np.float16 and rows.dtype == torch.float32
    assert torch.equal(rows.half(), torch.from_numpy(stored)), "promoted exactly"
    off = (rows.norm(dim=1) - 1).abs().max().item()
    assert 0 < off < 1e-3, "norms are those of the rounded rows: not normalised again"


@pytest.mark.skipif(not DATA, reason="ZS3FAST_DATA is not set: no official embedding files here")
def test_official_rows_lie_in_our_class_order():
    """The two files share no sentence, yet the row of a name both lists have is the nearest one of the other file."""
    folder = Path(DATA) / "clip_vit_b16"
    voc, coco = (load_text_embeddings(folder / f) for f in ("voc12_single.npy", "coco_multi.npy"))
    names, others = class_names("voc20"), class_names("coco171")
    shared = [name for name in names if name in others]
    assert len(shared) >= 12
    nearest = (voc @ coco.T).argmax(1)
    assert [others[nearest[names.index(name)]] for name in shared] == shared


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_types(tmp_path, dtype):
    array = np.asfortranarray(np.random.default_rng(0).normal(size=(5, 8)).astype(dtype))
    np.save(tmp_path / "x.npy", array)
    rows = load_text_embeddings(tmp_path / "x.npy", 5)
    assert rows.dtype == torch.float32 and rows.is_contiguous()
    np.testing.assert_array_equal(rows.numpy(), array.astype(np.float32))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(8, np.float32), r"expected \[C, D\], got \[8\]"),
        (np.zeros((2, 3, 4), np.float32), r"got \[2, 3, 4\]"),
        (np.zeros((0, 8), np.float32), r"got \[0, 8\]"),
        (np.zeros((3, 8), np.int64), "expected float16, float32 or float64, got int64"),
        (np.full((3, 8), np.nan, np.float32), "expected finite numbers, got"),
        (np.array([[1, "a"], [None, 2]], object), "not a whole .npy file"),
    ],
)
def test_bad_arrays(tmp_path, array, message):
    path = tmp_path / "x.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError, match=message) as caught:
        load_text_embeddings(path)
    assert str(path) in str(caught.value)


def test_wrong_number_of_classes(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 8), np.float32))
    with pytest.raises(ValueError, match="expected a row for each of 4 classes, got 3"):
        load_text_embeddings(tmp_path / "x.npy", num_classes=4)


@pytest.mark.parametrize("keep", [0, 5, 60, 200])
def test_truncated_files(tmp_path, keep):
    path = tmp_path / "x.npy"
    np.save(path, np.ones((3, 80), np.float32))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a whole .npy file"):
        load_text_embeddings(path)


def test_other_files(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones((3, 8)))
    with pytest.raises(ValueError, match="not a whole .npy file"):
        load_text_embeddings(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError):
        load_text_embeddings(tmp_path / "none.npy")
