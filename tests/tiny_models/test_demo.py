"""The demo on models that were hardly trained: what it prints and draws, not how well they do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tools.world.build import MASKCLIP, pack_base, pack_model
from tools.world.contrastive import load_contrastive_config
from zs3fast import create_model
from zs3fast.cli import app
from zs3fast.data.world import WorldDataset
from zs3fast.data.world.vocabulary import COLOURS
from zs3fast.tiny.drawing import class_colours, comparison
from zs3fast.tiny.scoring import TrueRegions
from zs3fast.utils.rendering import cielab
from zs3fast.weights.files import METADATA_KEY
from zs3fast.weights.packing import BASE, packed_models, packed_path, save_on_base


@pytest.fixture(scope="session")
def packed(clip: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two packed models."""
    folder = tmp_path_factory.mktemp("packed")
    pack_base(clip, folder / BASE)
    pack_model(run, packed_path(folder, "tagclip"), folder / BASE)
    plain = create_model("maskclip", clip=load_contrastive_config().clip, **MASKCLIP)
    save_on_base(plain, packed_path(folder, "maskclip"), folder / BASE, (), METADATA_KEY)
    return folder


def test_demo(packed: Path, tmp_path: Path) -> None:
    assert set(packed_models(packed)) == {"maskclip", "tagclip"}
    done = CliRunner().invoke(app, ["demo", "--models", str(packed), "-o", str(tmp_path), "--scenes", "2"])
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in ("2 scenes,", "maskclip", "tagclip", "mIoU(U)", "hIoU"))
    with Image.open(tmp_path / "demo.png") as picture:
        scene = np.asarray(picture.convert("RGB"))[35:175, 4:145]
        assert picture.width > 900 and len(np.unique(scene.reshape(-1, 3), axis=0)) > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--scenes", "0"], "--scenes: expected 1..1000, got 0"), (["--models", "nowhere"], "--models: nowhere holds no")],
)
def test_demo_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "-o", str(tmp_path), *arguments])
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_regions_are_found_by_the_picture_s_name() -> None:
    scenes = WorldDataset("val", length=3)
    found = TrueRegions(scenes)([scenes[1].image], [str(scenes.image_path(1))])
    assert found.original_sizes == ((96, 96),) and bool(found.valid.all())
    assert found.masks.shape[1] >= len(np.unique(scenes.read_labels(1)))
    with pytest.raises(ValueError, match="names: expected an image of world val each"):
        TrueRegions(scenes)([scenes[1].image], ["photo.png"])


def test_the_picture_shows_truth_predictions_and_outlines() -> None:
    truth = np.zeros((32, 32), np.int64)
    truth[8:24, 8:24] = 2
    wrong = np.where(truth == 2, 1, truth)
    image = np.full((32, 32, 3), 90, np.uint8)
    sheet = np.asarray(comparison([(image, truth, [truth, wrong])], ["a", "b"], ["sand", "star", "ring"], [2]))
    panels = [sheet[30:180, i * 158 : i * 158 + 150] for i in range(4)]
    middle = [tuple(panel[75, 75]) for panel in panels]
    assert middle[0] == (90, 90, 90) and middle[1] == middle[2] != middle[3]
    for panel in panels[1:]:
        assert (panel[70, 30:45] == 0).all(-1).any(), "the unseen region has no outline"
    assert not (panels[0] == 0).any()
    legend, colours = sheet[204:], class_colours(("sand", "star", "ring"))
    for colour in colours:
        assert (legend == colour).all(-1).sum() > 100, "a class that is there or was predicted is not in the legend"


def test_colours_do_not_contradict_names() -> None:
    names = tuple(WorldDataset("test").class_names)
    colours = class_colours(names).astype(float)
    shades = cielab(colours)
    assert len({tuple(colour) for colour in colours}) == len(names)
    for name, shade in zip(names, shades, strict=True):
        (said,) = (word for word in COLOURS if word in name.split())
        away = {word: np.linalg.norm(shade - cielab(np.array([rgb], float))[0]) for word, rgb in COLOURS.items()}
        chroma = np.linalg.norm(shade[1:])
        assert chroma < 10 if said == "white" else min(away, key=away.get) == said and chroma > 25, (name, shade)
