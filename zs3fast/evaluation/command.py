"""`zs3fast eval`: weights and a dataset in, scores beside the published ones out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.markup import escape

from zs3fast.evaluation.options import EvalOptions
from zs3fast.utils.console import RUN_ERROR, USAGE_ERROR, one_line_errors, progress_bar, stderr, stdout, takes

if TYPE_CHECKING:
    from zs3fast.evaluation.evaluate import Report
    from zs3fast.evaluation.job import Job

EPILOG = (
    "**Example**: `zs3fast eval --weights zegclip_voc.safetensors --dataset voc20 --data VOCdevkit/VOC2012`, or "
    "`torchrun --nproc-per-node 4 -m zs3fast eval ...`"
)


@takes(EvalOptions)
def evaluate(options: EvalOptions) -> None:
    """Score weights on a dataset and set the result beside the published one.

    Written to the output folder: report.json, report.html (scores, classes, confusion, worst images), confusion.png and
    counts.npy. Under torchrun each image is scored once, by one of the processes.
    """
    from zs3fast.evaluation.job import noted, prepare
    from zs3fast.evaluation.partial import PartialResults
    from zs3fast.utils.distributed import dist_env
    from zs3fast.utils.files import expect_folder

    with one_line_errors(USAGE_ERROR), dist_env(options.device) as env:
        options = replace(options, device=str(env.device))
        expect_folder(options.output, "output")
        job = prepare(options)
        settings = {**job.settings, "limit": options.limit}
        partial = PartialResults(options.output / "partial", settings, options.resume)
        with one_line_errors(RUN_ERROR):
            with _progress(env.main) as progress:
                report = job.run(progress=progress, partial=partial)
            if env.main:
                _write(job, noted(report, job.published), options)
                partial.clear()


def _write(job: Job, report: Report, options: EvalOptions) -> None:
    """Files and tables of a finished evaluation."""
    from zs3fast.evaluation.paper_rows import paper_rows
    from zs3fast.evaluation.report import write_report
    from zs3fast.evaluation.summary import class_table, score_table
    from zs3fast.evaluation.worst import worst_images

    rows = paper_rows(report.settings["method"], report.dataset, report.setting.name, options.fold)
    worst = worst_images(report, job.dataset, job.shown, options.worst)
    files = write_report(report, rows, worst, options.output)
    stdout.print(class_table(report))
    stdout.print(score_table(report, rows))
    for note in report.notes:
        stdout.print(f"[yellow]note[/] {escape(note)}")
    stdout.print(f"{report.images} images in {report.seconds:.1f} s, report in {escape(', '.join(map(str, files)))}")


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, as the callable that evaluation reports to."""
    with progress_bar(stderr, shown=shown) as bar:
        task = bar.add_task("Scoring")
        yield lambda done, total: bar.update(task, completed=done, total=total)
