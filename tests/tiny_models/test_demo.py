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
from zs3fast.tiny.picture import comparison
from zs3fast.tiny.scoring import TrueRegions
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
        scene = np.asarray(picture.convert("RGB"))[30:200, 4:170]
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
    with pytest.raises(ValueError, match="names: expected a picture of world val each"):
        TrueRegions(scenes)([scenes[1].image], ["photo.png"])


def test_the_picture_shows_truth_predictions_and_outlines() -> None:
    truth = np.zeros((32, 32), np.int64)
    truth[8:24, 8:24] = 2
    wrong = np.where(truth == 2, 1, truth)
    image = np.full((32, 32, 3), 90, np.uint8)
    sheet = np.asarray(comparison([(image, truth, [truth, wrong])], ["a", "b"], ["sand", "star", "ring"], [2]))
    panels = [sheet[26:218, i * 200 : i * 200 + 192] for i in range(4)]
    middle = [tuple(panel[96, 96]) for panel in panels]
    assert middle[0] == (90, 90, 90) and middle[1] == middle[2] != middle[3]
    for panel in panels[1:]:
        assert (panel[88, 40:50] == 255).all(-1).any(), "the unseen region has no outline"
    assert not (panels[0] == 255).any()
