"""ClsCLIP, ClsCLIP+ and MAFT behind the Segmenter, against the slow composition of their parts."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.inference.test_segmenter import photo, text_rows
from tests.tiny import CLIP, tiny_model
from zs3fast.inference import predictors as recipes
from zs3fast.inference.predictors import fit, normalise, prepare
from zs3fast.inference.segmenter import Segmenter
from zs3fast.models.clsclip_plus import ClsCLIPPlus
from zs3fast.proposals import clip_input, from_masks, load_mask_proposer, make_boxes, resize_for_proposer, sub_images
from zs3fast.types import BoxProposals, Proposals
from zs3fast.utils.resizing import resizes_there

NAMES = ["cat", "dog", "sofa", "sky", "grass"]


def regions(height: int, width: int) -> np.ndarray:
    """A proposal for the left half, one for a disc, an empty one; the top right corner is in none."""
    masks = np.zeros((3, height, width), np.float32)
    masks[0, :, : width // 2] = 1
    y, x = np.mgrid[:height, :width]
    masks[1] = (y - 0.7 * height) ** 2 + (x - 0.7 * width) ** 2 < (0.2 * height) ** 2
    return masks


class Regions:
    """A proposer that always finds the same."""

    def __init__(self, scores: np.ndarray | None = None):
        self.scores = scores

    def __call__(self, pictures, names=None) -> Proposals:
        masks = [regions(*picture.shape[:2]) for picture in pictures]
        if self.scores is None:
            return from_masks(masks)
        return from_masks(masks, class_scores=[self.scores], class_names=["dog", "couch"])


class Boxes:
    def __call__(self, picture, name=None) -> BoxProposals:
        height, width = picture.shape[:2]
        table = [[2, 3, width // 2, height // 2], [width // 3, 0, width, height - 5]]
        return make_boxes(table, ["dog", "couch"], (height, width))


def segmenter(method: str, text: torch.Tensor, **options) -> Segmenter:
    settings = {key: options.pop(key) for key in ("ensemble", "seen") if key in options}
    model = tiny_model(method, num_classes=5, class_names=NAMES, **{"seen": [0, 1], **settings})
    return Segmenter(model, text_embeddings=text, class_names=NAMES, **options)


def test_maft_is_its_parts() -> None:
    text, picture = text_rows(5), photo(70, 100)
    result = segmenter("maft", text, proposer=Regions())(picture)
    model = tiny_model("maft", num_classes=5, seen=[0, 1])
    frame, proposals = resize_for_proposer(picture), Regions()([picture])
    with torch.no_grad():
        out = model(clip_input(frame, 64), text, proposals)
        scores = model.class_scores(out, (70, 100))[0]
    expected = torch.where(scores.amax(0) > 0, scores.argmax(0), -1)
    assert (torch.from_numpy(result.labels) == expected).float().mean() > 0.999
    covered = regions(70, 100).any(0)
    assert (result.labels[~covered] == -1).mean() > 0.9, "pixels without a proposal stay unlabelled"
    np.testing.assert_allclose(result.scores, scores.amax(0).numpy(), atol=1e-5)


def test_maft_takes_the_proposer_s_own_classes_by_name() -> None:
    scores = np.array([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], np.float32)
    text, picture = text_rows(5), photo(64, 64)
    result = segmenter("maft", text, proposer=Regions(scores), ensemble=0.7, seen=[1, 2])(picture)
    model = tiny_model("maft", num_classes=5, seen=[1, 2])
    with torch.no_grad():
        out = model(clip_input(resize_for_proposer(picture), 64), text, Regions()([picture]))
    clip = out.proposal_logits.softmax(-1)[0, 0]
    weights = clip**0.7  # cat, sky, grass: unseen, and the proposer has no word for them
    weights[1] = 0.9**0.7 * clip[1] ** 0.3
    weights[2] = 0.05**0.7 * clip[2] ** 0.3
    assert result.labels[32, 4] == weights.argmax()
    np.testing.assert_allclose(result.scores[32, 4], weights.max().item(), rtol=1e-4)


def test_maft_answers_for_every_name_of_a_list() -> None:
    """Also for a list of one name more than it was trained on, whose last is no "no object"."""
    text, picture = text_rows(6), photo(64, 64)
    model = tiny_model("maft", num_classes=5, class_names=NAMES, seen=[0, 1])
    seg = Segmenter(model, text_embeddings=text, class_names=[*NAMES, "wood"], proposer=Regions())
    with torch.no_grad():
        out = model(clip_input(resize_for_proposer(picture), 64), text, Regions()([picture]), non_object=False)
    best = out.proposal_logits[0, 0].argsort(descending=True)
    order = [[*NAMES, "wood"][i] for i in best if i != best[0]] + [[*NAMES, "wood"][best[0]]]  # the best one last
    result = seg(picture, order)
    assert result.labels[32, 4] == 5


def test_an_offset_of_all_classes_leaves_nothing_unlabelled() -> None:
    text, picture = text_rows(5), photo(64, 64)
    plain = segmenter("maft", text, proposer=Regions())(picture, seen=NAMES)
    shifted = segmenter("maft", text, proposer=Regions())
    shifted.model.seen_offset = 0.9
    result = shifted(picture, seen=NAMES)
    assert np.array_equal(result.labels, plain.labels) and (result.labels >= 0).mean() > 0.5


def test_the_crop_baseline_is_a_clip_pass_a_proposal() -> None:
    text, picture = text_rows(5), photo(70, 100)
    result = segmenter("maft", text, proposer=Regions(), crops="mask_crop")(picture)
    model = tiny_model("maft", num_classes=5, seen=[0, 1])
    frame, proposals = resize_for_proposer(picture), Regions()([picture])
    pictures = sub_images(frame, proposals, "mask_crop", "zegformer")
    with torch.no_grad():
        embeddings = torch.stack([model.image_embedding(crop[None])[0] for crop in pictures.images])
        logits = 100 * F.normalize(embeddings, dim=-1) @ text.t()
    left = logits[0].argmax().item()
    assert result.labels[35, 5] == left


def test_clsclip_is_its_masks_over_one_half() -> None:
    text, picture = text_rows(5), photo(70, 100)
    found = segmenter("clsclip", text)
    with torch.no_grad():
        for linear in found.model.navigation.values():
            linear.weight.mul_(50)  # classes apart from each other
    result, everything = found(picture), found(picture, min_score=0.0)
    with torch.no_grad():
        pixels = normalise(picture, found.model.pixel_mean, found.model.pixel_std)[None]
        pixels = F.interpolate(pixels, (64, 64), mode="bilinear", antialias=True)
        scores = found.model.class_scores(found.model(pixels, text), (70, 100))[0]
    assert (torch.from_numpy(everything.labels) == scores.argmax(0)).float().mean() > 0.99
    expected = torch.where(scores.amax(0) >= 0.5, scores.argmax(0), -1)
    assert (torch.from_numpy(result.labels) == expected).float().mean() > 0.99


def test_clsclip_plus_zooms_into_boxes() -> None:
    text, picture = text_rows(5), photo(70, 100)
    result = segmenter("clsclip", text, boxes=Boxes())(picture, min_score=0.0)
    model = tiny_model("clsclip", num_classes=5, seen=[0, 1])
    pixels = normalise(picture, model.pixel_mean, model.pixel_std)
    scores = ClsCLIPPlus(model).class_scores(pixels, text, Boxes()(picture), NAMES)
    assert (torch.from_numpy(result.labels) == scores.argmax(0)).float().mean() > 0.999
    np.testing.assert_allclose(result.scores, scores.amax(0).numpy(), atol=1e-5)


def test_freeseg_proposals_follow_the_class_list(tmp_path: Path) -> None:
    """Generator and image tower out of one checkpoint, as MAFT's released files have them."""
    from tests.proposals.freeseg_oracle import HEADS, TEXT_DIM, Oracle, official_state

    torch.save({"model": official_state(Oracle())}, tmp_path / "maft.pth")
    proposer = load_mask_proposer(f"freeseg:{tmp_path / 'maft.pth'}", heads=HEADS)
    model = tiny_model("maft", clip={**CLIP, "embed_dim": TEXT_DIM}, num_classes=5, class_names=NAMES, seen=[0])
    model.ensemble = 0.7
    text, picture = torch.randn(5, TEXT_DIM, generator=torch.Generator().manual_seed(4)), photo(64, 64)
    result = Segmenter(model, text_embeddings=text, class_names=NAMES, proposer=proposer)(picture)
    proposals = proposer([picture], text)
    with torch.no_grad():
        out = model(clip_input(resize_for_proposer(picture), 64), text, proposals)
        scores = model.class_scores(out, (64, 64))[0]
    assert (torch.from_numpy(result.labels) == scores.argmax(0)).float().mean() > 0.99
    np.testing.assert_allclose(result.scores, scores.amax(0).numpy(), atol=1e-4)


def test_what_a_method_does_not_take() -> None:
    with pytest.raises(ValueError, match="proposer: maft classifies regions and needs something that finds them"):
        segmenter("maft", text_rows(5))
    with pytest.raises(ValueError, match="proposer: expected none for zegclip"):
        segmenter("zegclip", text_rows(5), proposer=Regions())
    with pytest.raises(ValueError, match="boxes: expected none for maft"):
        segmenter("maft", text_rows(5), proposer=Regions(), boxes=Boxes())


def test_no_region_is_said() -> None:
    class Nothing(Regions):
        def __call__(self, pictures, names=None) -> Proposals:
            found = super().__call__(pictures)
            return Proposals(
                None,
                found.masks[:, :0],
                found.valid[:, :0],
                found.padded_size,
                found.image_sizes,
                found.original_sizes,
            )

    with pytest.raises(ValueError, match="proposer: it found no region in the image"):
        segmenter("maft", text_rows(5), proposer=Nothing())(photo(64, 64))


def test_proposals_from_files_through_the_command_line(tmp_path: Path) -> None:
    """An image, a folder of masks of its own, labels out."""
    from PIL import Image
    from typer.testing import CliRunner

    from zs3fast import weights
    from zs3fast.cli import app

    picture = photo(64, 96)
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    np.savez(tmp_path / "masks" / "a.npz", masks=regions(64, 96))
    np.save(tmp_path / "text.npy", text_rows(5).numpy())
    weights.save(tiny_model("maft", num_classes=5, class_names=NAMES, seen=[0]), tmp_path / "m.safetensors")
    command = ["segment", str(tmp_path / "a.png"), "--weights", str(tmp_path / "m.safetensors")]
    command += ["--text-embeddings", str(tmp_path / "text.npy"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--proposer", f"files:{tmp_path / 'masks'}"])
    assert result.exit_code == 0, result.output
    labels = np.array(Image.open(tmp_path / "out" / "a_labels.png"))
    assert (labels[:10, -10:] == 255).all() and (labels[:, :40] < 5).all()
    missing = CliRunner().invoke(app, command)
    assert missing.exit_code == 2 and "needs something that finds them" in missing.output


@pytest.mark.parametrize(
    ("method", "options"),
    [("clsclip", {}), ("clsclip", {"boxes": Boxes()}), ("maft", {"proposer": Regions()}), ("maskclip", {})],
    ids=["clsclip", "clsclip+", "maft", "maskclip"],
)
def test_a_stream_equals_calls(method, options) -> None:
    seg = segmenter(method, text_rows(5), **options)
    pictures = [photo(70, 100), photo(64, 64, seed=3), photo(90, 50, seed=4)]
    for (_, got), expected in zip(seg.stream(pictures, workers=2), map(seg, pictures), strict=True):
        np.testing.assert_array_equal(got.labels, expected.labels)
        np.testing.assert_array_equal(got.scores, expected.scores)


@pytest.mark.parametrize("method", ["zegclip", "maskclip", "clsclip"])
def test_a_device_that_resizes_gets_pictures_as_they_are(method, monkeypatch) -> None:
    """What a GPU does, on a CPU: the model's device resizes, but for what is very large, and nothing changes."""
    seg, pictures = segmenter(method, text_rows(5)), [photo(70, 100), photo(64, 64, seed=3), photo(300, 290, seed=4)]
    expected, asked = [seg(picture) for picture in pictures], []

    def on_a_gpu(device, old, new):
        asked.append((old, resizes_there(torch.device("cuda"), old, new)))
        return asked[-1][1]

    monkeypatch.setattr(recipes, "resizes_there", on_a_gpu)
    np.testing.assert_array_equal(seg._predictor.prepare(pictures[0]).numpy(), pictures[0])
    calls, streamed = [seg(picture) for picture in pictures], [got for _, got in seg.stream(pictures, workers=2)]
    assert {size: there for size, there in asked} == {(70, 100): True, (64, 64): True, (300, 290): False}
    for one, call, got in zip(expected, calls, streamed, strict=True):
        for result in (call, got):
            np.testing.assert_array_equal(result.labels, one.labels)
            np.testing.assert_array_equal(result.scores, one.scores)
    if method != "clsclip":
        together = [got for _, got in seg.stream(pictures, batch_size=3)]
        for one, got in zip(expected, together, strict=True):
            assert (got.labels == one.labels).mean() > 0.99
            np.testing.assert_allclose(got.scores, one.scores, atol=1e-5)


@pytest.mark.parametrize(("method", "options"), [("clsclip", {}), ("maft", {"proposer": Regions()})])
def test_methods_without_windows_run_one_by_one_and_uncompiled(method, options) -> None:
    with pytest.raises(ValueError, match=f"batch_size: expected 1, as {method} takes images one by one, got 2"):
        segmenter(method, text_rows(5), **options).stream([], batch_size=2)
    with pytest.raises(ValueError, match=f"compile: expected a method that works in windows, got {method}"):
        segmenter(method, text_rows(5), **options, compile=True)


@pytest.mark.parametrize("size", [(64, 64), (75, 100), (200, 130)])
@pytest.mark.parametrize("antialias", [False, True])
def test_eight_bits_are_all_of_a_prepared_picture(size, antialias) -> None:
    """Resized values are whole levels, so that a byte holds them; the normalisation rounds as that of numbers does."""
    picture, mean, std = photo(*size), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    levels = fit(picture, 64, antialias).permute(2, 0, 1)
    assert levels.dtype == torch.uint8
    expected = (levels.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    got = prepare(picture, 64, mean, std, antialias)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    by_numbers = torch.stack([(levels[c].float() / 255 - mean[c]) / std[c] for c in range(3)])
    torch.testing.assert_close(got, by_numbers, rtol=1e-6, atol=1e-6)
    if size == (75, 100) and not antialias:
        whole = torch.from_numpy(picture).permute(2, 0, 1)[None].double()
        resized = F.interpolate(whole, (64, 85), mode="bilinear", align_corners=False)[0]
        assert (levels - resized).abs().max() < 1, "OpenCV's weights have 11 bits, its sums are rounded"
        assert np.array_equal(levels.permute(1, 2, 0).numpy(), cv2.resize(picture, (85, 64)))
