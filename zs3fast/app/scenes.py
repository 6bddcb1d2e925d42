"""Example scenes of the procedural world, which the models in the package know."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from zs3fast.data.world import WorldDataset, name_of

SIZE, LARGER = (96, 128), 4  # things are as large as in training; more pixels to look at
CHOSEN = (10, 14, 4, 5, 19, 6)  # of the test scenes: several things on several grounds


def example_scenes(folder: Path) -> list[tuple[Path, list[str]]]:
    """Draw the scenes as PNG files of a folder: (path, names of what is there, things first)."""
    world = WorldDataset("test", size=SIZE)
    scenes = []
    for index in CHOSEN:
        path = folder / f"scene-{index}.png"
        scene = Image.fromarray(world[index].image)
        scene.resize((scene.width * LARGER, scene.height * LARGER), Image.Resampling.BICUBIC).save(path)
        concepts = sorted(set(world.scene(index).concepts), key=lambda concept: (-len(concept), concept))
        scenes.append((path, [name_of(concept) for concept in concepts]))
    return scenes
