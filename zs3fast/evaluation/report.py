"""The files of a report: JSON for programs, HTML and an image for people, the counts for anything else."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zs3fast.evaluation.binary import PairScores
from zs3fast.evaluation.drawing import confusion_image
from zs3fast.evaluation.evaluate import Report
from zs3fast.evaluation.page import page
from zs3fast.evaluation.paper_rows import PaperRow
from zs3fast.evaluation.summary import to_dict
from zs3fast.evaluation.worst import WorstImage
from zs3fast.utils.files import replacing
from zs3fast.utils.rendering import save_image

FILES = ("report.json", "report.html", "confusion.png", "counts.npy")


def write_report(
    report: Report, rows: Sequence[PaperRow], worst: Sequence[WorstImage], folder: str | os.PathLike[str]
) -> list[Path]:
    """Write report.json, report.html, counts.npy and, for label maps, confusion.png; each replaced whole.

    Returns:
        the files written.
    """
    summary, html, image, counts = (Path(folder) / name for name in FILES)
    confusion = None
    if not isinstance(report.scores, PairScores):
        confusion = confusion_image(report.table, report.class_names, report.setting.seen)
        save_image(confusion, image)
    with replacing(counts) as temporary:
        np.save(temporary, report.table, allow_pickle=False)
    with replacing(html) as temporary:
        temporary.write_text(page(report, rows, worst, confusion), encoding="utf-8")
    with replacing(summary) as temporary:
        content = json.dumps(to_dict(report, rows), indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(content + "\n", encoding="utf-8")
    return [summary, html, counts] + ([] if confusion is None else [image])
