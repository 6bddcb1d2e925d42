"""`zs3fast demo`: the small trained models on scenes with classes they had no labels of, as scores and one image."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zs3fast.utils.console import RUN_ERROR, USAGE_ERROR, one_line_errors, stderr, stdout

if TYPE_CHECKING:
    from zs3fast.evaluation.evaluate import Report
    from zs3fast.tiny.scoring import Label

EPILOG = "**Example**: `zs3fast demo -o out`"
COLUMNS = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")


@dataclass(frozen=True)
class Entry:
    """A line of the table and a column of the image."""

    name: str
    label: Label
    report: Report


def demo(
    models: Annotated[
        Path | None, typer.Option(help="Folder of models that `tools.world.build --output` packed.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the image.")] = Path("zs3fast_demo"),
    scenes: Annotated[int, typer.Option(help="Scenes to score on, of 1,000 that no model has seen.")] = 40,
) -> None:
    """Segment scenes of the procedural world with every method, print scores, draw an image.

    The models come with the package. A quarter of the classes is unseen: training had no labels of them.
    """
    from zs3fast.utils.files import expect_folder

    start = time.perf_counter()
    with one_line_errors(USAGE_ERROR):
        if not 1 <= scenes <= 1000:
            raise ValueError(f"--scenes: expected 1..1000, got {scenes}")
        expect_folder(output, "output")
        entries = _entries(models, scenes)
    table = Table(title=f"{entries[0].report.images} scenes, 48 seen and 16 unseen classes, percent")
    table.add_column("method")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for entry in entries:
        values = entry.report.scores.headline()
        table.add_row(entry.name, *(f"{values[column]:.1f}" for column in COLUMNS))
    stdout.print(table)
    path = output / "demo.png"
    with one_line_errors(RUN_ERROR):
        _draw(entries, path)
    stdout.print(f"image in {escape(str(path))}, {time.perf_counter() - start:.0f} s in all")


def _entries(models: Path | None, scenes: int) -> list[Entry]:
    from zs3fast.data.world import WorldDataset
    from zs3fast.tiny.scoring import score, world_labeller, world_segmenter
    from zs3fast.weights.packing import bundled, packed_models

    found = packed_models(models or bundled())
    if not found:
        raise FileNotFoundError(f"--models: {models} holds no packed models; `python -m tools.world.build` makes them")
    dataset = WorldDataset("test")
    entries = []
    with stderr.status("Segmenting") as status:
        for method, path in found.items():
            status.update(f"Segmenting with {method}")
            label = world_labeller(world_segmenter(path, dataset), dataset)
            entries.append(Entry(method, label, score(label, dataset, limit=scenes)))
    return entries


def _title(method: str) -> str:
    """A method as its paper writes it, and what it has beyond an image and names."""
    from zs3fast.models.registry import model_class

    kind = model_class(method)
    written = {"clip_rc": "CLIP-RC"}.get(method, kind.__name__)
    return f"{written} (true masks)" if kind.protocol == "proposals" else written


def _draw(entries: list[Entry], path: Path) -> None:
    from zs3fast.data.world import WorldDataset
    from zs3fast.tiny.drawing import comparison
    from zs3fast.utils.rendering import save_image

    dataset = WorldDataset("test")
    chosen = [i for i in range(60) if len(set(dataset.unseen) & set(dataset.read_labels(i).ravel().tolist())) > 1][:3]
    rows = []
    for index in chosen:
        sample = dataset[index]
        where = dataset.image_path(index)
        rows.append((sample.image, sample.labels, [entry.label(sample.image, where) for entry in entries]))
    save_image(comparison(rows, [_title(entry.name) for entry in entries], dataset.class_names, dataset.unseen), path)
