"""Damaged files by the hundred, read as users' files are: `python -m tests.fuzz.damaged SEED COUNT FOLDER`.

A file is made sound, then damaged at random: cut off, bytes changed, parts repeated, numbers in it made huge, headers
made to lie. Its reader must give a result, or an error that a user can read and that names the file. Anything else ends
the process with a message; so do more than 1 GB beyond what it held before, and a file outside the output folder.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import sys
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.tiny import tiny_model
from zs3fast import weights
from zs3fast.cli import app
from zs3fast.data import open_dataset
from zs3fast.data.layouts import read_ids
from zs3fast.proposals import box_file, mask_files
from zs3fast.text import load_text_embeddings, read_class_file
from zs3fast.training.checkpoints import read_checkpoint, write_checkpoint
from zs3fast.training.config import load_config
from zs3fast.utils.console import first_line
from zs3fast.utils.images import read_image, read_mask_file

MOST_MEMORY = 1 << 20  # kB beyond what was held when all was loaded
USER_ERRORS = (ValueError, OSError)
RNG = np.random.Generator
NASTY = (
    b'1e999 -1e999 NaN null true -1 0 1000000 99999999999999999999999 1000000000000 [] {} [[[[ ]]]] "" "\\ud800" '
    b'"\\u0000" {"a":1} [null] 1.5 "many" !!python/object:os.system *x &x \xe9 \x00 \' "'
).split()


def image_bytes(rng: RNG, kind: str) -> bytes:
    array = rng.integers(0, 256, (int(rng.integers(1, 40)), int(rng.integers(1, 40)), 3), np.uint8)
    image, file = Image.fromarray(array), io.BytesIO()
    if kind in ("gif", "tiff", "webp") and rng.random() < 0.5:
        image.save(file, kind, save_all=True, append_images=[image.rotate(90)])
    elif kind == "png":
        mode = str(rng.choice(["RGB", "RGBA", "L", "P", "1", "LA"]))
        image.convert(mode).save(file, kind)
    elif kind == "jpeg":
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(0, 10))
        image.save(file, kind, exif=exif)
    else:
        image.save(file, kind)
    return file.getvalue()


def mask_bytes(rng: RNG) -> bytes:
    array, file = rng.integers(0, 6, (12, 17), np.uint8), io.BytesIO()
    image = Image.fromarray(array)
    if rng.random() < 0.3:
        image = Image.fromarray(array.astype(np.uint16))
    elif rng.random() < 0.5:
        image = Image.fromarray(array, "P")
        image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
    image.save(file, "png" if rng.random() < 0.7 else "tiff")
    return file.getvalue()


def npy_bytes(rng: RNG) -> bytes:
    file = io.BytesIO()
    np.save(file, rng.standard_normal((3, 8)).astype(np.float32))
    return file.getvalue()


def npz_bytes(rng: RNG) -> bytes:
    """Masks in a .npz, in half of them one header that lies: the archive's own checksums hide no damage then."""
    file, inner = io.BytesIO(), io.BytesIO()
    np.save(inner, rng.random((2, 6, 7)) > 0.5)
    data = inner.getvalue()
    if rng.random() < 0.5:
        data = damaged_text(rng, data)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("masks.npy", data)
    return file.getvalue()


def boxes_bytes(rng: RNG) -> bytes:
    simple = {"pictures": [{"file_name": "a", "width": 9, "height": 8, "boxes": [{"box": [0, 1, 4, 5], "name": "x"}]}]}
    coco = {
        "images": [{"id": 1, "file_name": "a", "width": 9, "height": 8}],
        "annotations": [{"image_id": 1, "category_id": 2, "bbox": [0, 1, 4, 5]}],
        "categories": [{"id": 2, "name": "x"}],
    }
    return json.dumps(simple if rng.random() < 0.5 else coco).encode()


def classes_bytes(rng: RNG) -> bytes:
    files = [b"cat\nsofa, couch\n# x\n", b'["cat", ["sofa", "couch"]]', b'{"cat": [], "sofa": ["couch"]}']
    return files[rng.integers(3)]


def dataset_bytes(rng: RNG) -> bytes:
    content = {"images": "i", "masks": "m", "names": ["a", ["b", "c"]], "unseen": ["b"], "ignore": [255]}
    return yaml.safe_dump({**content, "label_offset": 1} if rng.random() < 0.5 else content).encode()


def config_bytes(rng: RNG) -> bytes:
    return yaml.safe_dump({"method": "zegclip", "iterations": 5, "data": {"name": "voc20", "crop_size": 64}}).encode()


class Sound:
    """Sound weight files, made once."""

    def __init__(self, folder: Path) -> None:
        model = tiny_model("zegclip", class_names=list("abcdefg"))
        weights.save(model, folder / "ours.safetensors")
        state = {official: model.state_dict()[own] for own, official in weights.official_keys(model).items()}
        content = {"state_dict": state, "meta": {"best": np.float64(0.5), "PALETTE": np.zeros((2, 3))}}
        torch.save(content, folder / "zip.pth")
        torch.save(content, folder / "legacy.pth", _use_new_zipfile_serialization=False)
        run = write_checkpoint(folder, {"weights.a": torch.ones(3)}, {"iteration": 3}, keep=1)
        self.ours, self.zip, self.legacy, self.run = (
            path.read_bytes() for path in (folder / "ours.safetensors", folder / "zip.pth", folder / "legacy.pth", run)
        )


def damaged(rng: RNG, data: bytes) -> bytes:
    """Bytes with one to three kinds of damage."""
    kinds = (cut_off, changed, zeroed, repeated, moved, garbled_end, damaged_text)
    for _ in range(int(rng.integers(1, 4))):
        data = kinds[rng.integers(len(kinds))](rng, data)
    return data


def cut_off(rng: RNG, data: bytes) -> bytes:
    return data[: rng.integers(0, len(data) + 1)]


def changed(rng: RNG, data: bytes) -> bytes:
    new = bytearray(data)
    for _ in range(int(rng.integers(1, 20)) if new else 0):
        at = int(rng.integers(0, min(len(new), 400 if rng.random() < 0.5 else len(new))))
        new[at] = int(rng.integers(0, 256))
    return bytes(new)


def zeroed(rng: RNG, data: bytes) -> bytes:
    start = int(rng.integers(0, len(data) + 1))
    length = int(rng.integers(0, 100))
    return data[:start] + b"\0" * len(data[start : start + length]) + data[start + length :]


def repeated(rng: RNG, data: bytes) -> bytes:
    start, length = int(rng.integers(0, len(data) + 1)), int(rng.integers(0, 200))
    return data[: start + length] + data[start:]


def moved(rng: RNG, data: bytes) -> bytes:
    at = int(rng.integers(0, len(data) + 1))
    return data[at:] + data[:at]


def garbled_end(rng: RNG, data: bytes) -> bytes:
    return data + rng.integers(0, 256, int(rng.integers(1, 300)), np.uint8).tobytes()


def damaged_text(rng: RNG, data: bytes) -> bytes:
    """One number or word of the first kilobytes replaced by something a reader may not expect."""
    words = list(re.finditer(rb"[A-Za-z_]{2,}|\d+|[\[\]{},:]", data[:4000]))
    if not words:
        return data
    word = words[rng.integers(len(words))]
    return data[: word.start()] + NASTY[rng.integers(len(NASTY))] + data[word.end() :]


def lying_png(rng: RNG, data: bytes) -> bytes:
    """Another size in a PNG's header, its checksum right."""
    side = [int(rng.choice([0, 1, 7, 2000, 30_000, 2**31 - 1])) for _ in range(2)]
    header = struct.pack(">II", *side) + data[24:29]
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


def lying_safetensors(rng: RNG, data: bytes) -> bytes:
    """Something else in a safetensors file's header, its length right; in half of them in zs3fast's own part."""
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    if rng.random() < 0.7:
        content = json.loads(header)
        for name in content["__metadata__"]:
            content["__metadata__"][name] = lying_json(rng, content["__metadata__"][name])
        header = json.dumps(content).encode()
    else:
        header = damaged_text(rng, header)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def lying_json(rng: RNG, text: str) -> str:
    words = list(re.finditer(r"-?\d+(\.\d+)?|null|true|false|\"[^\"]*\"", text))
    word = words[rng.integers(len(words))]
    new = str(rng.choice(["10000000000", "1000000", "-1", "0", "0.5", "null", "[]", "{}", '"x"', "1e999", "[[]]", "{"]))
    return text[: word.start()] + new + text[word.end() :]


def open_described(path: Path) -> None:
    for folder in ("i", "m"):
        (path.parent / folder).mkdir(exist_ok=True)
    try:
        open_dataset(str(path), None, "val")
    except (ValueError, FileNotFoundError) as error:
        if "expected masks (" not in str(error) and "no folder" not in str(error):
            raise


def kinds(sound: Sound) -> list[tuple[str, Callable[[RNG], bytes], Callable[[Path], object]]]:
    """(file name, what makes a damaged one, its reader)"""

    def of(make: Callable[[RNG], bytes], *lies: Callable[[RNG, bytes], bytes]) -> Callable[[RNG], bytes]:
        def one(rng: RNG) -> bytes:
            data = make(rng)
            if lies and rng.random() < 0.6:
                return lies[rng.integers(len(lies))](rng, data)
            return damaged(rng, data)

        return one

    table: list[tuple[str, Callable[[RNG], bytes], Callable[[Path], object]]] = []
    for kind in "jpeg webp tiff gif bmp avif jpeg2000 ppm tga ico dds pcx".split():
        suffix = {"jpeg2000": "jp2"}.get(kind, kind)
        table.append((f"x.{suffix}", of(lambda rng, kind=kind: image_bytes(rng, kind)), read_image))
    table += [
        ("x.png", of(lambda rng: image_bytes(rng, "png"), lying_png), read_image),
        ("mask.png", of(mask_bytes), read_mask_file),
        ("regions.png", of(mask_bytes), mask_files),
        ("masks.npz", of(npz_bytes, lambda rng, data: data), mask_files),
        ("rows.npy", of(npy_bytes, damaged_text), load_text_embeddings),
        ("boxes.json", of(boxes_bytes, damaged_text), lambda path: box_file(path, "a", (8, 9))),
        ("classes.txt", of(classes_bytes), read_class_file),
        ("classes.json", of(classes_bytes, damaged_text), read_class_file),
        ("classes.csv", of(lambda rng: b'name\ncat\n"sofa, couch"\n'), read_class_file),
        ("ids.txt", of(lambda rng: b"a\nb.c\nd e\nf -1\n"), read_ids),
        ("ours.safetensors", of(lambda rng: sound.ours, lying_safetensors), weights.load),
        ("ours_2.safetensors", of(lambda rng: sound.ours, lying_safetensors), weights.load),
        ("zip.pth", of(lambda rng: sound.zip), weights.load_official),
        ("legacy.pth", of(lambda rng: sound.legacy), weights.load_official),
        ("iteration_00000003.safetensors", of(lambda rng: sound.run, lying_safetensors), read_checkpoint),
        ("dataset.yaml", of(dataset_bytes, damaged_text), open_described),
        ("config.yaml", of(config_bytes, damaged_text), lambda path: load_config(str(path), [])),
    ]
    return table


def status(key: str) -> int:
    """A line of /proc/self/status in kB."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def fail(seed: int, index: int, name: str, data: bytes, folder: Path, what: str) -> None:
    kept = folder / f"failed_{seed}_{index}_{name}"
    kept.write_bytes(data)
    traceback.print_exc()
    sys.exit(f"seed {seed}, file {index} ({name}, {len(data)} bytes, kept as {kept}): {what}")


def read_all(seed: int, count: int, folder: Path) -> None:
    """Read `count` damaged files, one at a time."""
    table = kinds(Sound(folder))
    refused = 0
    held = status("VmRSS")
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        name, make, read = table[index % len(table)]
        data = make(rng)
        path = folder / "in" / name
        path.write_bytes(data)
        try:
            read(path)
        except USER_ERRORS as error:
            refused += 1
            if path.name not in str(error):
                fail(seed, index, name, data, folder, f"the message does not name the file: {error!r}")
            if len(first_line(error)) > 800:
                fail(seed, index, name, data, folder, "the message is too long")
        except BaseException as error:
            fail(seed, index, name, data, folder, f"no error for a user: {error!r}")
        if status("VmHWM") - held > MOST_MEMORY:
            fail(seed, index, name, data, folder, f"{status('VmHWM') - held} kB more than before")
        path.unlink()
    print(f"seed {seed}: {count} files, {refused} refused, {status('VmHWM') - held} kB")


def segment_all(seed: int, count: int, folder: Path) -> None:
    """Segment a folder of damaged images at once: the run reaches its end and writes nothing outside its folder."""
    rng = np.random.default_rng([seed, 2**20])
    place, out = folder / "photos", folder / "out"
    place.mkdir()
    whole: list[str] = []
    for index in range(count):
        kind = str(rng.choice(["jpeg", "png", "tiff", "gif", "webp", "bmp"]))
        data = image_bytes(rng, kind)
        name = f"{['..', 'a', '猫' * 20, '.b', 'c_d', '-x'][index % 6]}{index if index % 6 else ''}.{kind}"
        sound = rng.random() < 0.3
        whole += [name] if sound and index % 6 else []
        (place / name).write_bytes(data if sound else damaged(rng, data))
    before = {path for path in folder.rglob("*") if "cache" not in path.parts}
    options = ["-w", "zs3fast-tiny", "-c", "red circle, sky", "-o", str(out)]
    result = CliRunner().invoke(app, ["segment", str(place), str(place / "...jpeg"), *options])
    if result.exit_code not in (0, 1) or "Traceback" in result.output or "images segmented" not in result.output:
        sys.exit(f"seed {seed}: segment ended with {result.exit_code}: {result.output[-2000:]} {result.exception!r}")
    if f"failed {place}/" in result.output:
        failed = [name for name in whole if f"failed {place / name}:" in " ".join(result.output.split())]
        if failed:
            sys.exit(f"seed {seed}: sound images failed: {failed}: {result.output[-2000:]}")
    after = {path for path in folder.rglob("*") if "cache" not in path.parts and out not in (path, *path.parents)}
    if after != before:
        sys.exit(f"seed {seed}: files appeared or went outside the output folder: {sorted(after ^ before)}")
    print(result.output.splitlines()[-1])


def main(arguments: list[str]) -> None:
    seed, count, folder = int(arguments[0]), int(arguments[1]), Path(arguments[2])
    warnings.simplefilter("ignore")
    os.environ["ZS3FAST_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    (folder / "in").mkdir(parents=True, exist_ok=True)
    read_all(seed, count, folder)
    segment_all(seed, max(6, count // 20), folder)


if __name__ == "__main__":
    main(sys.argv[1:])
