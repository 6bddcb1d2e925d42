"""The report as one HTML page that needs nothing else: no script, no other file, images inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from zs3fast.evaluation.evaluate import Report
from zs3fast.evaluation.paper_rows import PaperRow
from zs3fast.evaluation.summary import class_rows, score_lines
from zs3fast.evaluation.worst import WorstImage
from zs3fast.utils.rendering import palette

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .6rem 0 1.6rem }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
tr.ours { font-weight: 600; background: #eef4fa }
.unseen { color: #aa3c00 } .note { color: #555 } img { max-width: 100% }
figure { margin: 0 0 1.6rem } .panels img { width: 24%; vertical-align: top }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .3em; border: 1px solid #555 }
.legend span.class { margin-right: 1.1em; white-space: nowrap }
"""


def page(
    report: Report, rows: Sequence[PaperRow], worst: Sequence[WorstImage], confusion: Image.Image | None = None
) -> str:
    """The HTML of a report. Names come from files and users: everything is escaped.

    Args:
        rows: published rows to set beside our scores.  worst: images to show.  confusion: the image, if there is one.
    """
    title = f"{report.dataset} {report.split}, {report.setting.name}"
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{report.images} images in {report.seconds:.1f} s; all numbers in percent.</p>',
        *(f'<p class="note">{escape(note)}</p>' for note in report.notes),
        _scores(report, rows),
        "<h2>Settings</h2>",
        _table(
            ("setting", "value"), [(escape(str(key)), escape(str(value))) for key, value in report.settings.items()]
        ),
        "<h2>Classes</h2>",
        _classes(report),
    ]
    if confusion is not None:
        parts += ["<h2>Confusion</h2>", _image(confusion, "confusion matrix", "PNG")]
    if worst:
        parts += ["<h2>Images with the lowest IoU</h2>", '<p class="note">Image, truth, prediction, mistakes.</p>']
        parts += [_worst(report, image) for image in worst]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _scores(report: Report, rows: Sequence[PaperRow]) -> str:
    (_, _, columns), *lines = score_lines(report, rows)
    body = [(escape(method), escape(source), *cells) for method, source, cells in lines]
    return "<h2>Scores</h2>\n" + _table(("method", "source", *columns), body, numbers_from=2, first_is_ours=True)


def _classes(report: Report) -> str:
    rows = class_rows(report)
    columns = [name for name in (rows[0] if rows else {}) if name not in ("index", "name", "group")]
    body = []
    for row in rows:
        name = escape(row["name"])
        name = f'<span class="unseen">{name}</span>' if row["group"] == "unseen" else name
        body.append((str(row["index"]), name, row["group"] or "-", *(_cell(row[column]) for column in columns)))
    headings = ("", "class", "group", *(column.replace("_", " ") for column in columns))
    return _table(headings, body, numbers_from=3)


def _worst(report: Report, image: WorstImage) -> str:
    item, colours = image.item, palette(len(report.class_names))
    asked = "" if item.class_index is None else f", {report.class_names[item.class_index]}"
    legend = []
    for index, truth, predicted in image.classes:
        swatch = f'<span class="swatch" style="background:rgb({",".join(map(str, colours[index]))})"></span>'
        amounts = f"{truth} px, {predicted} predicted"
        legend.append(f'<span class="class">{swatch}{escape(report.class_names[index])} ({amounts})</span>')
    names = ("image", "truth", "prediction", "mistakes")
    images = "".join(_image(panel, name, "JPEG") for panel, name in zip(image.panels, names, strict=True))
    heading = f"{item.id}{asked}: IoU {_cell(item.iou)}, pAcc {_cell(item.pacc)}"
    return (
        f'<figure><figcaption>{escape(heading)}</figcaption><div class="panels">{images}</div>'
        f'<div class="legend">{"".join(legend)}</div></figure>'
    )


def _table(
    headings: Sequence[str], body: Sequence[Sequence[str]], numbers_from: int = 99, first_is_ours: bool = False
) -> str:
    """A table of cells that are HTML already."""
    kinds = [' class="n"' if column >= numbers_from else "" for column in range(len(headings))]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, headings))
    lines = [f"<table><tr>{head}</tr>"]
    for number, row in enumerate(body):
        ours = ' class="ours"' if first_is_ours and number == 0 else ""
        lines.append(f"<tr{ours}>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row)) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _image(image: Image.Image, name: str, kind: str) -> str:
    content = io.BytesIO()
    image.save(content, kind, **({"quality": 85} if kind == "JPEG" else {}))
    encoded = base64.b64encode(content.getvalue()).decode("ascii")
    return f'<img alt="{escape(name)}" src="data:image/{kind.lower()};base64,{encoded}">'


def _cell(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
