"""Masks on disk, found, read and refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from zs3fast.proposals import FileMaskProposer, from_masks, load_mask_proposer, mask_files

SIZE = (64, 96)
FRAME = {"short_side": 64}


def masks(count: int = 3) -> np.ndarray:
    array = np.zeros((count, *SIZE), dtype=bool)
    for index in range(count):
        array[index, 4 * index : 4 * index + 4, 10:40] = True
    return array


def picture() -> np.ndarray:
    return np.zeros((*SIZE, 3), dtype=np.uint8)


def same(got, expected) -> bool:
    return torch.equal(got.masks, expected.masks) and torch.equal(got.valid, expected.valid)


def test_every_format_gives_the_same_masks(tmp_path):
    expected = from_masks([masks()], **FRAME)
    np.savez(tmp_path / "a.npz", masks=masks())
    regions = (masks() * np.array([1, 2, 3])[:, None, None]).sum(0)
    Image.fromarray(regions.astype(np.uint8)).save(tmp_path / "b.png")
    Image.fromarray(regions.astype(np.uint16)).save(tmp_path / "c.png")
    palette = Image.fromarray(regions.astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 9, 9, 9, 0, 0, 0, 7, 7, 7])
    palette.save(tmp_path / "d.png")
    folder = tmp_path / "e"
    folder.mkdir()
    Image.fromarray(masks()[0]).save(folder / "0.png")  # 1 bit
    Image.fromarray(masks()[1].astype(np.uint8) * 255).save(folder / "1.png")
    Image.fromarray(np.repeat(masks()[2][:, :, None] * 255, 3, axis=2).astype(np.uint8)).save(folder / "2.png")
    for name in ("a.npz", "b.png", "c.png", "d.png", "e"):
        assert same(mask_files(tmp_path / name, **FRAME), expected), name
        assert same(load_mask_proposer(f"files:{tmp_path / name}", **FRAME)([picture()]), expected), name


def test_npz_holds_scores_too(tmp_path):
    scores = np.random.default_rng(0).random((3, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", masks=masks(), quality=[0.5, 0.6, 0.7], class_scores=scores, class_names=["x", "y"])
    got = mask_files(tmp_path / "a.npz", **FRAME)
    assert got.class_names == ("x", "y")
    np.testing.assert_allclose(got.class_scores[0], scores)
    np.testing.assert_allclose(got.quality[0], [0.5, 0.6, 0.7])


def test_a_folder_of_many_pictures(tmp_path):
    np.savez(tmp_path / "one.npz", masks=masks(3))
    (tmp_path / "two").mkdir()
    Image.fromarray(masks(1)[0]).save(tmp_path / "two" / "m.png")
    proposer = FileMaskProposer(tmp_path, **FRAME)
    got = proposer([picture(), picture()], ["photos/one.jpg", "two.png"])
    assert same(got, from_masks([masks(3), masks(1)], **FRAME))
    with pytest.raises(FileNotFoundError, match="masks: for the picture three.jpg, none of .*three.npz"):
        proposer([picture()], ["three.jpg"])
    with pytest.raises(ValueError, match="pictures: 2 of them need a folder of masks and the pictures' file names"):
        proposer([picture(), picture()])
    with pytest.raises(ValueError, match="names: expected 2, one a picture, got 1"):
        proposer([picture(), picture()], ["one.jpg"])
    with pytest.raises(ValueError, match="pictures: 2 of them need a folder"):
        FileMaskProposer(tmp_path / "one.npz")([picture(), picture()], ["one.jpg", "two.jpg"])
    assert same(FileMaskProposer(tmp_path / "two", **FRAME)([picture()], ["two.jpg"]), from_masks([masks(1)], **FRAME))


def test_files_must_agree(tmp_path):
    np.savez(tmp_path / "one.npz", masks=masks(), quality=np.ones(3))
    np.savez(tmp_path / "two.npz", masks=masks())
    np.savez(tmp_path / "three.npz", masks=masks(), class_scores=np.ones((3, 2)), class_names=["a"])
    proposer = FileMaskProposer(tmp_path)
    with pytest.raises(ValueError, match="only some of the files under .* have quality"):
        proposer([picture(), picture()], ["one.jpg", "two.jpg"])
    with pytest.raises(ValueError, match="have different class_names"):
        proposer([picture(), picture()], ["two.jpg", "three.jpg"])


def test_bad_files(tmp_path):
    def refuse(path, error, message):
        with pytest.raises(error, match=message):
            mask_files(path)

    refuse(tmp_path / "no.npz", FileNotFoundError, "masks: no file or folder .*no.npz")
    refuse(tmp_path, ValueError, "masks: the folder .* holds no .png file")
    (tmp_path / "a.txt").write_text("x")
    refuse(tmp_path / "a.txt", ValueError, "expected a .npz file, a .png file or a folder")
    (tmp_path / "a.npz").write_bytes(b"PK no zip")
    refuse(tmp_path / "a.npz", ValueError, "a.npz is not a readable .npz file")
    np.savez(tmp_path / "b.npz", mask=masks())
    refuse(tmp_path / "b.npz", ValueError, r"b.npz holds \['mask'\], expected `masks`")
    np.savez(tmp_path / "c.npz", masks=np.array([{"code": 1}], dtype=object))
    refuse(tmp_path / "c.npz", ValueError, "not a readable .npz file of plain arrays")
    np.savez(tmp_path / "d.npz", masks=np.full((1, *SIZE), np.nan))
    refuse(tmp_path / "d.npz", ValueError, r"d.npz: masks\[0\]: expected finite values")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "e.png")
    refuse(tmp_path / "e.png", ValueError, "e.png: masks: expected at least one proposal, got none")
    (tmp_path / "f.png").write_bytes((tmp_path / "e.png").read_bytes()[:40])
    refuse(tmp_path / "f.png", ValueError, "f.png is not a readable picture")
    (tmp_path / "g").mkdir()
    Image.fromarray(np.ones(SIZE, np.uint8)).save(tmp_path / "g" / "0.png")
    Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "g" / "1.png")
    refuse(tmp_path / "g", ValueError, r"1.png is \(8, 8\), 0.png is \(64, 96\)")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_mask_proposer(f"files:{tmp_path / 'nowhere'}")


def test_masks_of_another_picture(tmp_path):
    np.savez(tmp_path / "a.npz", masks=masks())
    with pytest.raises(ValueError, match=r"a.npz: masks\[0\]: made for a picture of \(64, 96\), this one is \(8, 8\)"):
        FileMaskProposer(tmp_path / "a.npz")([np.zeros((8, 8, 3), np.uint8)])
