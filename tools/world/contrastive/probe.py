"""What a CLIP knows of the world without having been told: single things and grounds, named among all classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from zs3fast.data.transforms import CLIP_MEAN, CLIP_STD
from zs3fast.data.world import CLASSES, VERSION, arrange, draw, name_of
from zs3fast.data.world.vocabulary import STUFF, THINGS, Concept

TEMPLATE = "a photo of a {}."
_STREAM = 100  # seeds that no dataset draws from


def normalised(images: Tensor) -> Tensor:
    """Uint8 [B, 3, H, W] -> float32 with CLIP's mean and deviation."""
    mean, std = (images.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (images.float() / 255 - mean) / std


def portraits(concepts: Sequence[Concept], size: int, number: int) -> Tensor:
    """Uint8 [len(concepts) * number, 3, size, size]: each thing alone on some ground, or each ground alone."""
    images = []
    for concept in concepts:
        for copy in range(number):
            rng = np.random.default_rng((VERSION, _STREAM, CLASSES.index(concept), copy))
            thing = concept in THINGS
            ground = STUFF[rng.integers(len(STUFF))] if thing else concept
            images.append(draw(arrange(rng, (size, size), [concept] if thing else [], [ground]))[0])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@torch.no_grad()
def zero_shot_probe(
    clip: nn.Module, tokenizer: Callable[[list[str]], Tensor], *, size: int, number: int = 8
) -> dict[str, float]:
    """Share of portraits that are named right: things among 48 names, stuff among 16, and each word of the things.

    Args:
        clip: open_clip's CLIP; it is left in the mode it was in.
        number: portraits a class.
    Returns:
        {"things", "stuff", "pattern", "colour", "shape"}, each 0..1; by chance 1/48, 1/16, 1/4, 1/6 and 1/6.
    """
    training, device = clip.training, clip.logit_scale.device
    clip.eval()
    found = {}
    for kind, concepts in (("things", THINGS), ("stuff", STUFF)):
        sentences = [TEMPLATE.replace("{}", name_of(concept)) for concept in concepts]
        text = clip.encode_text(tokenizer(sentences).to(device), normalize=True)
        images = normalised(portraits(concepts, size, number).to(device))
        features = torch.cat([clip.encode_image(part, normalize=True) for part in images.split(64)])
        guesses = (features @ text.t()).argmax(1).tolist()
        pairs = [(concepts[i // number], concepts[guess]) for i, guess in enumerate(guesses)]
        found[kind] = _share([truth == guess for truth, guess in pairs])
        if kind == "things":
            for place, word in enumerate(("pattern", "colour", "shape")):
                found[word] = _share([truth[place] == guess[place] for truth, guess in pairs])
    clip.train(training)
    return found


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)
