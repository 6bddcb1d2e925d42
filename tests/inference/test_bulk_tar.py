"""WebDataset shards: every sample's image is found where it lies, and a shard that is not whole is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from zs3fast.inference.bulk_tar import samples

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def write_tar(path: Path, files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def read(path: Path) -> dict[str, bytes | str | None]:
    """Content of every sample's image, or why there is none."""
    data = path.read_bytes()
    with path.open("rb") as file:
        found = samples(file, SUFFIXES)
    assert len(dict(found)) == len(found)
    return {key: data[one.start : one.end] if one.problem is None else one.problem for key, one in found}


LONG = "folder/" + "n" * 150


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples(format: int, tmp_path: Path) -> None:
    """Names of all kinds; what lies beside an image is no image; an empty file is one that is broken."""
    files = {
        "0001.jpg": b"one",
        "0001.json": b"{}",
        "0001.seg.png": b"its mask",
        "a/0001.JPEG": b"two" * 1000,
        "a/0001.cls": b"3",
        "b.d/0001.camera.png": b"three",
        "Grün 猫.webp": b"",
        f"{LONG}.png": b"five",
        "0002.txt": b"a caption alone",
        "__meta__.json": b"{}",
        "README": b"no sample",
        "a/._0001.jpg": b"what macOS leaves",
    }
    assert read(write_tar(tmp_path / "x.tar", files, format)) == {
        "0001": b"one",
        "a/0001": b"two" * 1000,
        "b.d/0001": b"three",
        "Grün 猫": b"",
        LONG: b"five",
        "0002": "no image among txt",
    }


def test_links(tmp_path: Path) -> None:
    """tar stores a file's second name as a link, without its content."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"one"))
        for name, kind, target in (
            ("b.jpg", tarfile.LNKTYPE, "a.jpg"),
            ("c.jpg", tarfile.LNKTYPE, "no.jpg"),
            ("d.jpg", tarfile.SYMTYPE, "a.jpg"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    got = read(path)
    assert got["a"] == got["b"] == b"one"
    assert "no.jpg, which is not there" in str(got["c"]) and "symbolic" in str(got["d"])


def test_a_name_twice_is_there_twice(tmp_path: Path) -> None:
    """The reader of a run refuses it; tar itself would keep the last alone."""
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"one"})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"two"))
    with path.open("rb") as file:
        assert [key for key, _ in samples(file, SUFFIXES)] == ["a", "a"]


def test_two_images_in_a_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"one", "a.png": b"two"})
    with (
        path.open("rb") as file,
        pytest.raises(ValueError, match="expected one image in a sample, got jpg and png in 'a'"),
    ):
        samples(file, SUFFIXES)


def test_a_shard_that_is_not_whole(tmp_path: Path) -> None:
    """Cut anywhere, damaged or followed by another: never a shorter list."""
    files = {f"{number}.jpg": bytes([number]) * 700 for number in range(1, 6)}
    whole = write_tar(tmp_path / "x.tar", files).read_bytes()
    header = 512 + 1024  # and a file's content
    damaged = bytearray(whole)
    damaged[2 * header : 2 * header + 100] = b"\xff" * 100
    broken = [whole[:cut] for cut in (0, 100, 511, 512, 700, header, header + 1, 3 * header, 4 * header + 600)]
    for content in (*broken, bytes(damaged), whole + whole, b"no tar at all" * 100):
        with pytest.raises(tarfile.TarError):
            samples(io.BytesIO(content), SUFFIXES)
    assert len(samples(io.BytesIO(whole[: 5 * header + 512]), SUFFIXES)) == 5, "the end mark is what counts"
