"""MAFT's training step with its proposals: from the labels, or from a frozen proposer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zs3fast.models.maft import MAFT
from zs3fast.proposals import for_classes, from_labels, load_mask_proposer
from zs3fast.proposals.frames import DIVISOR, SHORT_SIDE
from zs3fast.proposals.freeseg import FreeSegProposer
from zs3fast.proposals.loading import is_generator
from zs3fast.training.config import TrainConfig
from zs3fast.training.steps import ProposalStep
from zs3fast.types import Proposals

Propose = Callable[[Tensor, Tensor], Proposals]


def build_proposal_step(
    config: TrainConfig, model: MAFT, text: Tensor, device: torch.device, common: dict[str, Any]
) -> ProposalStep:
    """The step of MAFT; the proposer's weights are looked for here, before anything is trained."""
    proposer = config.proposals.proposer
    if proposer == "ground_truth":
        propose = connected_labels(common["ignore_index"])
    elif is_generator(proposer):
        side = config.data.crop_size
        if side % DIVISOR:
            raise ValueError(f"data.crop_size: expected a multiple of {DIVISOR} for {proposer}, got {side}")
        found = load_mask_proposer(proposer, str(device), short_side=side, long_side=side)
        propose = asked(found, model.pixel_mean, model.pixel_std)
    elif config.data.crop_size != SHORT_SIDE:
        raise ValueError(
            f"data.crop_size: {proposer} works on images of {SHORT_SIDE} pixels, expected {SHORT_SIDE}, "
            f"got {config.data.crop_size}"
        )
    else:
        found = load_mask_proposer(proposer, str(device))
        if isinstance(found, FreeSegProposer):
            found.generator.train(not config.proposals.generator_eval)
        known = text[model.seen] if config.setting == "inductive" else text  # names of unseen classes are not told
        propose = asked(for_classes(found, known), model.pixel_mean, model.pixel_std)
    return ProposalStep(
        model,
        text,
        setting=config.setting,
        propose=propose,
        clip_size=model.image_size,
        distillation=config.proposals.distillation,
        **common,
    )


def connected_labels(ignore_index: int) -> Propose:
    """Proposals that are the connected regions of the labels."""

    def propose(images: Tensor, labels: Tensor) -> Proposals:
        side = labels.shape[-1]
        found = from_labels(
            labels.cpu(), ignore_index=ignore_index, connected=True, short_side=side, long_side=side, divisor=side
        )
        return usable(found, images.device)

    return propose


def asked(proposer: Callable[..., Proposals], mean: Sequence[float], std: Sequence[float]) -> Propose:
    """Proposals of a `MaskProposer` for normalised images, which are turned back into the images they came from."""

    def propose(images: Tensor, labels: Tensor) -> Proposals:
        shift, scale = (images.new_tensor(values).view(3, 1, 1) for values in (mean, std))
        pixels = ((images * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)
        return usable(proposer(list(pixels.permute(0, 2, 3, 1).cpu().numpy())), images.device)

    return propose


def usable(proposals: Proposals, device: torch.device) -> Proposals:
    """The same proposals with their tensors on a device; where a batch has none at all, one that is empty.

    The proposer's opinion of their classes, which are others than those in training, is left out: no loss reads it.
    """
    proposals = replace(proposals, class_scores=None, class_names=None)
    given = proposals.mask_logits if proposals.masks is None else proposals.masks
    assert given is not None  # one of both is set
    if not given.shape[1]:
        return replace(
            proposals,
            masks=torch.zeros(len(given), 1, *proposals.padded_size, device=device),
            valid=torch.zeros(len(given), 1, dtype=torch.bool, device=device),
            mask_logits=None,
            quality=None,
        )
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in vars(proposals).items() if isinstance(value, Tensor)
    }
    return replace(proposals, **moved)
