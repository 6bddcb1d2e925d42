"""The page in a real Chromium: upload, type, the right pixels change colour, hover, toggle, save; names stay text."""

from __future__ import annotations

import io
import json
import shutil
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'zs3fast[app]'")
httpx = pytest.importorskip("httpx", reason="gradio is not installed: pip install 'zs3fast[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from zs3fast.app import page as pages  # noqa: E402
from zs3fast.app.desk import Desk  # noqa: E402
from zs3fast.app.models import offered  # noqa: E402
from zs3fast.app.scenes import example_scenes  # noqa: E402
from zs3fast.inference.limits import Limits  # noqa: E402
from zs3fast.utils.rendering import palette  # noqa: E402

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODEL, OTHER = "zs3fast-tiny-clip_rc", "zs3fast-tiny-zegclip"


@dataclass
class Shown:
    """A page in a browser, what answers it, and whom anybody spoke to."""

    browser: Any
    desk: Desk
    address: str
    strangers: list[str] = field(default_factory=list)

    def open(self) -> Any:
        page = self.browser.new_page(viewport={"width": 1280, "height": 1100})
        page.set_default_timeout(30_000)
        page.on("request", self._note)
        page.goto(self.address)
        page.wait_for_selector(".zs3-chip")
        return page

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.strangers.append(request.url)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    folder = tmp_path_factory.mktemp("app")
    desk = Desk(offered(), Limits(max_bytes=2**20))
    strangers: list[str] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            strangers.append(str(address))
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of gradio's own calls
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        patch.setattr(socket.socket, "connect", watched)
        built = pages.build(desk, folder)
        address = pages.launch(built, "127.0.0.1", None, desk.limits.max_bytes)
        with playwright.sync_playwright() as runner:
            browser = runner.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            yield Shown(browser, desk, address, strangers)
            browser.close()
        built.close(verbose=False)
    assert strangers == []  # neither the server nor the browser asked anyone else for anything


def colours(page: Any, view: int = 0) -> np.ndarray:
    """What a view shows, uint8 [H, W, 3]."""
    data = page.locator(".zs3-stage").nth(view).screenshot()
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def look(page: Any, name: str, value: float) -> None:
    page.locator(f"#zs3-{name} input[type=number]").fill(str(value))
    page.locator(f"#zs3-{name} input[type=number]").press("Enter")


def generation(page: Any) -> str | None:
    found: str | None = page.locator(".zs3-viewer").get_attribute("data-generation")
    return found


def changed(page: Any, before: str | None) -> None:
    page.wait_for_function("before => document.querySelector('.zs3-viewer').dataset.generation !== before", arg=before)
    page.wait_for_timeout(1500)  # a second change of the same edit


def type_words(page: Any, text: str) -> None:
    page.locator("#zs3-words input").fill(text)
    page.locator("#zs3-words input").press("Enter")


def upload(page: Any, path: Path) -> None:
    page.locator("#zs3-image button[aria-label='Remove Image'], #zs3-image button[aria-label='Clear']").first.click()
    page.locator("#zs3-image input[type=file]").set_input_files(str(path))


def toast(page: Any) -> str:
    found = page.locator(".toast-body").last
    found.wait_for()
    return str(found.inner_text())


def middle(labels: np.ndarray, index: int) -> tuple[float, float]:
    """A place (y, x) in 0..1 well within a class, by the distance from its border."""
    import cv2

    inside = cv2.distanceTransform(np.pad((labels == index).astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(inside.argmax()), labels.shape)
    assert inside[y, x] > 6
    return (y + 0.5) / labels.shape[0], (x + 0.5) / labels.shape[1]


def at(pixels: np.ndarray, place: tuple[float, float]) -> np.ndarray:
    y, x = int(place[0] * pixels.shape[0]), int(place[1] * pixels.shape[1])
    return np.asarray(pixels[y - 1 : y + 2, x - 1 : x + 2].astype(float).mean((0, 1)))


def test_an_upload_and_words_colour_the_right_pixels(shown: Shown, tmp_path: Path) -> None:
    path, names = example_scenes(tmp_path)[2]
    page, before = shown.open(), None
    page.locator(
        "#zs3-words button[title='Clear'], #zs3-words .token-remove.remove-all, #zs3-words .remove-all"
    ).first.click()
    page.wait_for_function("() => document.querySelectorAll('.zs3-chip').length === 0")
    upload(page, path)
    before = generation(page)
    type_words(page, ", ".join(names))  # several at once become a chip each
    page.wait_for_selector(".zs3-chip")
    changed(page, before)
    expected = shown.desk.segment(path.read_bytes(), names, False, MODEL)
    look(page, "blend", 1)
    page.wait_for_timeout(300)
    pixels = colours(page)
    found = [index for index in range(len(names)) if (expected.labels == index).sum() > 2000]
    assert len(found) >= 3
    for index in found:
        place = middle(expected.labels, index)
        assert np.abs(at(pixels, place) - palette(len(names))[index]).max() <= 3, names[index]
    look(page, "blend", 0)
    page.wait_for_timeout(300)
    place = middle(expected.labels, found[0])
    photo = expected.image[int(place[0] * len(expected.image)), int(place[1] * expected.image.shape[1])]
    assert np.abs(at(colours(page), place) - photo).max() < 40  # the photo alone, resampled
    page.close()


def test_hover_toggle_threshold_and_save(shown: Shown, tmp_path: Path) -> None:
    page = shown.open()
    page.wait_for_timeout(1000)
    path, names = example_scenes(tmp_path)[0]
    expected = shown.desk.segment(path.read_bytes(), names, False, MODEL)
    encoded = shown.desk.encoded
    index = int(np.bincount(expected.labels.ravel()).argmax())
    place = middle(expected.labels, index)
    box = page.locator(".zs3-stage").bounding_box()
    score = expected.scores[int(place[0] * expected.labels.shape[0]), int(place[1] * expected.labels.shape[1])]

    def hover() -> str:
        page.mouse.move(5, 5)
        page.mouse.move(box["x"] + place[1] * box["width"], box["y"] + place[0] * box["height"])
        return str(page.locator(".zs3-tip").inner_text())

    tip = hover().split("\n")
    assert tip[0] == names[index] and abs(float(tip[1]) - score) < 0.02
    look(page, "threshold", min(0.99, round(float(score), 2) + 0.02))
    page.wait_for_timeout(300)
    assert hover().startswith("unlabelled")
    look(page, "threshold", 0)
    chip = page.locator(".zs3-chip", has_text=names[index])
    chip.click()
    page.mouse.move(5, 5)
    look(page, "blend", 1)
    page.wait_for_timeout(300)
    assert hover().startswith("unlabelled")
    assert np.abs(at(colours(page), place) - palette(len(names))[index]).max() > 40
    with page.expect_download() as download:
        page.locator("#zs3-save-1").click()
    labels = np.asarray(Image.open(download.value.path()))
    assert download.value.suggested_filename.endswith("_labels.png")
    assert (labels == np.where(expected.labels == index, 255, expected.labels)).all()  # what is shown
    with page.expect_download() as download:
        page.locator("#zs3-save-2").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["classes"][index]["pixels"] == 0 and saved["unlabelled_pixels"] == (expected.labels == index).sum()
    chip.click()
    assert not hover().startswith("unlabelled")
    assert shown.desk.encoded == encoded  # none of this needed the encoder
    page.close()


def test_words_are_changed_without_the_encoder_and_models_are_compared(shown: Shown) -> None:
    page = shown.open()
    page.wait_for_timeout(1000)
    encoded, before = shown.desk.encoded, generation(page)
    type_words(page, "red bricks")
    changed(page, before)
    assert page.locator("#zs3-words").get_by_text("red bricks", exact=True).count() == 1
    assert shown.desk.encoded == encoded
    before = generation(page)
    page.locator("#zs3-other input").click()
    page.get_by_role("option", name=OTHER).click()
    changed(page, before)
    assert page.locator(".zs3-stage").count() == 2 and shown.desk.encoded == encoded + 1
    assert page.locator(".zs3-title").all_inner_texts() == [MODEL, OTHER]
    first, second = colours(page, 0), colours(page, 1)
    assert first.shape == second.shape and (first != second).any()
    page.close()


def test_a_scene_brings_its_words(shown: Shown, tmp_path: Path) -> None:
    page = shown.open()
    page.wait_for_timeout(1000)
    _, names = example_scenes(tmp_path)[4]
    before = generation(page)
    page.locator("#zs3-scenes button.thumbnail-item, #zs3-scenes .gallery-item button").nth(4).click()
    changed(page, before)
    page.wait_for_timeout(1000)
    assert sorted(page.locator(".zs3-chip .zs3-name").all_inner_texts()) == sorted(names)
    page.close()


def test_names_are_never_html(shown: Shown) -> None:
    page = shown.open()
    page.wait_for_timeout(1000)
    name, before = '<img src=x onerror="window.owned=1"><b>bold</b>', generation(page)
    type_words(page, name)
    changed(page, before)
    page.locator("#zs3-words").get_by_text(name, exact=True).wait_for()
    page.locator("#zs3-words button.remove-all, #zs3-words .remove-all").first.click()
    page.wait_for_function("() => document.querySelectorAll('.zs3-chip').length === 0")
    type_words(page, name)  # alone on the list it has every pixel
    page.wait_for_selector(".zs3-chip")
    assert page.locator(".zs3-chip .zs3-name").all_inner_texts() == [name]
    box = page.locator(".zs3-stage").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    assert page.locator(".zs3-tip .zs3-name").inner_text() == name
    type_words(page, name.upper().replace("SRC", "src"))  # the same name again: an error that quotes it
    assert "given twice" in (said := toast(page)) and "<" in said
    assert page.evaluate("window.owned") is None
    assert page.locator("img[src='x'], img[onerror], .zs3-viewer b, .toast-body b").count() == 0
    page.close()


@pytest.mark.parametrize(("content", "said"), [(b"GIF89a no image at all", "not an image"), (bytes(3 * 2**20), "size")])
def test_an_upload_that_is_no_good_is_a_line(shown: Shown, tmp_path: Path, content: bytes, said: str) -> None:
    page, path = shown.open(), tmp_path / "photo.png"
    path.write_bytes(content)
    upload(page, path)
    assert said in toast(page)
    good = example_scenes(tmp_path)[1][0]
    page.reload()
    page.wait_for_selector(".zs3-chip")
    before = generation(page)
    upload(page, good)  # the server lives on
    changed(page, before)
    assert page.locator(".zs3-chip").count() > 0
    page.close()


def test_files_of_the_machine_are_not_the_pages(shown: Shown, tmp_path: Path) -> None:
    path, names = example_scenes(tmp_path)[0]
    api = f"{shown.address}gradio_api"
    events = httpx.get(f"{shown.address}config").json()["dependencies"]
    (segment,) = [event["id"] for event in events if len(event["inputs"]) == 6 and len(event["targets"]) > 1]

    def ask(path: str, session: str) -> dict[str, Any]:
        photo = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [photo, names, False, MODEL, "none", "none"], "fn_index": segment, "session_hash": session}
        httpx.post(f"{api}/queue/join", json=body).raise_for_status()
        events = httpx.get(f"{api}/queue/data", params={"session_hash": session}, timeout=60).text.splitlines()
        (done,) = [json.loads(line[6:]) for line in events if "process_completed" in line]
        return dict(done)

    (uploaded,) = httpx.post(f"{api}/upload", files={"files": ("a.png", path.read_bytes())}).json()
    assert ask(uploaded, "own")["success"] and "map" in json.dumps(ask(uploaded, "own"))
    for name, other in {"secret": path, "none": tmp_path / "none.png"}.items():  # an image, but nobody uploaded it
        done = ask(str(other), name)
        assert not done["success"] and "map" not in json.dumps(done)
