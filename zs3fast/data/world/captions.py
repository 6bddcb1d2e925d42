"""Sentences about scenes: all that can be seen, or one part of it in the words of CLIP's prompts."""

from __future__ import annotations

from functools import cache

import numpy as np

from zs3fast.data.world.scenes import RADII, Scene
from zs3fast.data.world.vocabulary import Concept, name_of
from zs3fast.text.templates import MAFT, MULTI, SINGLE

WHOLE = 0.7  # share of captions that tell everything; the others tell of one part
_BARE = 0.7  # how often those leave out the grounds: they are large, easily told apart, and would be all that is learnt
_VISIBLE = 0.012  # parts that show on less of the image go unmentioned
_DROPPED = 0.12  # how often a thing's pattern, or else its colour, goes unmentioned
_OPENINGS = ("", "", "", "a photo of ", "a picture of ", "there is ", "this is ")
_SIZES = ("small", "medium", "large")


def caption(scene: Scene, parts: np.ndarray, rng: np.random.Generator) -> str:
    """A caption of the scene whose part map is `parts` [H, W].

    "a photo of a striped red triangle and a plain blue circle on yellow sand", or without the grounds; or, of one part,
    a published prompt: "This is a photo of a large striped red triangle.". Things are said to be small, medium or large
    as they are, and only where the prompt has such a word. Parts that hardly show are left out.
    """
    shares = np.bincount(parts.ravel(), minlength=len(scene.concepts)) / parts.size
    shown = np.flatnonzero(shares > _VISIBLE)
    if rng.random() < WHOLE:
        return _everything(scene, shown, rng)
    weights = np.where(shown < len(scene.grounds), 1, 2)
    return _one_part(scene, int(rng.choice(shown, p=weights / weights.sum())), rng)


def _everything(scene: Scene, shown: np.ndarray, rng: np.random.Generator) -> str:
    grounds = [name_of(scene.concepts[i]) for i in shown if i < len(scene.grounds)]
    things = [f"a {_shortened(scene.concepts[i], rng)}" for i in shown if i >= len(scene.grounds)]
    rng.shuffle(grounds)
    rng.shuffle(things)
    opening = _OPENINGS[rng.integers(len(_OPENINGS))]
    if not things:
        return opening + _listed(grounds)
    if not grounds or rng.random() < _BARE:
        return opening + _listed(things)
    return f"{opening}{_listed(things)} {'on' if rng.random() < 0.7 else 'with'} {_listed(grounds)}"


def _one_part(scene: Scene, part: int, rng: np.random.Generator) -> str:
    thing = part >= len(scene.grounds)
    plain, sized = _prompts()
    if thing and rng.random() < 0.25:
        low, high = RADII
        place = (scene.things[part - len(scene.grounds)].radius - low) / (high - low)
        prompts = sized[_SIZES[min(2, int(3 * place))]]
    else:
        prompts = plain
    return prompts[rng.integers(len(prompts))].replace("{}", name_of(scene.concepts[part]))


def _shortened(concept: Concept, rng: np.random.Generator) -> str:
    pattern, colour, shape = concept
    chance = rng.random()
    if chance < _DROPPED:
        return f"{colour} {shape}"
    return f"{pattern} {shape}" if chance < 1.5 * _DROPPED else name_of(concept)


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@cache
def _prompts() -> tuple[list[str], dict[str, list[str]]]:
    """The published prompts without a size, and those of each size."""
    every = sorted({*SINGLE, *MULTI, *MAFT})
    sized = {size: [prompt for prompt in every if size in prompt] for size in _SIZES}
    return [prompt for prompt in every if not any(prompt in prompts for prompts in sized.values())], sized


def words() -> list[str]:
    """Sentences that hold every word of captions other than those of the concepts, published prompts included."""
    plain, sized = _prompts()
    prompts = [prompt.replace("{}", "") for group in (plain, *sized.values()) for prompt in group]
    return [*prompts, *_OPENINGS, "a, a and a on a with a"]
