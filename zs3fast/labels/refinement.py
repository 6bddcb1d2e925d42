"""Pixel-adaptive refinement of maps (PAMR, Araslanov and Roth, CVPR 2020): near pixels of like colour share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zs3fast.ops import refine_maps, refine_maps_to_labels


class Pamr:
    """Maps [Q, H, W] -> the same after some steps of a weighted mean over neighbours, each map on its own.

    See `zs3fast.ops.refine_maps`, which has the formula, the groups of names and the tiles of large images.

    Args:
        image: [channels, h, w], normalised; of any size, resized bilinearly to that of the maps.
        steps: how often.
        dilations: distances of the neighbours, in pixels of the maps.
    """

    def __init__(self, image: Tensor, steps: int = 10, dilations: Sequence[int] = (8, 16)):
        self.image, self.steps, self.dilations = image[None].detach(), steps, tuple(dilations)

    def __call__(self, maps: Tensor) -> Tensor:
        return refine_maps(self.image, maps[None].detach(), steps=self.steps, dilations=self.dilations)[0]

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
