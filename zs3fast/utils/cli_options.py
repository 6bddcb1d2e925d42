"""The command line's options that several commands have, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zs3fast.utils.console import QUANTIZE_HELP

CLIP_NOTE = "of the default method, or of an untrained model"

Inputs = Annotated[list[str], typer.Argument(metavar="INPUT...", help="Images, folders of images, or globs.")]
Classes = Annotated[str | None, typer.Option("--classes", "-c", help="Class names, commas between them.")]
ClassesFile = Annotated[
    Path | None,
    typer.Option(help="Text file with one class a line; synonyms after commas, # comments. JSON and CSV are read too."),
]
ClassDataset = Annotated[
    str | None, typer.Option(help="Class list of a dataset: voc20, coco171, context59, context60 or ade150.")
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        help="Weights: a converted file or its name in the cache, or an official one. Left out: OpenAI's CLIP, by a "
        "method that needs no training.",
    ),
]
TrainedOn = Annotated[
    str | None, typer.Option(help="The dataset an official checkpoint was trained on, which tells seen from unseen.")
]
TextEmbeddings = Annotated[
    Path | None, typer.Option(help="Prepared .npy text embeddings, a row for each class of the list.")
]
Templates = Annotated[str | None, typer.Option(help="Prompt templates: single, multi, or a sentence with {} in it.")]
Method = Annotated[
    str | None,
    typer.Option(help="Method without training, such as maskclip; with --untrained any. Where no --weights are given."),
]
TrainingFree = Annotated[str | None, typer.Option(help="Method without training, where no --weights are given.")]
Clip = Annotated[str | None, typer.Option(help=f"open_clip name of the CLIP {CLIP_NOTE}; left out: ViT-B-16.")]
Pretrained = Annotated[
    str | None, typer.Option(help=f"open_clip tag or file with the weights of the CLIP {CLIP_NOTE}; left out: openai.")
]
QuickGelu = Annotated[
    bool | None,
    typer.Option(
        "--quick-gelu/--no-quick-gelu",
        help="The activation of a --pretrained file that does not say it: OpenAI's or not.",
    ),
]
Untrained = Annotated[bool, typer.Option("--untrained", help="Run on random weights, to see that the parts work.")]
Attention = Annotated[str | None, typer.Option(help="maskclip: attention of the last block, value or another's.")]
Protocol = Annotated[
    str | None,
    typer.Option(
        help="Sizes, windows, sentences and thresholds of a method without training, as published: sclip, clearclip, "
        "naclip, rcs, scclip or maskclip. Left out: the method's own."
    ),
]
Refine = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=1000,
        help="Steps of refinement (PAMR): near pixels of like colour share their scores; without a number 10, the "
        "published ones. Left out: as the protocol has it, none for trained methods.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
MinScore = Annotated[float | None, typer.Option(help="Pixels that score lower stay unlabelled.")]
Background = Annotated[
    str,
    typer.Option(
        help="Class names, commas between them, that compete and stay unlabelled; auto: a built-in list of what photos "
        "show (sky, wall, tree, ...) but for your own classes."
    ),
]
Proposer = Annotated[
    str | None,
    typer.Option(
        help="What finds mask proposals for maft: mask2former:NAME, maskformer:NAME or sam:NAME (of huggingface.co "
        "or a folder), freeseg:FILE, or files:PATH with masks of your own."
    ),
]
Crops = Annotated[
    str | None,
    typer.Option(help="maft: classify proposals by a CLIP pass each, the baseline: mask, crop or mask_crop."),
]
Boxes = Annotated[
    str | None,
    typer.Option(
        help="clsclip: zoom into the boxes of a detector: detr:NAME, rtdetr:NAME, yolos:NAME, detector:NAME, or "
        "files:PATH.json."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; cuda if there is one.")]
Seed = Annotated[int, typer.Option(help="Seed of an untrained model's weights.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        max=256,
        help="Threads that read images ahead, and as many that write results, while the model works; 0: none. "
        "Left out: 1 on a CPU of more than two cores, one a core (up to 8) beside a GPU.",
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, max=65536, help="Images whose windows share the model's batches, for a GPU to be full.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Run the model through torch.compile; pays off for many images.")
]
Quantize = Annotated[str | None, typer.Option(help=QUANTIZE_HELP)]
Dtype = Annotated[
    str,
    typer.Option(help="Type the model runs in: float32, bfloat16, float16, or auto: bfloat16 where that is faster."),
]
Legend = Annotated[bool, typer.Option("--legend/--no-legend", help="A legend beside the overlay.")]
Blend = Annotated[float, typer.Option(min=0.0, max=1.0, help="How much of its colour covers a class in the overlay.")]
Official = Annotated[Path, typer.Argument(help="Official checkpoint (.pth).")]
Converted = Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")]
LearnedOn = Annotated[
    str | None,
    typer.Option(
        "--trained-on", help="The dataset it was trained on; its class list and split travel with the weights."
    ),
]
SeenOffset = Annotated[
    float | None, typer.Option(help="Taken off the scores of seen classes; 0 for self-trained checkpoints.")
]
Address = Annotated[str | None, typer.Option(help="A Ray cluster's address, or auto; left out: Ray on this machine.")]
