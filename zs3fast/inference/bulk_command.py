"""`zs3fast bulk`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from zs3fast.utils import cli_options as options
from zs3fast.utils.console import RUN_ERROR, USAGE_ERROR, one_line_errors, progress_bar, stdout

EPILOG = "**Example**: `zs3fast bulk photos/ out/ --weights zs3fast-tiny --classes 'red sand, star' --actors 2`"


def bulk(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Images, folders (with those in them), globs, URLs (s3://...); Parquet files with columns id and "
            "bytes; or WebDataset shards (.tar).",
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or URL for the Parquet shards.")],
    classes: options.Classes = None,
    classes_file: options.ClassesFile = None,
    dataset: options.ClassDataset = None,
    weights: options.Weights = None,
    method: options.TrainingFree = None,
    clip: options.Clip = None,
    pretrained: options.Pretrained = None,
    templates: options.Templates = None,
    refine: options.Refine = None,
    labels: Annotated[
        str,
        typer.Option(help="Label maps as rle (COCO's) or png in the shards, or files, as segment writes them."),
    ] = "rle",
    min_score: options.MinScore = None,
    background: options.Background = "",
    actors: Annotated[int, typer.Option(min=1, help="Models at work at once.")] = 1,
    num_gpus: Annotated[float, typer.Option(help="GPUs of an actor, such as 1 or 0.5.")] = 0.0,
    num_cpus: Annotated[float, typer.Option(help="CPU cores of an actor.")] = 1.0,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of a shard: what a lost actor has to do again.")] = 256,
    batch_size: options.BatchSize = 1,
    workers: Annotated[int | None, typer.Option(min=0, help="Threads of an actor that decode images ahead.")] = None,
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    address: options.Address = None,
) -> None:
    """Segment any number of images on Ray into Parquet shards, each exactly once.

    Killed at any moment, the same command goes on with what is missing; another model or class list is refused.
    Needs `zs3fast[ray]`.
    """
    with one_line_errors(USAGE_ERROR):
        from zs3fast.inference import bulk as work
        from zs3fast.inference.bulk_files import find_source
        from zs3fast.inference.chosen import class_list, segmenter_of
        from zs3fast.inference.options import SegmenterOptions

        entries = class_list(classes, classes_file, dataset)
        if entries is None and weights is None:
            raise ValueError("expected class names: give --classes, --classes-file or --dataset")
        run = work.BulkOptions(
            labels=labels,
            min_score=min_score,
            background=background,
            actors=actors,
            num_gpus=num_gpus,
            num_cpus=num_cpus,
            shard_rows=shard_rows,
            batch_size=batch_size,
            workers=workers,
            dtype=dtype,
            quantize=quantize,
            address=address,
        )
        found = find_source(inputs, output)  # what is not there is said before weights load
        # actors choose type and device
        settings = SegmenterOptions(templates=templates, dtype="float32", device="cpu", refine=refine)
        clips = {"method": method, "clip": clip, "pretrained": pretrained}
        segmenter, name = segmenter_of(weights, entries, clips, settings)
    with one_line_errors(RUN_ERROR), progress_bar() as bar:
        task = bar.add_task("Segmenting", total=None)
        try:
            report = work.bulk(
                found, output, segmenter, name, run, lambda done, of: bar.update(task, completed=done, total=of)
            )
        except ValueError:  # an OUTPUT or --address that is no good, which nothing was written for
            with one_line_errors(USAGE_ERROR):
                raise
    before = f", {report.before} were there" if report.before else ""
    broken = f"; {report.failed} hold an error" if report.failed else ""
    stdout.print(f"{report.done} images segmented{before}, results in {escape(output)}{broken}")
    if report.failed:
        raise typer.Exit(RUN_ERROR)
