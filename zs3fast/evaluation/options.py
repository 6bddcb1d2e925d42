"""The options of `zs3fast eval`: declared once, handed on as one object to where they are used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from zs3fast.utils.console import CROPS_HELP, QUANTIZE_HELP


@dataclass(frozen=True)
class EvalOptions:
    """What is evaluated, on what, how, and where the report goes; the fields say it themselves."""

    dataset: Annotated[
        str, typer.Option(help="voc20, voc21, coco171, coco_object, context59, ade150, cityscapes, ..., or world.")
    ]
    weights: Annotated[
        str | None,
        typer.Option("--weights", "-w", help="Weights: a converted file or its name in the cache, or an official one."),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(help="Without --weights: maskclip, sclip, clearclip, naclip, rcs or scclip."),
    ] = None
    clip: Annotated[str | None, typer.Option(help="open_clip name of that CLIP; left out: ViT-B-16.")] = None
    pretrained: Annotated[str | None, typer.Option(help="Its weights: an open_clip tag such as openai, or a file.")] = (
        None
    )
    attention: Annotated[str | None, typer.Option(help="Of maskclip, see `zs3fast segment --help`.")] = None
    protocol: Annotated[
        str | None,
        typer.Option(help="Sizes, windows, names and thresholds as published: sclip, clearclip, naclip, rcs, scclip."),
    ] = None
    refine: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1000,
            help="Steps of refinement (PAMR), of any method; without a number 10. Left out: as the protocol has it, "
            "none for trained methods.",
        ),
    ] = None
    data: Annotated[
        Path | None, typer.Option(help="Root of the dataset: VOCdevkit/VOC2012, coco_stuff164k, ...; world has none.")
    ] = None
    split: Annotated[str, typer.Option(help="val or train; of world also test.")] = "val"
    setting: Annotated[
        str | None,
        typer.Option(
            help="inductive, transductive, supervised, cross-dataset or background-undifferentiated. Left out: "
            "as the weights were trained where that was on this dataset, cross-dataset where not."
        ),
    ] = None
    trained_on: Annotated[
        str | None,
        typer.Option(help="The dataset an official checkpoint was trained on, which tells seen from unseen."),
    ] = None
    keep_trusty_token: Annotated[
        bool,
        typer.Option(
            "--keep-trusty-token", help="TagCLIP, cross-dataset: keep the token in the class list, which papers drop."
        ),
    ] = False
    text_embeddings: Annotated[
        Path | None, typer.Option(help="Prepared .npy text embeddings, a row for each class of the dataset.")
    ] = None
    templates: Annotated[
        str | None, typer.Option(help="Prompt templates: single, multi, or a sentence with {} in it.")
    ] = None
    proposer: Annotated[
        str | None,
        typer.Option(
            help="Mask proposals for MAFT: mask2former:NAME, maskformer:NAME, sam:NAME, freeseg:FILE, files:PATH, or "
            "ground_truth, the labels' own regions."
        ),
    ] = None
    upper_bound: Annotated[
        bool, typer.Option("--upper-bound", help="Of MAFT: name proposals by their IoU with the labels, not by CLIP.")
    ] = False
    crops: Annotated[str | None, typer.Option(help=CROPS_HELP)] = None
    boxes: Annotated[
        str | None,
        typer.Option(
            help="Folds by ClsCLIP+, zooming into boxes: detr:NAME, rtdetr:NAME, yolos:NAME, files:PATH.json, or "
            "ground_truth, the labels' own boxes."
        ),
    ] = None
    boxes_as_masks: Annotated[
        bool, typer.Option("--boxes-as-masks", help="Of a fold: a class's boxes are its mask, ClsCLIP is not asked.")
    ] = False
    no_box: Annotated[
        str, typer.Option(help="What a class without boxes gets: whole_image (plain ClsCLIP) or empty.")
    ] = "whole_image"
    fold: Annotated[int | None, typer.Option(help="Fold 0..3 of voc5i and coco20i, whose classes are tested.")] = None
    episodes: Annotated[str, typer.Option(help="Pairs of a fold: all, or how many to draw.")] = "all"
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Score from which a pixel belongs to the class asked for.")
    ] = 0.5
    eval_size: Annotated[
        str, typer.Option(help="Where a fold's masks are scored: original, or input (the network's, as few-shot code).")
    ] = "original"
    denominator: Annotated[
        str, typer.Option(help="Classes in a mean of IoU: gt_or_pred (truth or prediction) or gt (truth).")
    ] = "gt_or_pred"
    quantize: Annotated[str | None, typer.Option(help=QUANTIZE_HELP)] = None
    limit: Annotated[int | None, typer.Option(help="Only the first so many images (of a fold: pairs).")] = None
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path("zs3fast_eval")
    worst: Annotated[int, typer.Option(help="How many of the worst images to show in the report.")] = 10
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted evaluation in --output.")] = False
    workers: Annotated[int, typer.Option(min=0, max=256, help="Processes that read images ahead.")] = 0
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; cuda if there is one.")] = None
