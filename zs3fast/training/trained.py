"""What the training loop trains: a model, or the mask generator that goes before one."""

from __future__ import annotations

from zs3fast.models.base import ZeroShotModel
from zs3fast.models.registry import model_class
from zs3fast.proposals.generator import GENERATORS, ProposalGenerator

Trained = ZeroShotModel | ProposalGenerator


def trained_class(method: str) -> type[Trained]:
    """The class that a training of the method makes."""
    return ProposalGenerator if method in GENERATORS else model_class(method)
