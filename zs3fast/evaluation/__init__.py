"""Scores of the published protocols: counts from label maps, settings, reports beside the papers' rows."""

from zs3fast.evaluation.binary import BinaryCounts, PairScores
from zs3fast.evaluation.confusion import Confusion
from zs3fast.evaluation.evaluate import ItemScore, Report, evaluate, evaluate_pairs
from zs3fast.evaluation.pairs import PairSegmenter, ZoomingPairSegmenter
from zs3fast.evaluation.paper_rows import PAPER_ROWS, PaperRow, paper_rows
from zs3fast.evaluation.partial import PartialResults
from zs3fast.evaluation.protocols import SETTINGS, Setting, labeller, resolve_setting
from zs3fast.evaluation.report import write_report
from zs3fast.evaluation.scores import Scores, scores
from zs3fast.evaluation.worst import worst_images

__all__ = [
    "PAPER_ROWS",
    "SETTINGS",
    "BinaryCounts",
    "Confusion",
    "ItemScore",
    "PairScores",
    "PairSegmenter",
    "PaperRow",
    "PartialResults",
    "Report",
    "Scores",
    "Setting",
    "ZoomingPairSegmenter",
    "evaluate",
    "evaluate_pairs",
    "labeller",
    "paper_rows",
    "resolve_setting",
    "scores",
    "worst_images",
    "write_report",
]
