"""Refined labels without the maps are those of the definition, which stores them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zs3fast.labels import refinement
from zs3fast.labels.refinement import Pamr
from zs3fast.labels.softmax import Frame, Rule, softmax_labels, softmax_scores
from zs3fast.ops.refine_maps import reference

NEAR = {"steps": 3, "dilations": (1, 4)}

FRAMES = {
    "windows": Frame((20, 24), (30, 32), [(0, 0), (0, 8), (10, 0), (10, 8)]),
    "whole": Frame((30, 32), (30, 32), [(0, 0)]),
    "padded": Frame((30, 30), (30, 30), [(0, 0)], (1, 1), (32, 32)),
}
RULES = {
    "names": Rule(scale=30.0),
    "classes": Rule([0, 0, 1, 2, 2, 2, 3], 30.0, prob_thd=0.3),
    "areas": Rule([0, 1, 1, 2, 3, 4, 4], 30.0, area_thd=0.25),
    "over-classes": Rule([0, 0, 1, 2, 2, 2, 3], 30.0, over_classes=True),
}


@pytest.mark.parametrize("tile_pixels", [400, 1 << 20])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("frame", FRAMES)
def test_labels_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, frame: str, rule: str, tile_pixels: int
) -> None:
    monkeypatch.setattr(refinement, "TILE_PIXELS", tile_pixels)
    torch.manual_seed(0)
    where, how, size = FRAMES[frame], RULES[rule], (41, 37)
    logits = 0.1 * torch.randn(len(where.windows), 7, 4, 4)
    refine = Pamr(torch.randn(3, *where.canvas_size), steps=3, dilations=(1, 4))
    labels, scores = softmax_labels(
        logits,
        size,
        crop_size=where.crop_size,
        canvas_size=where.canvas_size,
        windows=where.windows,
        margin=where.margin,
        padded_size=where.padded_size,
        rule=how,
        refine=refine,
    )
    p = softmax_scores(logits.double(), size, where, how, lambda maps: refine(maps.float()).double())
    best = p.amax(0)
    sure = (best - how.prob_thd).abs() > 1e-4
    want = p.argmax(0).masked_fill(best < how.prob_thd, 0)
    assert (labels != want)[sure].float().mean() <= 1e-3
    torch.testing.assert_close(scores.double(), best, rtol=1e-4, atol=1e-5)
    assert len(labels.unique()) > 1


@pytest.mark.parametrize("tile_pixels", [1, 700, 1 << 20], ids=["least", "some", "whole"])
@pytest.mark.parametrize("size", [(41, 37), (150, 170), (3, 200), (200, 2)], ids="{0[0]}x{0[1]}".format)
def test_tiles_are_parts_of_the_whole(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], tile_pixels: int) -> None:
    """Whatever lies beyond a tile's halo does not reach it; the image's own edges are replicated, a tile's are not."""
    monkeypatch.setattr(refinement, "TILE_PIXELS", tile_pixels)
    generator = torch.Generator().manual_seed(1)
    maps, image = torch.randn(3, 9, 8, generator=generator), torch.randn(3, 20, 23, generator=generator)
    refine = Pamr(image, steps=3, dilations=(1, 4))
    resized = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    for then in (None, torch.sigmoid):
        expected = reference(image[None].double(), (resized if then is None else then(resized))[None].double(), **NEAR)
        got, seen = torch.full((3, *size), torch.nan), torch.zeros(size)
        for region, part in refine.tiles(maps, size, then):
            got[(slice(None), *region)] = part
            seen[region] += 1
        assert (seen == 1).all()
        torch.testing.assert_close(got.double(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_refined_labels_are_the_best_of_all_groups(monkeypatch: pytest.MonkeyPatch, group_bytes: int) -> None:
    monkeypatch.setattr(refinement, "TILE_PIXELS", 900)
    monkeypatch.setattr(refinement, "GROUP_BYTES", group_bytes)
    generator = torch.Generator().manual_seed(2)
    maps, image = torch.randn(5, 9, 8, generator=generator), torch.randn(3, 20, 23, generator=generator)
    maps[4] = maps[2]  # equals go to the first
    maps[1, 0, 0] = torch.nan
    refine, asked = Pamr(image, steps=3, dilations=(1, 4)), []

    def some(names: slice) -> torch.Tensor:
        asked.append(names)
        return maps[names]

    labels, scores = refinement.refined_labels(some, 5, 72, (41, 37), refine)
    resized = F.interpolate(maps[None], (41, 37), mode="bilinear", align_corners=False)
    expected = reference(image[None], resized, **NEAR)[0]
    assert len(asked) == (5 if group_bytes == 1 else 1)
    torch.testing.assert_close(scores, expected.max(0).values, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert (labels != expected.argmax(0)).float().mean() < 1e-3 and 4 not in labels and scores.isnan().any()
