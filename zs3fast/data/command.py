"""`zs3fast data check`: walk a dataset's folder, count, and name what is broken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zs3fast.utils.console import RUN_ERROR, USAGE_ERROR, first_line, one_line_errors, progress_bar, stderr, stdout

if TYPE_CHECKING:
    from zs3fast.data.check import CheckReport
    from zs3fast.data.datasets import SegmentationDataset

EPILOG = "**Example**: `zs3fast data check VOCdevkit/VOC2012 --dataset voc20`"


def data_check(
    root: Annotated[Path, typer.Argument(help="The dataset's folder or above, or a YAML file that describes one.")],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="ade150, ade847, coco171, coco20i, context59, context60, pc459, voc20 or voc5i. Left out: whatever "
            "is found."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="train or val. Left out: both.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read only the first so many pairs of a split.")] = None,
) -> None:
    """Read every image and label map of a dataset, count them, and name the broken pairs.

    A pair is broken if a file is missing or damaged, if image and labels differ in size, or if a label is out of
    range. Exit code 1 if there is one. Images without a label map belong to no pair; they are mentioned.
    """
    with one_line_errors(USAGE_ERROR):
        found = _open(root, dataset, split)
        reports = [_walk(opened, limit) for opened in found]
    stdout.print(_table(reports))
    for report in reports:
        _say_broken(report)
        _say_unlabelled(report)
        for note in report.notes:
            stdout.print(f"[yellow]note[/] {escape(report.name)} {report.split}: {escape(note)}", soft_wrap=True)
    if any(report.broken for report in reports):
        raise typer.Exit(RUN_ERROR)


def _open(root: Path, name: str | None, split: str | None) -> list[SegmentationDataset]:
    from zs3fast.data.check import find_datasets
    from zs3fast.data.opening import open_dataset
    from zs3fast.data.sources import FOLDED, SPLITS

    if split is not None and split not in SPLITS:
        raise ValueError(f"--split: expected train or val, got {split!r}")
    place: Path | None = root
    if name is None and root.suffix.lower() in (".yaml", ".yml"):  # a dataset of one's own says where it lies
        name, place = str(root), None
    if name is None:
        return find_datasets(root, split)
    fold = 0 if name in FOLDED else None  # folds share their pairs
    opened, errors = [], []
    for part in SPLITS if split is None else [split]:
        try:
            opened.append(open_dataset(name, place, part, fold=fold, check_files=False))
        except (ValueError, OSError) as error:
            errors.append(error)
    if not opened:
        raise errors[0]
    for missing in errors:  # one split is enough to be checked, the other is mentioned
        stderr.print(f"[yellow]note[/] {escape(first_line(missing))}")
    return opened


def _walk(dataset: SegmentationDataset, limit: int | None) -> CheckReport:
    from zs3fast.data.check import check_dataset

    with progress_bar() as progress:
        task = progress.add_task(escape(f"{dataset.name} {dataset.split}"), total=None)
        return check_dataset(dataset, limit, lambda done, total: progress.update(task, completed=done, total=total))


def _table(reports: list[CheckReport]) -> Table:
    from zs3fast.data.check import PUBLISHED_PAIRS

    table = Table()
    for heading in ("dataset", "split", "pairs", "published", "read", "broken", "classes present", "ignored pixels"):
        left = heading in ("dataset", "split")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for report in reports:
        pixels = int(report.pixels.sum()) + report.ignored
        table.add_row(
            escape(report.name),
            report.split,
            str(report.pairs),
            str(PUBLISHED_PAIRS.get((report.name, report.split), "-")),
            str(report.checked),
            str(len(report.broken)),
            f"{int((report.images > 0).sum())} of {len(report.class_names)}",
            f"{100 * report.ignored / pixels:.1f} %" if pixels else "-",
        )
    return table


def _say_broken(report: CheckReport) -> None:
    if not report.broken:
        return
    name, reason = report.broken[0]
    more = f" ({len(report.broken)} broken in all)" if len(report.broken) > 1 else ""
    stdout.print(
        f"[red]broken[/] {escape(report.name)} {report.split}, first pair {escape(name)}: {escape(reason)}{more}",
        soft_wrap=True,
    )


def _say_unlabelled(report: CheckReport) -> None:
    if not report.unlabelled:
        return
    count = len(report.unlabelled)
    what = "1 image has" if count == 1 else f"{count} images have"
    first = escape(str(report.unlabelled[0]))
    where = f"{escape(report.name)} {report.split}"
    stdout.print(f"[yellow]note[/] {where}: {what} no label map, first {first}", soft_wrap=True)
