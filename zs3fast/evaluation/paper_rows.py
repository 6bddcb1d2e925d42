"""Published numbers, in percent, to stand beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ZEGCLIP = "ZegCLIP (CVPR 2023)"
TAGCLIP = "TagCLIP (journal version)"
TAGCLIP_V1 = "TagCLIP (first preprint)"
CLIP_RC = "Exploring Regional Clues in CLIP (CVPR 2024)"
MAFT = "Learning Mask-aware CLIP Representations (NeurIPS 2023)"
SCLIP = "SCLIP (ECCV 2024)"
CLEARCLIP = "ClearCLIP (ECCV 2024)"
NACLIP = "NACLIP (WACV 2025)"
RESCLIP = "ResCLIP (CVPR 2025)"
SCCLIP = "SC-CLIP (arXiv 2411.15869)"
PH_REG = "PH-Reg, its run of MaskCLIP"
TF_OVOS = "TF-OVOS logs, an independent run of the official code"
CLSCLIP = "[CLS] Token is All You Need for Zero-Shot Semantic Segmentation"


@dataclass(frozen=True)
class PaperRow:
    """One row of a published table.

    values: percent by the names of `Scores.headline`.  source: the publication.  detail: which variant it is.
    fold: of PASCAL-5i and COCO-20i; None: no fold, or the mean of the four.
    """

    method: str
    dataset: str
    setting: str
    values: Mapping[str, float]
    source: str
    detail: str = ""
    fold: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SPLIT = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")
GROUPS = ("mIoU(S)", "mIoU(U)", "hIoU")
ALL = ("pAcc", "mIoU", "mAcc")

_Block = tuple[str, str, str, Sequence[str], Mapping[str, Sequence[float]], str]  # ..., columns, values, detail

_OPEN_SETS = ("ade847", "ade150", "pc459", "context59", "voc20")

_BLOCKS: tuple[_Block, ...] = (
    (
        "zegclip",
        "inductive",
        ZEGCLIP,
        SPLIT,
        {"voc20": (94.6, 91.9, 77.8, 84.3), "coco171": (62.0, 40.2, 41.4, 40.8), "context60": (76.2, 46.0, 54.6, 49.9)},
        "",
    ),
    (
        "zegclip",
        "transductive",
        ZEGCLIP,
        SPLIT,
        {"voc20": (96.2, 92.3, 89.9, 91.1), "coco171": (69.2, 40.6, 59.9, 48.4), "context60": (77.3, 46.8, 68.5, 55.6)},
        "",
    ),
    (
        "zegclip",
        "supervised",
        ZEGCLIP,
        SPLIT,
        {"voc20": (96.3, 92.4, 90.9, 91.6), "coco171": (69.9, 40.7, 63.2, 49.6)},
        "",
    ),
    ("zegclip", "supervised", ZEGCLIP, ("pAcc", "mIoU"), {"context60": (77.5, 51.1)}, ""),
    ("zegclip", "cross-dataset", ZEGCLIP, ALL, {"context60": (60.9, 41.2, 68.4)}, "from COCO-Stuff"),
    ("zegclip", "cross-dataset", CLIP_RC, ALL, {"context59": (68.4, 47.5, 69.7)}, "from COCO-Stuff"),
    ("zegclip", "inductive", TAGCLIP, SPLIT, {"voc20": (95.0, 92.6, 75.5, 83.2)}, "run again"),
    ("zegclip", "transductive", CLIP_RC, SPLIT, {"context60": (77.4, 47.2, 63.2, 54.0)}, "trained again"),
    ("zegclip", "supervised", CLIP_RC, SPLIT, {"context60": (77.4, 46.9, 70.0, 56.2)}, "trained again"),
    ("zegclip", "background-undifferentiated", TAGCLIP, SPLIT, {"coco171": (47.2, 29.9, 30.4, 30.2)}, ""),
    (
        "tagclip",
        "inductive",
        TAGCLIP,
        SPLIT,
        {"voc20": (96.1, 93.5, 85.2, 89.2), "coco171": (63.3, 40.7, 43.1, 41.9), "context60": (76.8, 48.1, 56.7, 52.1)},
        "",
    ),
    (
        "tagclip",
        "transductive",
        TAGCLIP,
        SPLIT,
        {"voc20": (97.2, 94.3, 92.7, 93.5), "coco171": (69.4, 40.8, 60.0, 48.6)},
        "",
    ),
    (
        "tagclip",
        "transductive",
        TAGCLIP,
        SPLIT,
        {"context60": (78.0, 49.2, 65.8, 55.9)},
        "its S and U give hIoU 56.3",
    ),
    (
        "tagclip",
        "supervised",
        TAGCLIP_V1,
        SPLIT,
        {"voc20": (96.8, 93.1, 92.8, 92.9), "coco171": (69.9, 41.3, 63.6, 50.1)},
        "",
    ),
    (
        "tagclip",
        "supervised",
        TAGCLIP,
        ("pAcc", "mIoU"),
        {"voc20": (96.8, 93.0), "coco171": (69.9, 43.2), "context60": (77.9, 52.0)},
        "headed mIoU(S), is over all classes",
    ),
    ("tagclip", "cross-dataset", TAGCLIP, ALL, {"context60": (63.5, 42.6, 70.1)}, "from COCO-Stuff"),
    ("tagclip", "background-undifferentiated", TAGCLIP, SPLIT, {"coco171": (50.7, 30.0, 36.0, 32.7)}, ""),
    (
        "clip_rc",
        "inductive",
        CLIP_RC,
        SPLIT,
        {"voc20": (95.8, 92.8, 84.4, 88.4), "coco171": (63.1, 40.9, 41.6, 41.2), "context60": (76.2, 47.5, 57.3, 51.9)},
        "",
    ),
    (
        "clip_rc",
        "transductive",
        CLIP_RC,
        SPLIT,
        {"voc20": (97.0, 93.9, 92.2, 93.0), "coco171": (69.9, 42.0, 60.8, 49.7), "context60": (77.2, 48.1, 64.5, 55.1)},
        "",
    ),
    (
        "clip_rc",
        "supervised",
        CLIP_RC,
        SPLIT,
        {"voc20": (97.1, 94.1, 93.4, 93.7), "coco171": (70.8, 42.9, 64.1, 51.4), "context60": (76.9, 47.1, 71.3, 56.7)},
        "",
    ),
    (
        "clip_rc",
        "cross-dataset",
        CLIP_RC,
        ALL,
        {"context60": (62.1, 42.3, 68.8), "context59": (70.9, 49.2, 69.9)},
        "from COCO-Stuff",
    ),
    (
        "maft",
        "inductive",
        MAFT,
        GROUPS,
        {"coco171": (43.3, 50.4, 46.5), "voc20": (91.4, 81.8, 86.3), "ade847": (21.4, 8.7, 12.4)},
        "FreeSeg proposals, ensemble",
    ),
    (
        "maft",
        "inductive",
        MAFT,
        GROUPS,
        {"coco171": (40.1, 49.7, 44.4), "voc20": (90.4, 84.7, 87.5), "ade847": (21.3, 8.7, 12.2)},
        "FreeSeg proposals, CLIP scores only",
    ),
    (
        "maft",
        "inductive",
        MAFT,
        GROUPS,
        {"coco171": (40.6, 40.1, 40.3), "voc20": (88.4, 66.2, 75.7), "ade847": (18.9, 6.7, 9.9)},
        "ZSSeg proposals, ensemble",
    ),
    (
        "maft",
        "inductive",
        MAFT,
        GROUPS,
        {"coco171": (36.4, 40.1, 38.1), "voc20": (91.5, 80.7, 85.7), "ade847": (16.6, 7.0, 9.8)},
        "ZegFormer proposals, ensemble",
    ),
    (
        "maft",
        "transductive",
        MAFT,
        (*GROUPS, "mIoU"),
        {"voc20": (90.0, 86.3, 88.1, 89.1), "coco171": (44.1, 55.2, 49.0, 45.0)},
        "FreeSeg proposals",
    ),
    (
        "maft",
        "cross-dataset",
        MAFT,
        ("mIoU",),
        {"ade847": (10.1,), "ade150": (29.1,), "pc459": (12.8,), "context59": (53.5,), "voc20": (90.0,)},
        "FreeSeg proposals, ViT-B/16, from COCO-Stuff",
    ),
    (
        "maft",
        "cross-dataset",
        "log beside the released weights",
        ("pAcc", "mIoU", "mAcc", "fwIoU"),
        {
            "ade847": (58.59, 10.25, 20.49, 48.64),
            "ade150": (70.72, 29.15, 45.08, 59.05),
            "pc459": (66.17, 12.85, 28.87, 54.94),
            "context59": (77.09, 53.33, 70.41, 65.93),
            "voc20": (95.10, 90.45, 94.67, 91.16),
        },
        "FreeSeg proposals, ViT-B/16, from COCO-Stuff",
    ),
    (
        "maft",
        "cross-dataset",
        MAFT,
        ("mIoU",),
        {"ade847": (12.1,), "ade150": (32.0,), "pc459": (15.7,), "context59": (58.5,), "voc20": (92.1,)},
        "FreeSeg proposals, ViT-L, from COCO-Stuff",
    ),
    (
        "maft",
        "inductive",
        MAFT,
        (*GROUPS, "mIoU"),
        {"coco171": (43.4, 51.5, 47.1, 44.1), "voc20": (91.0, 88.6, 89.8, 90.4)},
        "SAM-H proposals",
    ),
    (
        "maft",
        "inductive",
        MAFT,
        (*GROUPS, "mIoU"),
        {"coco171": (43.1, 43.3, 43.2, 42.1), "voc20": (85.1, 86.7, 85.9, 85.5)},
        "SAM-H proposals, frozen CLIP",
    ),
    (
        "maft",
        "inductive",
        MAFT,
        (*GROUPS, "mIoU"),
        {"coco171": (77.2, 82.1, 79.6, 77.6)},
        "upper bound: FreeSeg proposals named by their IoU with the labels",
    ),
    *(
        (
            "maft",
            "inductive",
            MAFT,
            GROUPS,
            dict(zip(("coco171", "voc20", "ade847"), values, strict=True)),
            f"{generator} alone, its frozen CLIP on crops, {how}",
        )
        for generator, how, values in (
            ("FreeSeg", "ensemble", ((42.4, 42.2, 42.3), (91.9, 78.6, 84.7), (22.3, 4.4, 7.3))),
            # ZSSeg on VOC: its S and U give hIoU 70.7
            ("ZSSeg", "ensemble", ((40.4, 36.5, 38.3), (86.6, 59.7, 69.4), (18.0, 4.5, 7.2))),
            ("ZegFormer", "ensemble", ((36.7, 36.2, 36.4), (90.1, 70.6, 79.2), (17.4, 5.1, 7.9))),
            ("FreeSeg", "CLIP scores only", ((22.3, 29.3, 25.3), (87.4, 74.7, 80.5), (6.5, 2.8, 3.9))),
            ("ZSSeg", "CLIP scores only", ((20.6, 27.4, 23.6), (82.0, 71.2, 76.2), (5.9, 2.8, 3.9))),
            ("ZegFormer", "CLIP scores only", ((18.5, 23.0, 20.5), (81.4, 76.8, 79.0), (5.1, 2.6, 3.5))),
        )
    ),
    *(
        (
            "maft",
            "inductive",
            MAFT,
            GROUPS,
            dict(zip(("coco171", "voc20", "ade847"), values, strict=True)),
            f"{generator} proposals, CLIP scores only",
        )
        for generator, values in (
            ("ZSSeg", ((36.1, 35.9, 36.0), (87.1, 76.1, 81.2), (17.2, 7.2, 10.2))),
            ("ZegFormer", ((35.1, 31.6, 33.3), (87.6, 79.9, 83.5), (15.8, 7.0, 9.8))),
        )
    ),
    *(
        ("maft", "cross-dataset", MAFT, ("mIoU",), dict(zip(_OPEN_SETS, [(v,) for v in values], strict=True)), detail)
        for detail, values in (
            ("FreeSeg proposals, RN50, from COCO-Stuff", (8.4, 27.0, 9.9, 50.8, 89.0)),
            ("FreeSeg alone, ViT-B/16, from COCO-Stuff", (7.1, 17.9, 6.4, 34.4, 85.6)),
            ("FreeSeg alone, ViT-L, from COCO-Stuff", (8.5, 21.0, 7.6, 33.8, 86.4)),
            ("FreeSeg alone, RN50, from COCO-Stuff", (5.3, 15.5, 5.4, 28.2, 87.1)),
        )
    ),
)

# OpenAI's ViT-B/16, nothing trained, mIoU.
_TRAINING_FREE_SETS = ("voc21", "context60", "coco_object", "voc20", "context59", "coco171", "cityscapes", "ade150")
_REPEATED_SETS = ("voc20", "context59", "coco171", "ade150", "pc459", "ade847")
_TRAINING_FREE: tuple[tuple[str, str, str, Sequence[str], Sequence[float]], ...] = (
    ("maskclip", PH_REG, "", _TRAINING_FREE_SETS, (49.3, 25.5, 26.9, 66.6, 28.6, 18.8, 28.3, 13.7)),
    ("sclip", SCLIP, "paper", _TRAINING_FREE_SETS, (59.1, 30.4, 30.5, 80.4, 34.2, 22.4, 32.2, 16.1)),
    ("sclip", SCLIP, "repository", _TRAINING_FREE_SETS, (59.63, 31.74, 33.52, 81.54, 34.46, 22.77, 32.34, 16.45)),
    ("sclip", TF_OVOS, "", _REPEATED_SETS, (81.5, 34.1, 22.9, 16.5, 6.7, 5.7)),
    ("clearclip", CLEARCLIP, "", _TRAINING_FREE_SETS, (51.8, 32.6, 33.0, 80.9, 35.9, 23.9, 30.0, 16.7)),
    ("naclip", NACLIP, "PAMR off", _TRAINING_FREE_SETS, (58.9, 32.2, 33.2, 79.7, 35.2, 23.3, 35.5, 17.4)),
    (
        "naclip",
        NACLIP,
        "repository, PAMR on",
        _TRAINING_FREE_SETS,
        (64.07, 34.99, 36.19, 83.03, 38.35, 25.69, 38.27, 19.05),
    ),
    ("naclip", TF_OVOS, "PAMR on", _REPEATED_SETS, (83.0, 38.4, 26.0, 19.1, 7.8, 6.0)),
    ("rcs", RESCLIP, "RCS alone, on NACLIP", ("voc20",), (85.5,)),
    (
        "rcs",
        RESCLIP,
        "ResCLIP in full on NACLIP, with SFR, which is not here",
        _TRAINING_FREE_SETS,
        (61.1, 33.5, 35.0, 86.0, 36.8, 24.7, 35.9, 18.0),
    ),
    (
        "rcs",
        TF_OVOS,
        "ResCLIP in full on NACLIP, with SFR, which is not here",
        _REPEATED_SETS[:4],
        (82.3, 36.9, 23.6, 18.1),
    ),
    ("scclip", SCCLIP, "", _TRAINING_FREE_SETS, (64.6, 36.8, 37.7, 84.3, 40.1, 26.6, 41.0, 20.1)),
    ("scclip", TF_OVOS, "", _REPEATED_SETS, (84.3, 40.2, 26.6, 20.1, 8.3, 7.5)),
)

_FOLDS = {  # four folds, their mean, FB-IoU of the mean
    "voc5i": (59.9, 61.2, 50.5, 54.1, 56.4, 67.9),
    "coco20i": (34.1, 40.0, 38.2, 35.7, 37.0, 64.5),
}


def _all_rows() -> tuple[PaperRow, ...]:
    rows = [
        PaperRow(method, dataset, setting, dict(zip(columns, values, strict=True)), source, detail)
        for method, setting, source, columns, table, detail in _BLOCKS
        for dataset, values in table.items()
    ]
    rows += [
        PaperRow(method, dataset, "training-free", {"mIoU": value}, source, detail)
        for method, source, detail, sets, values in _TRAINING_FREE
        for dataset, value in zip(sets, values, strict=True)
    ]
    for dataset, (*folds, miou, fb_iou) in _FOLDS.items():
        rows += [
            PaperRow("clsclip", dataset, "fold", {"mIoU": value}, CLSCLIP, f"fold {fold}", fold)
            for fold, value in enumerate(folds)
        ]
        values = {"mIoU": miou, "FB-IoU": fb_iou}
        rows.append(PaperRow("clsclip", dataset, "fold", values, CLSCLIP, "mean of the four folds"))
    values = {"mIoU": 71.5, "FB-IoU": 80.6}
    rows.append(PaperRow("clsclip+", "voc5i", "fold", values, CLSCLIP, "YOLOv7 boxes, mean of the four folds"))
    for detail, value in (("YOLOv7 boxes", 26.2), ("true boxes", 49.8)):
        where = f"{detail}, a sub-fold of fold 0 that is not published"
        rows.append(PaperRow("clsclip+", "voc5i", "fold", {"mIoU": value}, CLSCLIP, where, 0))
    rows.append(PaperRow("boxes as masks", "voc5i", "fold", {"mIoU": 55.5}, CLSCLIP, "YOLOv7 boxes"))
    return tuple(rows)


PAPER_ROWS = _all_rows()


def paper_rows(method: str, dataset: str, setting: str, fold: int | None = None) -> list[PaperRow]:
    """The published rows of a method on a dataset in a setting; of a fold, where one is given, and of the mean."""
    return [
        row
        for row in PAPER_ROWS
        if (row.method, row.dataset, row.setting) == (method, dataset, setting) and row.fold in (None, fold)
    ]
