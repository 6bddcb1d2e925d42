"""`zs3fast figures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from zs3fast.utils import cli_options as options
from zs3fast.utils.console import USAGE_ERROR, one_line_errors, stderr, stdout

EPILOG = (
    "**Examples**: `zs3fast figures tagclip photo.jpg -w tagclip_voc.safetensors --classes 'cat, sofa, wall'`, or "
    "`zs3fast figures compare photos/ -w zegclip.safetensors -w tagclip.safetensors`"
)
COMPARE = "compare"


def figures(
    method: Annotated[
        str,
        typer.Argument(
            help="tagclip: its trusty map; clip_rc: its regions' classes; clsclip: [CLS] attention by layer; maft: "
            "five classes a proposal; compare: the labels of several weights side by side."
        ),
    ],
    inputs: options.Inputs,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            "-w",
            help="Weights, as for `segment`; compare takes several. Left out: the small model in the package, which "
            "knows painted scenes alone.",
        ),
    ] = None,
    classes: options.Classes = None,
    classes_file: options.ClassesFile = None,
    text_embeddings: options.TextEmbeddings = None,
    trained_on: options.TrainedOn = None,
    proposer: options.Proposer = None,
    most: Annotated[int, typer.Option(min=1, help="Classes of clsclip, or proposals of maft, that are shown.")] = 6,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the figures.")] = Path("zs3fast_figures"),
    device: options.Device = None,
) -> None:
    """Draw what a method's paper shows of it, or weights side by side, on images of one's own.

    Written: NAME_METHOD.png for each image, or compare.png, a row an image.
    """
    with one_line_errors(USAGE_ERROR):
        from zs3fast.inference.figures import FIGURES, figure, side_by_side
        from zs3fast.inference.results import distinct_stems, find_images
        from zs3fast.models.registry import model_class
        from zs3fast.utils.options import one_of
        from zs3fast.utils.rendering import save_image

        one_of("METHOD", method, (*FIGURES, COMPARE))
        images = find_images(inputs)
        if method != COMPARE and weights is not None and len(weights) > 1:
            raise ValueError(f"--weights: expected one file for {method}, got {len(weights)}; compare takes several")
        if weights is None:
            one_image = [name for name in FIGURES if model_class(name).protocol != "proposals"]
            small = one_image if method == COMPARE else [method]
            weights = [f"zs3fast-tiny-{name}" for name in small]
            stderr.print("[yellow]note[/]: no --weights, so small models draw, which have seen painted scenes alone")
        if classes is not None and classes_file is not None:
            raise ValueError("expected one class list, got --classes and --classes-file")
        names = (classes, classes_file, text_embeddings, trained_on)
        segmenters = [_segmenter(one, *names, proposer, device) for one in weights]
        if segmenters[0].classes is None:
            raise ValueError(f"expected class names: {weights[0]} carries none, give --classes or --classes-file")
        got = segmenters[0].model.method
        if method not in (got, COMPARE):
            raise ValueError(f"METHOD: expected {got}, as {weights[0]} holds, got {method}")
        output.mkdir(parents=True, exist_ok=True)
        if method == COMPARE:
            named = [(Path(one).stem, segmenter) for one, segmenter in zip(weights, segmenters, strict=True)]
            path = output / "compare.png"
            save_image(side_by_side(named, images), path)
            stdout.print(f"{len(images)} images by {len(named)} models -> {escape(str(path))}")
            return
        stems = distinct_stems(images)
        for image in images:
            path = output / f"{stems[image]}_{method}.png"
            save_image(figure(segmenters[0], image, most=most), path)
            stdout.print(f"{escape(str(image))} -> {escape(str(path))}")


def _segmenter(
    weights: str,
    classes: str | None,
    classes_file: Path | None,
    text_embeddings: Path | None,
    trained_on: str | None,
    proposer: str | None,
    device: str | None,
) -> Any:
    import torch

    from zs3fast.inference.loading import find_weights, is_converted
    from zs3fast.inference.segmenter import Segmenter
    from zs3fast.proposals import load_mask_proposer
    from zs3fast.text import class_names, load_text_embeddings, parse_classes, read_class_file, seen_classes

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path, official = find_weights(weights), {}
    if trained_on is not None and not is_converted(path):
        names = class_names(trained_on)
        official = {"class_names": names, "num_classes": len(names), "seen": seen_classes(trained_on)}
    entries = None if classes is None else parse_classes(classes, "--classes")
    entries = entries if classes_file is None else read_class_file(classes_file)
    given: dict[str, Any] = {"class_names": entries, "official": official, "device": where}
    if text_embeddings is not None:
        given["text_embeddings"] = load_text_embeddings(text_embeddings, None if entries is None else len(entries))
    if proposer is not None and _takes_proposals(path):
        given["proposer"] = load_mask_proposer(proposer, where)
    return Segmenter.from_pretrained(path, **given)


def _takes_proposals(path: Path) -> bool:
    """Whether weights are of a method that takes proposals."""
    from zs3fast.models.registry import list_models, model_class
    from zs3fast.utils.checkpoint_io import read_metadata, read_state_dict
    from zs3fast.weights.files import METADATA_KEY
    from zs3fast.weights.official import detect_method

    kept = read_metadata(path).get(METADATA_KEY) if path.suffix == ".safetensors" else None
    method = detect_method(list(read_state_dict(path))) if kept is None else json.loads(kept).get("method")
    return method in list_models() and model_class(method).protocol == "proposals"
