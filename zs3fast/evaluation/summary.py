"""A report in numbers: for JSON, and as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from zs3fast.evaluation.binary import PairScores
from zs3fast.evaluation.evaluate import Report
from zs3fast.evaluation.paper_rows import PaperRow
from zs3fast.evaluation.ratios import json_number


def class_rows(report: Report) -> list[dict[str, Any]]:
    """Every class with its scores and pixels, for JSON and tables; for pairs, the classes that were asked for."""
    setting, table = report.setting, report.table
    rows = []
    for index, name in enumerate(report.class_names):
        group = None if setting.seen is None else "seen" if index in setting.seen else "unseen"
        row = {"index": index, "name": name, "group": group, "iou": json_number(report.scores.iou[index])}
        if isinstance(report.scores, PairScores):
            hit, false, missed, rest = map(int, table[index])
            if not hit + false + missed + rest:
                continue
            row |= {"tp": hit, "fp": false, "fn": missed, "tn": rest}
        else:
            row |= {
                "accuracy": json_number(report.scores.accuracy[index]),
                "truth_pixels": int(table[index].sum()),
                "predicted_pixels": int(table[:, index].sum()),
            }
        rows.append(row)
    return rows


def to_dict(report: Report, rows: Sequence[PaperRow]) -> dict[str, Any]:
    """The whole report as JSON can hold it; scores in percent, full precision, null where nothing was counted."""
    return {
        "dataset": report.dataset,
        "split": report.split,
        "setting": report.setting.name,
        "images": report.images,
        "seconds": report.seconds,
        "settings": report.settings,
        "notes": list(report.notes),
        "scores": report.scores.to_dict(),
        "published": [row.to_dict() for row in rows],
        "classes": class_rows(report),
        "items": [asdict(item) for item in report.items],
    }


def score_lines(report: Report, rows: Sequence[PaperRow]) -> list[tuple[str, str, list[str]]]:
    """Names of the scores, then a line (who, source, cells) for ours and for each published row, in percent."""
    ours = {name: value for name, value in report.scores.headline().items() if not np.isnan(value)}
    columns = [name for name in report.scores.headline() if name in ours or any(name in row.values for row in rows)]
    lines = [("", "", columns)]
    method = str(report.settings.get("method", "ours"))
    lines.append((method, "this run", [f"{ours[name]:.2f}" if name in ours else "-" for name in columns]))
    for row in rows:
        source = f"{row.source}{', ' if row.detail else ''}{row.detail}"
        lines.append((row.method, source, [_published(row.values.get(name)) for name in columns]))
    return lines


def score_table(report: Report, rows: Sequence[PaperRow]) -> Table:
    """Our scores above the published ones."""
    (_, _, columns), *lines = score_lines(report, rows)
    title = f"{report.dataset} {report.split}, {report.setting.name}: {report.images} images, percent"
    # As narrow as it can be: eight numbers beside two words fit a terminal of 80 columns.
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("method", "source"):
        table.add_column(name, overflow="fold", min_width=8)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for method, source, cells in lines:
        table.add_row(escape(method), escape(source), *cells)
    return table


def class_table(report: Report, across: int = 3) -> Table:
    """IoU and accuracy of every class, several classes a line; unseen ones are marked with *."""
    rows = class_rows(report)
    values = ("IoU",) if isinstance(report.scores, PairScores) else ("IoU", "Acc")
    table = Table(title="classes, percent (* unseen)", title_justify="left")
    for _ in range(across):
        table.add_column("class")
        for name in values:
            table.add_column(name, justify="right", no_wrap=True)
    height = -(-len(rows) // across)
    for line in range(height):
        cells = []
        for row in rows[line::height]:
            cells.append(escape(row["name"]) + (" *" if row["group"] == "unseen" else ""))
            cells += [_percent(row["iou"])] + ([_percent(row["accuracy"])] if "accuracy" in row else [])
        table.add_row(*cells)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _published(value: float | None) -> str:
    """With the decimals it was published with."""
    return "-" if value is None else f"{value:.1f}" if value == round(value, 1) else f"{value:.2f}"
