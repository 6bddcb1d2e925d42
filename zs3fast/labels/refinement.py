"""Pixel-adaptive refinement of maps (PAMR, Araslanov and Roth, CVPR 2020): near pixels of like colour share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from zs3fast.labels.resizing import resized_region
from zs3fast.ops import refine_maps, refine_maps_to_labels
from zs3fast.ops.refine_maps import STEPS

TILE_PIXELS = 1 << 20  # of a tile with its halo, where the halo leaves room
GROUP_BYTES = 32 << 20  # of the maps of a group of names, once on their own grid and once on a tile
Region = tuple[slice, slice]  # rows and columns


class Pamr:
    """Maps [Q, H, W] -> the same after some steps of a weighted mean over neighbours, each map on its own.

    See `zs3fast.ops.refine_maps`, which has the formula, the groups of names and the tiles of large images.

    Args:
        image: [channels, h, w], normalised; of any size, resized bilinearly to that of the maps.
        steps: how often.
        dilations: distances of the neighbours, in pixels of the maps.
    """

    def __init__(self, image: Tensor, steps: int = STEPS, dilations: Sequence[int] = (8, 16)):
        self.image, self.steps, self.dilations = image[None].detach(), steps, tuple(dilations)

    def __call__(self, maps: Tensor) -> Tensor:
        return refine_maps(self.image, maps[None].detach(), steps=self.steps, dilations=self.dilations)[0]

    def tiles(
        self, maps: Tensor, size: tuple[int, int], then: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[Region, Tensor]]:
        """The refined maps at `size` = (H, W), a tile [q, rows, columns] at a time and where it lies.

        A tile is refined with a halo as wide as all steps reach, so that tiles are what the whole would be.

        Args:
            maps: [q, h, w], resized bilinearly to `size`.  then: what is done to them before they are refined.
        """
        halo = self.steps * max(self.dilations)
        for rows, columns in _cores(size, halo):
            wide = _grown(rows, halo, size[0]), _grown(columns, halo, size[1])
            near = resized_region(maps, size, *wide)
            refined = self._refined(near if then is None else then(near), resized_region(self.image[0], size, *wide))
            top, left = rows.start - wide[0].start, columns.start - wide[1].start
            yield (
                (rows, columns),
                refined[:, top : top + rows.stop - rows.start, left : left + columns.stop - columns.start],
            )

    def _refined(self, maps: Tensor, image: Tensor) -> Tensor:
        image = image[None].to(maps.dtype)
        return refine_maps(image, maps[None].detach(), steps=self.steps, dilations=self.dilations)[0]

    def best_names(
        self,
        logits: Tensor,
        size: tuple[int, int],
        *,
        crop_size: tuple[int, int],
        canvas_size: tuple[int, int],
        windows: Sequence[tuple[int, int]],
        scale: float,
        excluded: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """The best name int32 [H, W] of every pixel of the refined maps and its probability float32 [H, W].

        Nothing of the size of the maps is stored: logits of windows come in, and leave some names at a time.

        Args:
            logits: [n, Q, h, w], a row a window.  size: (H, W) of the image.
            crop_size, canvas_size, windows: where the windows lie, see `zs3fast.labels.softmax.Frame`.
            scale: of the logits before the softmax over all names.
            excluded: names that cannot win; they stay in the softmax.
        """
        names, scores = refine_maps_to_labels(
            self.image,
            logits,
            size,
            steps=self.steps,
            dilations=self.dilations,
            crop_size=crop_size,
            canvas_size=canvas_size,
            windows=windows,
            logit_scale=scale,
            excluded=excluded,
        )
        return names[0], scores[0]


def refined_labels(
    maps: Callable[[slice], Tensor],
    count: int,
    map_pixels: int,
    size: tuple[int, int],
    refine: Pamr,
    then: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Labels int32 [H, W] and their scores [H, W]: the best of `count` maps after refinement, the lowest of equals.

    Args:
        maps: those of some classes, [q, h, w], resized bilinearly to `size` = (H, W) before they are refined.
        map_pixels: h * w, by which the classes are cut into groups of which little is stored.
        then: what is done to resized maps before they are refined, such as a sigmoid.
    NaN counts as the largest score.
    """
    best = labels = None
    for names in groups(count, map_pixels, size):
        some = maps(names)
        if best is None or labels is None:
            best, labels = some.new_full(size, -torch.inf), torch.zeros(size, dtype=torch.int32, device=some.device)
        for region, refined in refine.tiles(some, size, then):
            keep_best(best[region], labels[region], refined, names.start)
    assert best is not None and labels is not None  # there is a class at least
    return labels, best


def keep_best(best: Tensor, labels: Tensor, maps: Tensor, first: int) -> None:
    """Put the best of maps [q, ...] into `best` and its index, counted from `first`, into `labels`, where it is better.

    NaN is better than any number; of equals the earlier stays.
    """
    values, index = maps.max(0)
    wins = ~(values <= best) & ~best.isnan()
    best.copy_(torch.where(wins, values, best))
    labels.copy_(torch.where(wins, index.int() + first, labels))


def groups(count: int, map_pixels: int, size: tuple[int, int], item_bytes: int = 4) -> Iterator[slice]:
    """Slices of `count` names whose maps take `GROUP_BYTES` at most on their own grid and on a tile, one at least."""
    tile = min(size[0] * size[1], TILE_PIXELS)
    step = max(GROUP_BYTES // (item_bytes * max(map_pixels, tile)), 1)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _cores(size: tuple[int, int], halo: int) -> Iterator[Region]:
    """Tiles that together are the image, such that each with its halo has `TILE_PIXELS` where that can be."""
    height, width = size
    if height * width <= TILE_PIXELS:
        yield slice(0, height), slice(0, width)
        return
    side = int(TILE_PIXELS**0.5)
    tall = TILE_PIXELS // width if width <= side else side
    wide = TILE_PIXELS // height if height <= side else side
    for rows in _cut(height, tall, halo):
        for columns in _cut(width, wide, halo):
            yield rows, columns


def _cut(length: int, room: int, halo: int) -> list[slice]:
    longest = length if length <= room else max(room - 2 * halo, halo, 64)
    count = -(-length // longest)
    step = -(-length // count)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _grown(part: slice, by: int, length: int) -> slice:
    return slice(max(part.start - by, 0), min(part.stop + by, length))
