"""`zs3fast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from zs3fast.utils.console import RUN_ERROR, USAGE_ERROR, one_line_errors, stdout

EPILOG = "**Example**: `zs3fast export zs3fast-tiny --classes 'red sand, star' model.onnx`"


def export(
    weights: Annotated[str, typer.Argument(help="Weights: a converted file, its name in the cache, or zs3fast-tiny.")],
    out: Annotated[
        Path, typer.Argument(help="The file: .onnx, .xml (OpenVINO), .pt2 (torch.export) or .aoti.pt2 (AOTInductor).")
    ],
    classes: Annotated[
        str | None, typer.Option("--classes", "-c", help="Class names, commas between them; left out: the model's own.")
    ] = None,
    classes_as: Annotated[
        str, typer.Option(help="baked: into the graph; input: text embeddings [C, D] are its second input.")
    ] = "baked",
    result: Annotated[str, typer.Option("--output", help="labels (with scores) or mask_logits.")] = "labels",
    height: Annotated[int | None, typer.Option(help="Of the images, in pixels; left out: the model's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the images, in pixels; left out: the model's own.")] = None,
    any_size: Annotated[
        bool, typer.Option("--any-size", help="A graph for images of any size in whole patches (ONNX and OpenVINO).")
    ] = False,
    one_image: Annotated[bool, typer.Option("--one-image", help="A graph for one image, not for any batch.")] = False,
    images: Annotated[
        list[str] | None, typer.Option("--image", help="Images to compare file and model on, besides noise.")
    ] = None,
) -> None:
    """Write a model as a graph for another runtime, and hold the file to the model at once.

    Prints the largest difference of scores and the share of labels that agree; fails beyond 1e-4 or below 99.9 %.
    """
    with one_line_errors(USAGE_ERROR):
        import torch

        from zs3fast.inference.export import ExportError, export_model
        from zs3fast.inference.loading import find_weights, read_weights
        from zs3fast.inference.segmenter import Segmenter
        from zs3fast.utils.images import read_image
        from zs3fast.utils.resizing import bilinear

        if (height is None) != (width is None):
            raise ValueError("--height and --width: expected both or neither, got one")
        if classes_as not in ("baked", "input"):
            raise ValueError(f"--classes-as: expected baked or input, got {classes_as!r}")
        read, tower = read_weights(find_weights(weights), {}, device="cpu")
        needs: dict[str, Any] = {"proposer": _regions_are_an_input} if read.protocol == "proposals" else {}
        segmenter = Segmenter(read, text_encoder=tower, device="cpu", dtype=torch.float32, **needs)
        model = segmenter.model
        size = None if height is None or width is None else (height, width)
        side = size or (model.image_size, model.image_size)
        pixels = [torch.from_numpy(read_image(image)[0]) for image in images or ()]
        shown = [bilinear(image, side).permute(2, 0, 1).contiguous() for image in pixels]
        text = segmenter.embed(classes)
        try:
            report = export_model(
                model,
                text,
                out,
                output=result,
                classes=classes_as,
                dynamic_batch=not one_image,
                size=size,
                any_size=any_size,
                images=shown,
            )
        except ExportError:  # nothing was asked for wrongly
            with one_line_errors(RUN_ERROR):
                raise
    stdout.print(escape(str(report)))


def _regions_are_an_input(*_: Any) -> NoReturn:
    """In place of MAFT's proposer: a graph is given proposals, and nothing here looks for any."""
    raise NotImplementedError("proposals are an input of the graph")
