"""`zs3fast train`: a published setting or a file of your own in, weights out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from zs3fast._console import USAGE_ERROR, one_line_errors, stdout

EPILOG = (
    "**Example**: `zs3fast train zegclip_voc20_inductive --data VOCdevkit/VOC2012`, or "
    "`torchrun --nproc-per-node 4 -m zs3fast.train zegclip_coco171_inductive --data coco_stuff164k`"
)


def train(
    config: Annotated[
        str | None, typer.Argument(help="A published setting (left out: they are listed) or a YAML file.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Root of the dataset: VOCdevkit/VOC2012, coco_stuff164k, ...")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run (runs/NAME).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the configuration's, as optimizer.lr=1e-4.")
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Weights to start from; self-training needs the inductive run's.")
    ] = None,
    text_embeddings: Annotated[
        Path | None, typer.Option(help="Prepared .npy text embeddings, a row for each class of the dataset.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the run's folder.")
    ] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the training step.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; cuda if there is one.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the whole configuration and stop.")] = False,
) -> None:
    """Train a method as published.

    The run's folder gets the resolved configuration, checkpoints, a log, TensorBoard files and at the end
    weights.safetensors, which `zs3fast segment` and `zs3fast eval` take. A killed run goes on with --resume. Under
    torchrun the batch is shared by the processes.
    """
    from zs3fast.training.config import list_configs, load_config

    if config is None:
        stdout.print("\n".join(list_configs()))
        return
    overrides = list(set_ or [])
    given = {"data.root": data, "output": output, "init_from": init_from, "text.embeddings": text_embeddings}
    given |= {"device": device, "compile": "true" if compile_ else None}
    overrides += [f"{key}={_quoted(value)}" for key, value in given.items() if value is not None]
    with one_line_errors(USAGE_ERROR):
        loaded = load_config(config, overrides)
    if show:
        import yaml

        stdout.print(yaml.safe_dump(loaded.to_dict(), sort_keys=False), markup=False)
        return
    from zs3fast.training.loop import train as run

    with one_line_errors(USAGE_ERROR):
        result = run(loaded, resume=resume)
    if int(os.environ.get("RANK", 0)) == 0:
        best = result.best
        text = f", best {best['metric']} {best['value']:.2f} at {best['iteration']}" if best else ""
        stdout.print(f"{result.iterations} iterations done, weights in {escape(str(result.weights))}{text}")


def _quoted(value: object) -> str:
    """A value that YAML reads back as the same text."""
    return str(value) if value == "true" else "'" + str(value).replace("'", "''") + "'"
