"""`zs3fast figures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from zs3fast.utils import cli_options as options
from zs3fast.utils.console import RUN_ERROR, USAGE_ERROR, first_line, one_line_errors, stderr, stdout

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
        from zs3fast.inference.figures import FIGURES, compared, figure
        from zs3fast.inference.results import distinct_stems, find_images
        from zs3fast.models.registry import model_class
        from zs3fast.utils.errors import FileFormatError
        from zs3fast.utils.files import expect_folder
        from zs3fast.utils.options import one_of
        from zs3fast.utils.rendering import save_image
        from zs3fast.utils.sheets import sheet

        one_of("METHOD", method, (*FIGURES, COMPARE))
        images = find_images(inputs)
        expect_folder(output, "output")
        if method != COMPARE and weights is not None and len(weights) > 1:
            raise ValueError(f"--weights: expected one file for {method}, got {len(weights)}; compare takes several")
        if weights is None:
            one_image = [name for name in FIGURES if model_class(name).protocol != "proposals"]
            small = one_image if method == COMPARE else [method]
            weights = [f"zs3fast-tiny-{name}" for name in small]
            stderr.print("[yellow]note[/]: no --weights, so small models draw, which have seen painted scenes alone")
        if classes is not None and classes_file is not None:
            raise ValueError("expected one class list, got --classes and --classes-file")
        if proposer is not None and method != COMPARE and model_class(method).protocol != "proposals":
            raise ValueError(f"proposer: {method} takes no mask proposals, expected none, got {proposer!r}")
        names = (classes, classes_file, text_embeddings, trained_on)
        segmenters = [_segmenter(one, *names, proposer, device) for one in weights]
        if segmenters[0].classes is None:
            raise ValueError(f"expected class names: {weights[0]} carries none, give --classes or --classes-file")
        got = segmenters[0].model.method
        if method not in (got, COMPARE):
            raise ValueError(f"METHOD: expected {got}, as {weights[0]} holds, got {method}")
        named = [(Path(one).stem, segmenter) for one, segmenter in zip(weights, segmenters, strict=True)]
        stems = distinct_stems(images)
        rows, failed = [], {}  # one bad file does not end the run
        for image in images:
            try:
                if method == COMPARE:
                    rows.append(compared(named, image))
                    continue
                path = output / f"{stems[image]}_{method}.png"
                save_image(figure(segmenters[0], image, most=most), path)
                stdout.print(f"{escape(str(image))} -> {escape(str(path))}")
            except (FileFormatError, OSError) as error:
                failed[image] = first_line(error)
        if rows:
            save_image(sheet(rows), output / "compare.png")
            stdout.print(f"{len(rows)} images by {len(named)} models -> {escape(str(output / 'compare.png'))}")
    for image, reason in failed.items():
        stderr.print(f"[red]failed[/] {escape(str(image))}: {escape(reason)}")
    if failed:
        raise typer.Exit(RUN_ERROR)


def _segmenter(
    weights: str,
    classes: str | None,
    classes_file: Path | None,
    text_embeddings: Path | None,
    trained_on: str | None,
    proposer: str | None,
    device: str | None,
) -> Any:
    from zs3fast.inference.loading import find_weights, is_converted
    from zs3fast.inference.segmenter import Segmenter
    from zs3fast.proposals import load_mask_proposer
    from zs3fast.text import load_text_embeddings, parse_classes, read_class_file
    from zs3fast.text.class_lists import training_vocabulary
    from zs3fast.utils.distributed import usable_device

    where = usable_device(device)
    path, official = find_weights(weights), {}
    if trained_on is not None:
        if is_converted(path):
            raise ValueError(f"trained_on: expected an official checkpoint, got {path}, which knows its own vocabulary")
        official = training_vocabulary(trained_on)
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
