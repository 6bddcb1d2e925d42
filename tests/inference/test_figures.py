"""Figures: what their panels show is what the model says, and the command that draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from tests.inference.test_predictors import NAMES, Regions, segmenter
from tests.inference.test_segmenter import photo, text_rows
from tests.tiny import tiny_model
from zs3fast.cli import app
from zs3fast.data.world import WorldDataset
from zs3fast.inference import figures
from zs3fast.inference.figures import FIGURES, figure, region_map, side_by_side
from zs3fast.inference.predictors import squash
from zs3fast.utils.sheets import Panel, heat, labelled, sheet, shown

OPTIONS = {"maft": {"proposer": Regions()}}


@pytest.mark.parametrize("size", [(64, 64), (50, 150), (150, 40)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("method", FIGURES)
def test_every_figure_of_any_shape(method: str, size: tuple[int, int]) -> None:
    seg = segmenter(method, text_rows(5), **OPTIONS.get(method, {}))
    drawn = figure(seg, photo(*size), most=2)
    pixels = np.asarray(drawn)
    assert drawn.mode == "RGB" and min(drawn.size) > 256 and (pixels[:5] == 255).all() and pixels.std() > 10


def test_a_method_without_a_figure_is_said() -> None:
    with pytest.raises(ValueError, match="method: expected one of tagclip, clip_rc, clsclip, maft, got 'zegclip'"):
        figure(segmenter("zegclip", text_rows(5)), photo(64, 64))
    with pytest.raises(ValueError, match="most: expected at least 1, got 0"):
        figure(segmenter("tagclip", text_rows(5)), photo(64, 64), most=0)


def test_the_trusty_panel_is_the_trusty_map() -> None:
    seg, image = segmenter("tagclip", text_rows(5)), photo(70, 90)
    ((_, panel, _),) = FIGURES["tagclip"](seg, image, None, 1)
    trusty = seg(image, details=True).trusty_map()
    assert np.array_equal(np.asarray(panel.picture), np.asarray(heat(trusty, image)))
    assert panel.lines[1][1] == f"mean {trusty.mean():.2f}, highest {trusty.max():.2f}"


def test_regions_are_of_the_class_their_token_is_most_like() -> None:
    """One window of 4 x 4 patches, 2 x 2 regions of 32 pixels; two windows, where they overlap their mean decides."""
    seg, image = segmenter("clip_rc", text_rows(5)), photo(64, 64)
    canvas = seg._predictor._canvas(figures.Request(image, torch.empty(0), (), None))
    text = F.normalize(seg.embed(), dim=-1)
    features = seg.model.encode(canvas[None])
    alike = F.normalize(features.region_tokens[0], dim=-1) @ text.T
    labels, whole = region_map(seg, image)
    expected = alike.argmax(1).view(2, 2).repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert np.array_equal(labels, expected.numpy()) and whole == [int((features.global_token[0] @ text.T).argmax())]
    wide, whole = region_map(seg, photo(64, 100))
    assert wide.shape == (64, 100) and (wide >= 0).all() and len(whole) == 2


def test_class_attention_is_that_of_the_blocks() -> None:
    """By hand: a pass through open blocks, the class token replaced where it is navigated."""
    model = tiny_model("clsclip", num_classes=5, seen=[0, 1])
    text = text_rows(5)[:2]
    image = squash(photo(60, 90), model.image_size, model.pixel_mean, model.pixel_std)[None]
    got = model.class_attention(image, text)
    encoder = model.encoder
    with torch.no_grad():
        for c in range(2):
            x, grid = encoder.embed(image)
            for i, block in enumerate(encoder.transformer.resblocks):
                if str(i) in model.navigation:
                    x[:, 0] = model.navigation[str(i)](text[c])
                attn, normed = block.attn, block.ln_1(x)
                q, k, _ = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
                q, k = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (q, k))
                share = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[0, :, 0, 1:].mean(0)
                torch.testing.assert_close(got[i, c].flatten(), share, rtol=1e-4, atol=1e-6)
                x = block(x)
    own = model.class_attention(image)
    first = encoder.nav_layers[0]
    assert own.shape == (len(encoder.transformer.resblocks), 1, *grid)
    torch.testing.assert_close(own[:first, 0], got[:first, 0])
    assert (own[first, 0] - got[first, 0]).abs().max() > 1e-4 and own.sum((2, 3)).max() <= 1


def test_proposals_carry_their_five_best_classes() -> None:
    seg, image = segmenter("maft", text_rows(5), proposer=Regions()), photo(64, 96)
    (_, labels), panels = FIGURES["maft"](seg, image, None, 6)
    assert labels.title == "labels" and [panel.title for panel in panels] == ["proposal 0", "proposal 1"]  # 2 is empty
    encoded = seg._predictor.encode(image, None)
    with torch.no_grad():
        out = seg.model.decode(encoded.embeddings, seg.embed(), encoded.proposals, encoded.grid, non_object=False)
    for q, panel in enumerate(panels):
        share = out.proposal_logits[0, q].softmax(-1)
        best = share.topk(5)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        assert [text for _, text in panel.lines] == [f"{p:.2f} {NAMES[c]}" for p, c in pairs]
        dimmed = np.asarray(shown(image)).astype(int) - np.asarray(panel.picture)
        left, right = dimmed[:, : dimmed.shape[1] // 4], dimmed[:100, -100:]
        assert (left == 0).all() == (q == 0) and right.max() > 50


def test_weights_side_by_side_have_one_list_of_classes() -> None:
    first = segmenter("zegclip", text_rows(5))
    second = segmenter("tagclip", text_rows(5))
    drawn = side_by_side([("a", first), ("b", second)], [photo(64, 64), photo(64, 90)])
    lonely = side_by_side([("a", first)], [photo(64, 64)])
    assert drawn.width > lonely.width and drawn.height > 1.8 * lonely.height
    with pytest.raises(ValueError, match="segmenters, images: expected one at least"):
        side_by_side([], [photo(64, 64)])


def test_panels_say_what_is_there() -> None:
    labels = np.zeros((40, 60), int)
    labels[:, 30:] = 2
    labels[:4] = -1
    panel = labelled("x", photo(40, 60), labels, ["cat", "dog", "sofa"])
    assert [text for _, text in panel.lines] == ["cat 45 %", "sofa 45 %", "unlabelled 10 %"]
    many = labelled("x", photo(40, 60), np.arange(2400).reshape(40, 60) % 9, [str(i) for i in range(9)], most=2)
    assert [text for _, text in many.lines] == ["0 11 %", "1 11 %", "and 7 more"]
    whole = sheet([[panel, Panel("a title that does not fit by any means", shown(photo(9, 9)))], [panel]])
    assert whole.size[0] >= panel.picture.width + 150 and np.asarray(whole).std() > 10
    bright = np.asarray(heat(np.array([[0.0, 1.0]]), photo(40, 60))).astype(int).sum(-1)
    assert (bright[:, 0] < bright[:, -1]).all()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    sample = WorldDataset("test")[0]
    Image.fromarray(sample.image).save(folder / "scene.png")
    masks = np.stack([sample.labels == c for c in np.unique(sample.labels)]).astype(np.float32)
    np.savez(folder / "scene.npz", masks=masks)
    return folder / "scene.png"


@pytest.mark.parametrize("method", [*FIGURES, "compare"])
def test_the_command(scene: Path, tmp_path: Path, method: str) -> None:
    command = ["figures", method, str(scene), "--output", str(tmp_path)]
    if method in ("maft", "compare"):
        command += ["--proposer", f"files:{scene.with_suffix('.npz')}"]
    if method == "compare":
        command += ["-w", "zs3fast-tiny-zegclip", "-w", "zs3fast-tiny-maft", "-w", "zs3fast-tiny-maskclip"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    name = "compare.png" if method == "compare" else f"scene_{method}.png"
    assert [path.name for path in tmp_path.iterdir()] == [name] and min(Image.open(tmp_path / name).size) > 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zegclip"], "METHOD: expected one of tagclip, clip_rc, clsclip, maft, compare, got 'zegclip'"),
        (
            ["tagclip", "-w", "zs3fast-tiny-zegclip"],
            "METHOD: expected zegclip, as zs3fast-tiny-zegclip holds, got tagclip",
        ),
        (["tagclip", "-w", "a", "-w", "b"], "--weights: expected one file for tagclip, got 2; compare takes several"),
        (["compare", "-w", "zs3fast-tiny-maskclip"], "expected class names: zs3fast-tiny-maskclip carries none"),
        (["maft"], "proposer: maft classifies regions and needs something that finds them"),
    ],
)
def test_mistakes_are_one_line(scene: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    method, *options = arguments
    result = CliRunner().invoke(app, ["figures", method, str(scene), *options, "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["tagclip", "compare"])
def test_a_broken_image_does_not_end_the_run(scene: Path, tmp_path: Path, method: str) -> None:
    place = tmp_path / "in"
    place.mkdir()
    (place / "a.png").write_bytes(scene.read_bytes()[:300])
    (place / "b.jpg").write_bytes(b"no image")
    (place / "c.png").write_bytes(scene.read_bytes())
    more = ["-w", "zs3fast-tiny-tagclip"] * (2 if method == "compare" else 1)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["figures", method, str(place), "gone.png", *more, "-o", str(out)])
    assert result.exit_code == 1 and result.output.count("failed") == 3, result.output
    assert f"failed {place}/b.jpg: image: " in result.output and "failed gone.png: image: no file" in result.output
    name = "compare.png" if method == "compare" else "c_tagclip.png"
    assert [path.name for path in out.iterdir()] == [name] and min(Image.open(out / name).size) > 100
    result = CliRunner().invoke(app, ["figures", method, "gone.png", *more, "-o", str(tmp_path / "none")])
    assert result.exit_code == 1 and not (tmp_path / "none").exists()
