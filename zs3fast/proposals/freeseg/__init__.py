"""FreeSeg's proposal generator, which MAFT's published numbers were made with."""

from zs3fast.proposals.freeseg.generator import FreeSegGenerator
from zs3fast.proposals.freeseg.loading import GeneratorWeightsError
from zs3fast.proposals.freeseg.proposer import FreeSegProposer

__all__ = ["FreeSegGenerator", "FreeSegProposer", "GeneratorWeightsError"]
