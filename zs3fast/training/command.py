"""`zs3fast train`: a published setting or a file of your own in, weights out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from zs3fast.utils.console import RUN_ERROR, USAGE_ERROR, one_line_errors, stderr, stdout

if TYPE_CHECKING:
    from zs3fast.training.config import TrainConfig

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
    find_batch_size: Annotated[
        bool, typer.Option("--find-batch-size", help="Try batch sizes until memory is full, print them and stop.")
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Budget of --find-batch-size (the GPU's, or most of what is free)."),
    ] = None,
    most: Annotated[int | None, typer.Option(help="Largest size that --find-batch-size tries (1024).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; cuda if there is one.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the whole configuration and stop.")] = False,
) -> None:
    """Train a method as published.

    The run's folder gets the resolved configuration, checkpoints, a log, TensorBoard files and at the end
    weights.safetensors, which `zs3fast segment` and `zs3fast eval` take. A killed run goes on with --resume. Under
    torchrun the batch is shared by the processes.
    """
    from zs3fast.training.config import load_config

    overrides = list(set_ or [])
    given: dict[str, Path | str | None] = {"data.root": data, "output": output, "init_from": init_from}
    given |= {"text.embeddings": text_embeddings, "device": device, "compile": "true" if compile_ else None}
    if config is None:
        with one_line_errors(USAGE_ERROR):
            if overrides or any((*given.values(), resume, find_batch_size, memory, most, show)):
                raise ValueError("config: expected a setting or a YAML file; `zs3fast train` alone lists the settings")
        _list_settings()
        return
    overrides += [f"{key}={_quoted(value)}" for key, value in given.items() if value is not None]
    with one_line_errors(USAGE_ERROR):
        loaded = load_config(config, overrides)
    if show:
        with one_line_errors(USAGE_ERROR):
            _show(loaded)
        return
    if find_batch_size:
        with one_line_errors(USAGE_ERROR):
            if resume:
                raise ValueError(
                    "--resume: expected none with --find-batch-size, which trains nothing that could go on, got it"
                )
            _find_batch_size(loaded, memory, most)
        return
    with one_line_errors(USAGE_ERROR):
        if memory is not None or most is not None:
            raise ValueError("--memory, --most: expected with --find-batch-size alone, got no --find-batch-size")
    from zs3fast.training.loop import train as run
    from zs3fast.utils.files import expect_folder

    with one_line_errors(USAGE_ERROR):
        expect_folder(loaded.folder, "output")
        try:
            result = run(loaded, resume=resume)
        except RuntimeError:  # a loss that is not finite: what was asked for went wrong on the way
            with one_line_errors(RUN_ERROR):
                raise
    if int(os.environ.get("RANK", 0)) == 0:
        best = result.best
        text = f", best {best['metric']} {best['value']:.2f} at {best['iteration']}" if best else ""
        stdout.print(f"{result.iterations} iterations done, weights in {escape(str(result.weights))}{text}")


def _list_settings() -> None:
    """The published settings with their method, dataset and a line on each."""
    from zs3fast.training.config import describe, list_configs, load_config

    for name in list_configs():
        loaded = load_config(name)
        stdout.print(f"[bold]{name}[/]  {loaded.method}, {loaded.data.name}", highlight=False)
        stdout.print(f"    {escape(describe(name))}", highlight=False)


def _show(config: TrainConfig) -> None:
    """Every key with its value, as YAML that `zs3fast train` takes."""
    import yaml

    from zs3fast.training.setup import whole_config

    values, of_data = whole_config(config)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()
    stdout.print(text, markup=False)
    if of_data:
        said = ", ".join(f"model.{name}" for name in of_data)
        stdout.print(f"# of the dataset unless set: {said}", markup=False)


def _find_batch_size(config: TrainConfig, memory: float | None, most: int | None) -> None:
    """Search, with a line for each size as it ends, then say what it means for this configuration."""
    from zs3fast.training.batch_size import MOST, find_batch_size, micro_batch

    with stderr.status("a training step of 1 image") as status:
        found = find_batch_size(
            config, memory, MOST if most is None else most, lambda trial: status.update(f"{trial.batch} tried, next")
        )
    table = Table(box=box.SIMPLE)
    for column in ("batch", "peak MiB", "MiB an image", "images/s"):
        table.add_column(column, justify="right")
    for trial in sorted(found.trials, key=lambda trial: trial.batch):
        if trial.peak_bytes is None or trial.seconds is None:
            table.add_row(str(trial.batch), "does not fit", "", "")
            continue
        slope = found.bytes_an_image(trial)
        each = "" if slope is None else f"{slope / 2**20:.1f}"
        speed = f"{trial.batch / trial.seconds:.2f}"
        table.add_row(str(trial.batch), f"{trial.peak_bytes / 2**20:.0f}", each, speed)
    stdout.print(table)
    room = "the GPU's memory" if found.budget is None else f"{found.budget / 2**30:.2f} GiB"
    if not found.largest:
        stderr.print(f"[red]error[/] not one image fits in {room}; checkpoint_activations=true takes less")
        raise typer.Exit(RUN_ERROR)
    more = "" if found.complete else ", the largest size tried"
    stdout.print(f"largest: {found.largest} images a forward and backward pass in {room}{more}", highlight=False)
    share = micro_batch(config.batch_size, found.largest)
    advice = "fits in one pass" if share == config.batch_size else f"fits with --set micro_batch={share}"
    stdout.print(f"batch_size {config.batch_size}, on one process, {advice}")


def _quoted(value: object) -> str:
    """A value that YAML reads back as the same text."""
    return str(value) if value == "true" else "'" + str(value).replace("'", "''") + "'"
