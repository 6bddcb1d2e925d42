"""The first commands of a new user: no weights, no network, short class lists; help at once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import zs3fast
from tests.inference.test_segmenter import photo
from tests.tiny_clip import CONFIG, tiny_clip
from zs3fast.cli import ELSEWHERE, app, load_command
from zs3fast.inference import loading
from zs3fast.inference.segmenter import Segmenter
from zs3fast.text.background import BACKGROUND, background_for
from zs3fast.text.competing_names import BACKGROUND_NAMES


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo(60, 80)).save(tmp_path / "photo.jpg")
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://nowhere.invalid")


@pytest.fixture
def tiny_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The default method on a small CLIP, out of a file."""
    torch.save(tiny_clip().state_dict(), tmp_path / "clip.pt")
    monkeypatch.setattr(loading, "DEFAULT_CLIP", CONFIG)
    monkeypatch.setattr(loading, "DEFAULT_PRETRAINED", str(tmp_path / "clip.pt"))
    return tmp_path / "clip.pt"


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.mark.usefixtures("offline")
def test_without_network_it_fails_at_once_in_one_line() -> None:
    start = time.perf_counter()
    output = run("segment", "photo.jpg", "--classes", "cat, grass", code=2)
    assert time.perf_counter() - start < 20, "of which most is importing open_clip"
    assert output.startswith("error --pretrained: ") and "'openai' of ViT-B-16" in output
    for way in ("HF_HUB_OFFLINE=1", "--pretrained FILE", "zs3fast demo"):
        assert way in output
    with pytest.raises(ValueError, match="'openai' of ViT-B-16 are not on this machine"):
        Segmenter()


def test_the_default_is_a_method_without_training(tiny_default: Path) -> None:
    output = run("segment", "photo.jpg", "--classes", "cat, grass")
    assert "untrained" not in output and "1 of 1 images segmented" in output
    assert "scclip segments, which needs no training" in output and loading.DEFAULT_METHOD == "scclip"
    segmenter = Segmenter(class_names="cat, grass", device="cpu")
    assert segmenter.model.method == loading.DEFAULT_METHOD and segmenter.model.weights_loaded
    expected = segmenter("photo.jpg").labels
    assert np.array_equal(np.asarray(Image.open("zs3fast_out/photo_labels.png")), expected)


def test_random_weights_only_when_asked_for(place: Path) -> None:
    for more in ((), ("--pretrained", "openai")):
        output = run("segment", "photo.jpg", "-c", "cat", "--method", "zegclip", *more, code=2)
        assert "zegclip learns from masks" in output and "--untrained" in output
    assert not (place / "zs3fast_out").exists()


@pytest.mark.usefixtures("tiny_default")
def test_a_short_list_that_covers_a_photo_gets_a_note() -> None:
    assert "every pixel of photo.jpg went to one of 2 classes" in run("segment", "photo.jpg", "-c", "cat, moon")
    for more in (("--background", "auto"), ("--min-score", "0.9")):
        assert "every pixel" not in run("segment", "photo.jpg", "-c", "cat, moon", *more)
    names = ", ".join(f"thing {index}" for index in range(12))
    assert "every pixel" not in run("segment", "photo.jpg", "-c", names)


@pytest.mark.usefixtures("tiny_default")
def test_the_automatic_background_competes_and_stays_unlabelled() -> None:
    segmenter = Segmenter()
    result = segmenter("photo.jpg", "cat, sky", background="auto")
    others = [words[0] for words in BACKGROUND if words[0] != "sky"]
    expected = segmenter("photo.jpg", ["cat", "sky", *others]).labels
    assert result.class_names == ("cat", "sky") and (expected > 1).any()
    np.testing.assert_array_equal(result.labels, np.where(expected > 1, -1, expected))
    assert segmenter("photo.jpg", "cat, auto", background=["auto"]).class_names == ("cat", "auto"), "a car, in a list"


@pytest.mark.parametrize(
    ("asked", "gone"),
    [
        (("cat",), set()),
        (("Sky",), {"sky"}),
        (("couch", "clouds"), {"cloud"}),
        (("stairs", "shelves", "streets"), {"stair", "shelf", "road"}),
        (("beach", "water"), {"sands", "sea", "river"}),
        (("grass",), {"grass"}),
    ],
)
def test_a_users_names_and_their_synonyms_leave_the_background(asked: tuple[str, ...], gone: set[str]) -> None:
    left = {entry[0] for entry in background_for([(name,) for name in asked])}
    assert left == {words[0] for words in BACKGROUND} - gone
    assert background_for([("thing", *asked)]) == background_for([(name,) for name in asked])


def test_the_background_is_the_published_one() -> None:
    assert tuple(words[0] for words in BACKGROUND) == tuple(BACKGROUND_NAMES)


def test_the_small_models_say_what_they_know_without_a_class_list_too() -> None:
    output = run("segment", "photo.jpg", "--weights", "zs3fast-tiny")
    assert "zs3fast-tiny has seen painted scenes alone; photographs need other weights" in output


def test_the_overlay_without_legend_and_fainter(tiny_default: Path) -> None:
    run("segment", "photo.jpg", "-c", "cat, moon", "--no-legend", "--blend", "0")
    assert np.array_equal(np.asarray(Image.open("zs3fast_out/photo_overlay.png")), np.asarray(Image.open("photo.jpg")))
    assert "Invalid value for '--blend'" in run("segment", "photo.jpg", "-c", "cat", "--blend", "2", code=2)


def test_short_options() -> None:
    assert run("-h") == run("--help")
    assert "Example: zs3fast segment" in run("segment", "-h")
    assert run("--version") == f"zs3fast {zs3fast.__version__}"


@pytest.mark.parametrize("name", list(ELSEWHERE))
def test_commands_elsewhere_are_announced_as_they_are(name: str) -> None:
    command = load_command(name)
    assert (command.help or "").splitlines()[0] == ELSEWHERE[name].help
    assert ELSEWHERE[name].help in run("--help") and f"zs3fast {name}" in run(name, "--help")


def test_help_and_version_import_no_torch() -> None:
    """What makes them answer at once; clocks differ."""
    for arguments in (["--help"], ["--version"], ["segment", "-h"], ["train", "-h"], ["convert", "-h"]):
        code = (
            "import sys; sys.argv = ['zs3fast', *sys.argv[1:]]; from zs3fast.cli import app\n"
            "try: app()\n"
            "except SystemExit: pass\n"
            "assert not {'torch', 'numpy', 'PIL', 'open_clip'} & set(sys.modules), sorted(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=60, capture_output=True)


def test_importing_the_segmenter_costs_what_torch_costs() -> None:
    code = "import sys, zs3fast.segmenter; assert not {'open_clip', 'transformers', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_packed_model_runs_without_open_clip_and_the_compiler() -> None:
    """They took 2 s and 330 MB, for nothing: the tower is ours, and sizes are compared on the meta device."""
    code = (
        "import sys, numpy as np, zs3fast; s = zs3fast.Segmenter.from_pretrained('zs3fast-tiny');"
        "s(np.zeros((40, 40, 3), np.uint8), 'sky, red circle');"
        "found = {'open_clip', 'transformers', 'timm', 'torch._dynamo', 'sympy'} & set(sys.modules); assert not found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_front_door_is_listed() -> None:
    assert set(zs3fast.__all__) <= set(dir(zs3fast))
    code = "import zs3fast, sys; assert 'Segmenter' in dir(zs3fast) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    code = "import torch, zs3fast; torch.ops.zs3fast.masks_to_labels"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
