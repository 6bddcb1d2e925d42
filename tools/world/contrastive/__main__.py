"""`python -m tools.world.contrastive`: train the world's CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from zs3fast.utils.console import USAGE_ERROR, one_line_errors, stdout

EPILOG = "**Example**: `python -m tools.world.contrastive world_clip -o runs/world_clip`"


def train_clip(
    config: Annotated[str, typer.Argument(help="world_clip, or a YAML file.")] = "world_clip",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run (runs/NAME).")] = None,
    seed: Annotated[int | None, typer.Option(help="Over the configuration's.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Over the configuration's.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the run's folder.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; cuda if there is one.")] = None,
) -> None:
    """Train a CLIP on the procedural world, from nothing.

    The run's folder gets the configuration, checkpoints, a log, the zero-shot probe, and at the end weights.safetensors
    (open_clip's layout) and packed.safetensors (half precision, without the words the world does not have).
    """
    from dataclasses import replace

    from tools.world.contrastive.config import load_contrastive_config
    from tools.world.contrastive.run import train_clip as run

    given = {"output": output and str(output), "seed": seed, "iterations": iterations, "device": device}
    with one_line_errors(USAGE_ERROR):
        loaded = load_contrastive_config(config)
        loaded = replace(loaded, **{key: value for key, value in given.items() if value is not None})
        result = run(loaded, resume=resume)
    stdout.print(f"{result.iterations} iterations done, weights in {escape(str(result.weights))}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command(epilog=EPILOG)(train_clip)
    app()
