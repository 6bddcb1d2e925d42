"""`zs3fast eval`: weights and a dataset in, scores beside the published ones out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zs3fast.utils.console import CROPS_HELP, QUANTIZE_HELP, RUN_ERROR, USAGE_ERROR, one_line_errors, stderr, stdout

if TYPE_CHECKING:
    from zs3fast.evaluation.evaluate import Report
    from zs3fast.evaluation.job import Job

EPILOG = (
    "**Example**: `zs3fast eval --weights zegclip_voc.safetensors --dataset voc20 --data VOCdevkit/VOC2012`, or "
    "`torchrun --nproc-per-node 4 -m zs3fast eval ...`"
)


def evaluate(
    dataset: Annotated[
        str, typer.Option(help="voc20, voc21, coco171, coco_object, context59, ade150, cityscapes, ..., or world.")
    ],
    weights: Annotated[
        str | None,
        typer.Option("--weights", "-w", help="Weights: a converted file or its name in the cache, or an official one."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Without --weights: maskclip, sclip, clearclip, naclip, rcs or scclip."),
    ] = None,
    clip: Annotated[str, typer.Option(help="open_clip name of that CLIP.")] = "ViT-B-16",
    pretrained: Annotated[
        str | None, typer.Option(help="Its weights: an open_clip tag such as openai, or a file.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="Of maskclip, see `zs3fast segment --help`.")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="Sizes, windows, names and thresholds as published: sclip, clearclip, naclip, rcs, scclip."),
    ] = None,
    refine: Annotated[
        int | None, typer.Option(min=0, help="Steps of refinement (PAMR); left out: as the protocol has it.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Root of the dataset: VOCdevkit/VOC2012, coco_stuff164k, ...; world has none.")
    ] = None,
    split: Annotated[str, typer.Option(help="val or train; of world also test.")] = "val",
    setting: Annotated[
        str | None,
        typer.Option(
            help="inductive, transductive, supervised, cross-dataset or background-undifferentiated. Left out: "
            "as the weights were trained where that was on this dataset, cross-dataset where not."
        ),
    ] = None,
    trained_on: Annotated[
        str | None,
        typer.Option(help="The dataset an official checkpoint was trained on, which tells seen from unseen."),
    ] = None,
    text_embeddings: Annotated[
        Path | None, typer.Option(help="Prepared .npy text embeddings, a row for each class of the dataset.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="Prompt templates: single, multi, or a sentence with {} in it.")
    ] = None,
    proposer: Annotated[
        str | None,
        typer.Option(
            help="Mask proposals for MAFT: mask2former:NAME, maskformer:NAME, sam:NAME, freeseg:FILE, files:PATH."
        ),
    ] = None,
    crops: Annotated[str | None, typer.Option(help=CROPS_HELP)] = None,
    boxes: Annotated[
        str | None,
        typer.Option(
            help="Folds by ClsCLIP+, zooming into boxes: detr:NAME, rtdetr:NAME, yolos:NAME, files:PATH.json."
        ),
    ] = None,
    no_box: Annotated[
        str, typer.Option(help="What a class without boxes gets: whole_image (plain ClsCLIP) or empty.")
    ] = "whole_image",
    fold: Annotated[int | None, typer.Option(help="Fold 0..3 of voc5i and coco20i, whose classes are tested.")] = None,
    episodes: Annotated[str, typer.Option(help="Pairs of a fold: all, or how many to draw.")] = "all",
    threshold: Annotated[float, typer.Option(help="Score from which a pixel belongs to the class asked for.")] = 0.5,
    eval_size: Annotated[
        str, typer.Option(help="Where a fold's masks are scored: original, or input (the network's, as few-shot code).")
    ] = "original",
    denominator: Annotated[
        str, typer.Option(help="Classes in a mean of IoU: gt_or_pred (truth or prediction) or gt (truth).")
    ] = "gt_or_pred",
    quantize: Annotated[str | None, typer.Option(help=QUANTIZE_HELP)] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many images (of a fold: pairs).")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path("zs3fast_eval"),
    worst: Annotated[int, typer.Option(help="How many of the worst images to show in the report.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted evaluation in --output.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that read images ahead.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; cuda if there is one.")] = None,
) -> None:
    """Score weights on a dataset and set the result beside the published one.

    Written to the output folder: report.json, report.html (scores, classes, confusion, worst images), confusion.png and
    counts.npy. Under torchrun each image is scored once, by one of the processes.
    """
    from zs3fast.evaluation.job import noted, prepare
    from zs3fast.evaluation.partial import PartialResults
    from zs3fast.utils.distributed import dist_env

    with one_line_errors(USAGE_ERROR), dist_env(device) as env:
        if worst < 0:
            raise ValueError(f"worst: expected at least 0, got {worst}")
        job = prepare(
            weights,
            dataset,
            data,
            method=method,
            clip=clip,
            pretrained=pretrained,
            attention=attention,
            protocol=protocol,
            refine=refine,
            split=split,
            setting=setting,
            trained_on=trained_on,
            text_embeddings=text_embeddings,
            templates=templates,
            proposer=proposer,
            crops=crops,
            boxes=boxes,
            no_box=no_box,
            fold=fold,
            episodes=episodes,
            threshold=threshold,
            eval_size=eval_size,
            denominator=denominator,
            quantize=quantize,
            device=str(env.device),
        )
        partial = PartialResults(output / "partial", {**job.settings, "limit": limit}, resume)
        with one_line_errors(RUN_ERROR):
            with _progress(env.main) as progress:
                report = job.run(
                    limit=limit, device=str(env.device), workers=workers, progress=progress, partial=partial
                )
            if env.main:
                _write(job, noted(report, job.published), fold, worst, output)
                partial.clear()


def _write(job: Job, report: Report, fold: int | None, worst: int, output: Path) -> None:
    """Files and tables of a finished evaluation."""
    from zs3fast.evaluation.paper_rows import paper_rows
    from zs3fast.evaluation.report import write_report
    from zs3fast.evaluation.summary import class_table, score_table
    from zs3fast.evaluation.worst import worst_images

    rows = paper_rows(report.settings["method"], report.dataset, report.setting.name, fold)
    files = write_report(report, rows, worst_images(report, job.dataset, job.shown, worst), output)
    stdout.print(class_table(report))
    stdout.print(score_table(report, rows))
    for note in report.notes:
        stdout.print(f"[yellow]note[/] {escape(note)}")
    stdout.print(f"{report.images} images in {report.seconds:.1f} s, report in {escape(', '.join(map(str, files)))}")


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, as the callable that evaluation reports to."""
    columns = (TextColumn("Scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not (shown and stderr.is_terminal)) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)
