"""Datasets of one's own: a YAML file, or register_dataset; what train, eval, data check and segment make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.data.trees import picture, stripes, write_image
from tests.tiny import tiny_model
from zs3fast import weights
from zs3fast.cli import app
from zs3fast.data import class_pixels, open_dataset, register_dataset
from zs3fast.data.voc import voc20
from zs3fast.training.config import load_config
from zs3fast.training.setup import open_data

NAMES = ["road", ["sofa", "couch"], "traffic light"]
COLOURS = [[128, 0, 0], [0, 128, 0], [0, 0, 128]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def own(place: Path, values: tuple[int, ...] = (0, 1, 2, 3, 255), **settings: object) -> Path:
    """A dataset of two training pairs and a test pair, images of mixed formats, and its description."""
    for number, (split, name) in enumerate([("train", "a.jpg"), ("train", "b.c.png"), ("val", "d.jpg")]):
        write_image(place / "data/images" / split / name, picture(number, (8, 20)))
        write_image(place / "data/masks" / split / f"{name[:-4]}.png", stripes(values, (8, 20)))
    content = {"root": "data", "images": "images/{split}", "masks": "masks/{split}", "names": NAMES, **settings}
    path = place / "streets.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def row(labels: np.ndarray) -> list[int]:
    return labels[0, ::4].tolist()


def test_a_description_in_a_file(tmp_path: Path) -> None:
    path = own(tmp_path, label_offset=1, unseen=["couch"])
    dataset = open_dataset(str(path), None, "train")
    assert dataset.ids == ["a", "b.c"] and dataset.class_names == ["road", "sofa", "traffic light"]
    assert dataset.classes == [("road",), ("sofa", "couch"), ("traffic light",)]
    assert dataset.unseen == [1] and dataset.seen == [0, 2] and dataset.ignore_index == 255
    assert row(dataset[0].labels) == [255, 0, 1, 2, 255]
    assert dataset.image_path(1).name == "b.c.png" and dataset[1].image.shape == (8, 20, 3)
    assert open_dataset(str(path), None, "val").ids == ["d"]
    assert open_dataset(str(path), tmp_path / "data", "val").ids == ["d"]


def test_values_are_labels_unless_told(tmp_path: Path) -> None:
    dataset = open_dataset(str(own(tmp_path, (0, 1, 2, 2, 255))), None, "val")
    assert row(dataset[0].labels) == [0, 1, 2, 2, 255]
    dataset = open_dataset(str(own(tmp_path, (0, 1, 2, 9, 200), ignore=[9, 200])), None, "val")
    assert row(dataset[0].labels) == [0, 1, 2, 255, 255]
    dataset = open_dataset(str(own(tmp_path, (0, 1, 2, 9, 200))), None, "val")
    with pytest.raises(ValueError, match="d.png: expected labels of .*streets.yaml, got 9"):
        dataset[0]


def test_masks_in_colours(tmp_path: Path) -> None:
    path = own(tmp_path, palette=COLOURS, ignore=[[0, 0, 0]])
    colours = np.array([*COLOURS, [0, 0, 0], COLOURS[0]], np.uint8)
    write_image(tmp_path / "data/masks/val/d.png", colours[stripes((0, 1, 2, 3, 4), (8, 20))])
    dataset = open_dataset(str(path), None, "val")
    assert row(dataset[0].labels) == [0, 1, 2, 255, 0]
    assert class_pixels(dataset) == [{0: 64, 1: 32, 2: 32}]
    indexed = Image.fromarray(stripes((0, 1, 2, 3, 0), (8, 20)), "P")  # the same colours as a palette image
    indexed.putpalette(colours[:4].ravel().tolist())
    indexed.save(tmp_path / "data/masks/val/d.png")
    assert row(open_dataset(str(path), None, "val")[0].labels) == [0, 1, 2, 255, 0]
    write_image(tmp_path / "data/masks/val/d.png", np.full((8, 20, 3), 77, np.uint8))
    with pytest.raises(ValueError, match=r"d.png: expected colours of .*, got \[77, 77, 77\]"):
        open_dataset(str(path), None, "val")[0]


def test_lists_name_the_pairs(tmp_path: Path) -> None:
    path = own(tmp_path, lists={"train": "train.txt"})
    (tmp_path / "data/train.txt").write_text("b.c\n")
    assert open_dataset(str(path), None, "train").ids == ["b.c"]
    (tmp_path / "data/train.txt").write_text("b.c\nnone\n")
    with pytest.raises(FileNotFoundError, match="streets.yaml train: no file .*none.jpg"):
        open_dataset(str(path), None, "train")


def test_folders_by_split(tmp_path: Path) -> None:
    path = own(tmp_path, images={"val": "images/val"}, masks={"val": "masks/val"})
    assert open_dataset(str(path), None, "val").ids == ["d"]
    with pytest.raises(ValueError, match="streets.yaml: images: expected one for the split train, got none"):
        open_dataset(str(path), None, "train")


def test_more_than_255_classes_take_16_bits(tmp_path: Path) -> None:
    path = own(tmp_path, names=[f"class {index}" for index in range(300)], ignore=65535)
    write_image(tmp_path / "data/masks/val/d.png", stripes((0, 255, 299, 65535), (8, 20), np.uint16))
    dataset = open_dataset(str(path), None, "val")
    assert dataset.ignore_index == 65535 and set(dataset[0].labels[0].tolist()) == {0, 255, 299, 65535}


def test_registered_names(tmp_path: Path) -> None:
    register_dataset("streets", own(tmp_path))
    assert open_dataset("streets", None, "val").name == "streets"
    content = yaml.safe_load((tmp_path / "streets.yaml").read_text())
    register_dataset("streets", {**content, "unseen": [0]})
    assert open_dataset("streets", tmp_path / "data", "val").unseen == [0]
    register_dataset("my_voc", voc20)
    with pytest.raises(ValueError, match="root: expected the folder of my_voc"):
        open_dataset("my_voc", None, "val")
    with pytest.raises(ValueError, match="name: expected one of .*streets.*did you mean streets"):
        open_dataset("street", None, "val")
    for name in ("voc20", "world", "", "a.yaml"):
        with pytest.raises(ValueError, match="name: expected a new name for a dataset"):
            register_dataset(name, content)


BAD = {
    "unknown key 'mask', expected .*did you mean masks": {"mask": "x"},
    "expected images, names too, got none": {"images": None, "names": None},
    "names: expected a list of class names": {"names": "road, sofa"},
    "names: expected names, got True; put it in quotes": {"names": ["road", True]},
    "names: 'Road' is given twice": {"names": ["road", "Road"]},
    "unseen: expected names of the list or 0..2, got 'cat'": {"unseen": ["cat"]},
    "unseen: expected names of the list or 0..2, got 3": {"unseen": [3]},
    "ignore: expected mask values 0..65535, got -1": {"ignore": [-1]},
    "ignore: expected labels of no class, got 1, 'sofa'": {"ignore": 1},
    "label_offset: expected the first class's value": {"label_offset": "one"},
    r"palette: expected \[red, green, blue\] for each of 3 names": {"palette": COLOURS[:2]},
    r"palette: expected different colours, got \[128, 0, 0\] twice": {"palette": [COLOURS[0], *COLOURS[:2]]},
    "images: expected a path, with {split} in it": {"images": 5},
    "masks: expected train and val, got 'test'": {"masks": {"test": "x"}},
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_names_the_file_and_the_key(tmp_path: Path, message: str) -> None:
    path = own(tmp_path, **BAD[message])
    with pytest.raises(ValueError, match=f"dataset: .*streets.yaml: {message}"):
        open_dataset(str(path), None, "val")


@pytest.mark.parametrize("data", [b"names: [", b"caf\xe9: 1", b"- a", b"", b"a: &x [*x]", b"\0"])
def test_files_that_are_no_descriptions(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.yaml").write_bytes(data)
    with pytest.raises(ValueError, match="bad.yaml"):
        open_dataset(str(tmp_path / "bad.yaml"), None, "val")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_every_command_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = own(tmp_path, (0, 1, 2, 2, 255), unseen=["sofa"])
    for arguments in ((path,), (tmp_path / "data", "--dataset", path)):
        output = run("data", "check", *arguments)
        assert "train" in output and "3 of 3" in output and "20.0 %" in output
    names = ["road", "sofa", "traffic light"]
    weights.save(tiny_model("zegclip", class_names=names, num_classes=3, seen=[0, 2]), tmp_path / "m.safetensors")
    np.save(tmp_path / "rows.npy", torch.nn.functional.normalize(torch.randn(3, 32)).numpy())
    common = ("--weights", "m.safetensors", "--dataset", path, "--text-embeddings", "rows.npy")
    assert "mIoU(U)" in run("eval", *common, "-o", "report", "--worst", 0)
    output = run("segment", tmp_path / "data/images/val/d.jpg", *common, "-o", "out")
    assert "1 of 1 images segmented" in output
    overrides = [f"data.name={path}", "data.split=train"]
    assert open_data(load_config("zegclip_voc20_inductive", overrides)).ids == ["a", "b.c"]
