"""Masks on disk, found, read and refused."""

from __future__ import annotations

import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from zs3fast.proposals import FileMaskProposer, from_masks, load_mask_proposer, mask_files
from zs3fast.text import load_text_embeddings

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
    with pytest.raises(FileNotFoundError, match="masks: for the image three.jpg, none of .*three.npz"):
        proposer([picture()], ["three.jpg"])
    with pytest.raises(ValueError, match="pictures: 2 of them need a folder of masks and the pictures' file names"):
        proposer([picture(), picture()])
    with pytest.raises(ValueError, match="names: expected 2, one an image, got 1"):
        proposer([picture(), picture()], ["one.jpg"])
    with pytest.raises(ValueError, match="pictures: 2 of them need a folder"):
        FileMaskProposer(tmp_path / "one.npz")([picture(), picture()], ["one.jpg", "two.jpg"])
    assert same(FileMaskProposer(tmp_path / "two", **FRAME)([picture()], ["two.jpg"]), from_masks([masks(1)], **FRAME))


def test_files_must_agree(tmp_path):
    np.savez(tmp_path / "one.npz", masks=masks(), quality=np.ones(3))
    np.savez(tmp_path / "two.npz", masks=masks())
    np.savez(tmp_path / "three.npz", masks=masks(), class_scores=np.ones((3, 2)), class_names=["a"])
    proposer = FileMaskProposer(tmp_path)
    with pytest.raises(ValueError, match="expected quality in all or none of the files"):
        proposer([picture(), picture()], ["one.jpg", "two.jpg"])
    with pytest.raises(ValueError, match="expected the same class_names in all files"):
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
    refuse(tmp_path / "b.npz", ValueError, r"b.npz: expected `masks` .*, got \['mask'\]")
    np.savez(tmp_path / "c.npz", masks=np.array([{"code": 1}], dtype=object))
    refuse(tmp_path / "c.npz", ValueError, "not a readable .npz file of plain arrays")
    np.savez(tmp_path / "d.npz", masks=np.full((1, *SIZE), np.nan))
    refuse(tmp_path / "d.npz", ValueError, r"d.npz: masks\[0\]: expected finite values")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "e.png")
    refuse(tmp_path / "e.png", ValueError, "e.png: masks: expected at least one proposal, got none")
    (tmp_path / "f.png").write_bytes((tmp_path / "e.png").read_bytes()[:40])
    refuse(tmp_path / "f.png", ValueError, "masks: .*f.png is not an image")
    (tmp_path / "g").mkdir()
    Image.fromarray(np.ones(SIZE, np.uint8)).save(tmp_path / "g" / "0.png")
    Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "g" / "1.png")
    refuse(tmp_path / "g", ValueError, r"1.png: expected \(64, 96\), as 0.png, got \(8, 8\)")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_mask_proposer(f"files:{tmp_path / 'nowhere'}")


def npy(header: str, data: bytes = b"") -> bytes:
    """A .npy file whose header says anything."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz(path, **files: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"{name}.npy", data)


BAD_HEADERS = [
    "{'descr': '|b1', 'fortran_order': False, 'shape': (1, 8",  # cut off: a TokenError of Python's tokenizer
    "{'descr': '|b1', 'fortran_order': False, 'shape': (1000000000, 64, 96), }",
    "{'descr': '|b1', 'fortran_order': False, 'shape': (-1, 64, 96), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1, 64, 96), }",
    "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1, 64, 96), }",
    "{'descr': '<U3', 'fortran_order': False, 'shape': (0, 64, 96), }",
    "{'descr': '<c8', 'fortran_order': False, 'shape': (0, 64, 96), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (0, 64, 96), }",
    "(" * 5000,
]


@pytest.mark.parametrize("header", BAD_HEADERS, ids=range(len(BAD_HEADERS)))
def test_headers_that_lie_are_refused_by_name(tmp_path, header):
    npz(tmp_path / "a.npz", masks=npy(header, b"\1" * 100))
    (tmp_path / "a.npy").write_bytes(npy(header, b"\1" * 100))
    with pytest.raises(ValueError, match="a.npz"):
        mask_files(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="text_embeddings: .*a.npy"):
        load_text_embeddings(tmp_path / "a.npy")


def test_a_damaged_stream_is_refused_by_name(tmp_path):
    """zlib.error is no ValueError."""
    np.savez_compressed(tmp_path / "a.npz", masks=np.random.default_rng(0).random((3, *SIZE)) > 0.5)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    for at in range(100, len(data) - 100, 97):
        data[at] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError, match="a.npz is not a readable .npz file"):
        mask_files(tmp_path / "a.npz")


@pytest.mark.parametrize("field", ["masks", "quality", "class_scores"])
@pytest.mark.parametrize("odd", [np.array(["x", "y", "z"]), np.array(["2020-01-01"] * 3, "M8[D]"), np.ones(3, "c8")])
def test_strings_and_dates_are_no_numbers(tmp_path, field, odd):
    np.savez(tmp_path / "a.npz", **{"masks": masks(), "class_names": ["a"], field: odd})
    with pytest.raises(ValueError, match="a.npz"):
        FileMaskProposer(tmp_path / "a.npz")([picture()])


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    """18 kB asked for 14 GB, 2.9 MB for 7.7 GB: what they claim is compared with the limit first."""
    monkeypatch.setenv("ZS3FAST_FILE_LIMIT", "4")
    message = "would take .* MiB, a file may unpack to 4; set ZS3FAST_FILE_LIMIT"
    np.savez_compressed(tmp_path / "a.npz", masks=np.zeros((100, 300, 300), bool))
    with pytest.raises(ValueError, match=f"a.npz: its arrays {message}"):
        mask_files(tmp_path / "a.npz")
    Image.fromarray(np.arange(300 * 300, dtype=np.uint16).reshape(300, 300) // 100).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=f"b.png: 900 masks of 300 x 300 {message}".replace("900", r"\d+")):
        mask_files(tmp_path / "b.png")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=f"c.png: 63 masks of 640 x 640 {message}"):
        mask_files(tmp_path / "c.png")
    (tmp_path / "d").mkdir()
    for index in range(60):
        Image.fromarray(np.ones((300, 300), np.uint8)).save(tmp_path / "d" / f"{index}.png")
    with pytest.raises(ValueError, match=f"d: 60 masks of 300 x 300 {message}"):
        mask_files(tmp_path / "d")


def test_hidden_files_are_no_masks(tmp_path):
    Image.fromarray(masks()[0]).save(tmp_path / "0.png")
    (tmp_path / "._0.png").write_bytes(b"\0\5\x16\7")
    assert mask_files(tmp_path, **FRAME).masks.shape[1] == 1


def test_masks_of_another_picture(tmp_path):
    np.savez(tmp_path / "a.npz", masks=masks())
    with pytest.raises(ValueError, match=r"a.npz: masks\[0\]: expected masks of an image of \(8, 8\), got \(64, 96\)"):
        FileMaskProposer(tmp_path / "a.npz")([np.zeros((8, 8, 3), np.uint8)])
