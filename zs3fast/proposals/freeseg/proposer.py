"""FreeSeg's generator as a proposer: images and a class list in, `Proposals` out."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from zs3fast.proposals.frames import DIVISOR, LONG_SIDE, SHORT_SIDE, generator_input, resize_batch
from zs3fast.proposals.freeseg.generator import FreeSegGenerator
from zs3fast.proposals.freeseg.loading import load_generator
from zs3fast.proposals.masks import MaskProposer
from zs3fast.types import Proposals


class FreeSegProposer:
    """The proposals behind MAFT's published numbers; they depend on the class list.

    Built from the method's description and checked part by part against independent implementations; not yet run with
    the released weights. The generator runs in eval mode; MAFT was trained with its dropout on:
    `proposer.generator.train()`.

    Args:
        generator: see `FreeSegGenerator`; `from_official` builds one from a checkpoint.
        short_side, long_side, divisor: the frame, see `resize_for_proposer`.
    Source: Qin et al., FreeSeg (CVPR 2023), with the settings of MAFT's released checkpoints.
    """

    def __init__(
        self,
        generator: FreeSegGenerator,
        *,
        short_side: int = SHORT_SIDE,
        long_side: int = LONG_SIDE,
        divisor: int = DIVISOR,
    ) -> None:
        self.generator = generator.eval()
        self.frame = {"short_side": short_side, "long_side": long_side, "divisor": divisor}

    @classmethod
    def from_official(
        cls,
        checkpoint: str | os.PathLike[str] | dict[str, Tensor],
        *,
        device: str | torch.device = "cpu",
        heads: int = 8,
        groups: int = 32,
        multi_grid: Sequence[int] = (1, 2, 4),
        res5_dilation: int = 1,
        short_side: int = SHORT_SIDE,
        long_side: int = LONG_SIDE,
        divisor: int = DIVISOR,
    ) -> FreeSegProposer:
        """The proposer inside an official MAFT (or FreeSeg) checkpoint; widths and depths are read off its tensors.

        Args:
            checkpoint: a torch or safetensors file, or a state dict with official keys.
            heads, groups, multi_grid, res5_dilation: what the tensors do not tell; see the parts of the generator.
        Raises:
            GeneratorWeightsError: unreadable, or with missing, unexpected or misshapen weights (all named).
        """
        generator = load_generator(
            checkpoint, heads=heads, groups=groups, multi_grid=multi_grid, res5_dilation=res5_dilation
        ).to(device)
        return cls(generator, short_side=short_side, long_side=long_side, divisor=divisor)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray], text_embeddings: Tensor) -> Proposals:
        """Proposals of all images, run as one batch padded to its largest member.

        Args:
            pictures: uint8 [H, W, 3] arrays, RGB.
            text_embeddings: [C, E] of the classes, without the non-object row: the checkpoint has its own. The tensor's
                share of the work is kept until another one comes.
        Returns:
            `class_scores` has C + 1 columns in the order of `text_embeddings`; `mask_logits` are raw, at a quarter of
            the frame, and go up with `align_corners=True`.
        """
        self._check_text(text_embeddings)
        frames = resize_batch(pictures, **self.frame)
        weight = self.generator.non_object_embedding
        mask_logits, class_scores = self.generator(generator_input(frames).to(weight), text_embeddings.to(weight))
        if not bool(torch.isfinite(mask_logits).all() & torch.isfinite(class_scores).all()):
            raise ValueError("the mask generator's output is not finite: its weights or their precision are broken")
        return Proposals(
            mask_logits=mask_logits.float(),
            masks=None,
            valid=torch.ones(mask_logits.shape[:2], dtype=torch.bool, device=mask_logits.device),
            padded_size=frames[0].padded_size,
            image_sizes=tuple(frame.image_size for frame in frames),
            original_sizes=tuple(frame.original_size for frame in frames),
            class_scores=class_scores.float(),
            align_corners=True,
        )

    def for_vocabulary(self, text_embeddings: Tensor) -> MaskProposer:
        """This proposer with its class list fixed: called like any other, with images (and names, not used)."""
        self._check_text(text_embeddings)
        text = text_embeddings.to(self.generator.non_object_embedding)  # one tensor for all calls
        return lambda pictures, names=None: self(pictures, text)

    def _check_text(self, text_embeddings: Tensor) -> None:
        width = self.generator.embed_dim
        if not isinstance(text_embeddings, Tensor):
            raise TypeError(f"text_embeddings: expected a tensor [C, {width}], got {type(text_embeddings).__name__}")
        if text_embeddings.dim() != 2 or text_embeddings.shape[0] == 0 or text_embeddings.shape[1] != width:
            raise ValueError(
                f"text_embeddings: expected [C, {width}] with C >= 1, the generator's text width; "
                f"got {list(text_embeddings.shape)}"
            )
        if not bool(torch.isfinite(text_embeddings).all()):
            raise ValueError("text_embeddings: expected finite values, got nan or infinity")
