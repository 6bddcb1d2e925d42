"""Names in any script can be told apart in a legend, on a machine with fonts and on one without."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from zs3fast.utils import fonts, rendering

NAMES = ["猫", "狗", "é", "ä", "ł", "cat"]


@pytest.fixture
def _no_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fonts, "_fonts", lambda: ())
    yield


def drawn(name: str) -> bytes:
    font, text = fonts.font_for(name, 20)
    image = Image.new("L", (200, 40))
    ImageDraw.Draw(image).text((5, 20), text, fill=255, font=font, anchor="lm")
    return image.tobytes()


def test_names_look_different() -> None:
    assert len({drawn(name) for name in NAMES}) == len(NAMES)


@pytest.mark.usefixtures("_no_fonts")
def test_without_fonts_numbers_stand_for_characters() -> None:
    assert fonts.font_for("猫", 20)[1] == "U+732B" and fonts.font_for("a cat", 20)[1] == "a cat"
    assert len({drawn(name) for name in NAMES}) == len(NAMES)


def test_a_font_of_the_machine_writes_what_pillows_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [path for path in fonts._fonts() if "DejaVuSans.ttf" in path]
    if not found:
        pytest.skip("no DejaVu Sans on this machine")
    for name in ("é", "ł", "Žluťoučký kůň"):
        font, text = fonts.font_for(name, 20)
        assert text == name
        lacking = bytes(font.getmask("\U0010ffff"))
        assert all(bytes(font.getmask(character)) != lacking for character in name if character != " ")


def test_both_spellings_of_an_accent_look_alike() -> None:
    assert drawn("e\u0301") == drawn("\u00e9")


def test_a_broken_font_file_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broken = tmp_path_factory.mktemp("fonts") / "a.ttf"
    broken.write_bytes(b"no font")
    monkeypatch.setattr(fonts, "_fonts", lambda: (str(broken),))
    assert fonts.font_for("猫", 20)[1] == "U+732B"


@pytest.mark.usefixtures("_no_fonts")
def test_the_legend_tells_two_chinese_classes_apart() -> None:
    image, labels = np.zeros((200, 200, 3), np.uint8), np.zeros((200, 200), int)
    labels[:100] = 1
    one, other = (np.asarray(rendering.overlay(image, labels, names)) for names in (["猫", "狗"], ["狗", "猫"]))
    assert one.shape != other.shape or (one[:, 200:] != other[:, 200:]).any()
    assert isinstance(fonts.font_for("x", 12)[0], ImageFont.FreeTypeFont | ImageFont.ImageFont)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_blend_and_no_legend(blend: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (700, 500, 3), np.uint8)  # larger than a strip
    labels = np.random.default_rng(1).integers(-1, 3, (700, 500))
    got = np.asarray(rendering.overlay(image, labels, ["a", "b", "c"], legend=False, blend=blend))
    colours = rendering.palette(3).astype(np.float32)[labels]
    expected = np.where(labels[..., None] < 0, image, (1 - blend) * image + blend * colours)
    assert got.shape == image.shape and np.abs(got - expected).max() <= 0.51
    with pytest.raises(ValueError, match=r"blend: expected a share in 0..1, got 1.5"):
        rendering.overlay(image, labels, ["a", "b", "c"], blend=1.5)
