"""The `zs3fast` command."""

from __future__ import annotations

import glob
import json
import logging
import os
import platform
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zs3fast.utils.console import (
    CROPS_HELP,
    QUANTIZE_HELP,
    RUN_ERROR,
    USAGE_ERROR,
    first_line,
    one_line_errors,
    progress_bar,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from zs3fast.inference.segmenter import Segmenter
    from zs3fast.text.vocabulary import ClassEntry
    from zs3fast.types import Segmentation

app = typer.Typer(
    name="zs3fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="CLIP-based zero-shot semantic segmentation: pictures and class names in, label maps out.",
)
_TRAINING_FREE = "maskclip"
_EVERYDAY = "context59"  # what a method without a training vocabulary looks for, unless told
_OUTPUT_SUFFIXES = ("_labels.png", "_overlay.png")  # of our own files, when a folder is read a second time


@app.command(
    no_args_is_help=True,
    epilog="**Example**: `zs3fast segment photos/ --weights zegclip_voc.safetensors --classes 'cat, sofa, grass'`",
)
def segment(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Pictures, folders of pictures, or globs.")],
    classes: Annotated[str | None, typer.Option("--classes", "-c", help="Class names, commas between them.")] = None,
    classes_file: Annotated[
        Path | None, typer.Option(help="Text file with one class a line; synonyms after commas, # comments.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Class list of a dataset: voc20, coco171, context59, context60 or ade150.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", "-w", help="Weights: a converted file or its name in the cache, or an official one."),
    ] = None,
    trained_on: Annotated[
        str | None,
        typer.Option(help="The dataset an official checkpoint was trained on, which tells seen from unseen."),
    ] = None,
    text_embeddings: Annotated[
        Path | None, typer.Option(help="Prepared .npy text embeddings, a row for each class of the list.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="Prompt templates: single, multi, or a sentence with {} in it.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Method of an untrained model, where no --weights are given; maskclip needs --pretrained alone."
        ),
    ] = "zegclip",
    clip: Annotated[str, typer.Option(help="open_clip name of an untrained model's CLIP.")] = "ViT-B-16",
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip tag or file with CLIP weights for an untrained model, such as openai.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="maskclip: value (a patch sees itself) or self-self (and what is like it).")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("zs3fast_out"),
    min_score: Annotated[float | None, typer.Option(help="Pixels that score lower stay unlabelled.")] = None,
    background: Annotated[str, typer.Option(help="Class names, commas between them, that stay unlabelled.")] = "",
    proposer: Annotated[
        str | None,
        typer.Option(
            help="What finds mask proposals for maft: mask2former:NAME, maskformer:NAME or sam:NAME (of huggingface.co "
            "or a folder), freeseg:FILE, or files:PATH with masks of your own."
        ),
    ] = None,
    crops: Annotated[str | None, typer.Option(help=CROPS_HELP)] = None,
    boxes: Annotated[
        str | None,
        typer.Option(
            help="clsclip: zoom into the boxes of a detector: detr:NAME, rtdetr:NAME, yolos:NAME, detector:NAME, or "
            "files:PATH.json."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; cuda if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of an untrained model's weights.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Threads that read pictures ahead, and as many that write results, while the model works; 0: none. "
            "Left out: 1 on a CPU of more than two cores, one a core (up to 8) beside a GPU.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures whose windows share the model's batches, for a GPU to be full.")
    ] = 1,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Run the model through torch.compile; pays off for many pictures.")
    ] = False,
    quantize: Annotated[str | None, typer.Option(help=QUANTIZE_HELP)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Convert the model: float32, bfloat16 or float16; half precision is for GPUs.")
    ] = None,
) -> None:
    """Segment pictures into classes given by name.

    For each picture three files are written: NAME_labels.png (class indices; 255 = unlabelled, 65535 for more than 255
    classes), NAME_overlay.png (the picture under its colours, with a legend) and NAME.json (a summary).
    """
    from zs3fast.inference.streaming import ITEM_ERRORS, ahead, default_workers, working_on

    with one_line_errors(USAGE_ERROR):
        pictures = _find_pictures(inputs)
        entries = _class_list(classes, classes_file, dataset)
        if entries is None and weights is None and text_embeddings is None and method == _TRAINING_FREE:
            entries = _class_list(None, None, _EVERYDAY)
            stderr.print(f"[yellow]note[/]: no class list given, so the {len(entries)} names of {_EVERYDAY} compete")
        segmenter = _segmenter(
            entries,
            weights=weights,
            trained_on=trained_on,
            text_embeddings=text_embeddings,
            templates=templates,
            method=method,
            clip=clip,
            pretrained=pretrained,
            attention=attention,
            proposer=proposer,
            crops=crops,
            boxes=boxes,
            device=_device(device),
            seed=seed,
            compile_=compile_,
            quantize=quantize,
            dtype=dtype,
        )
        workers = default_workers(segmenter.device) if workers is None else workers
        failures: dict[Path, Exception] = {}  # one bad picture does not end the run
        results = segmenter.stream(
            pictures,
            min_score=min_score,
            background=background,
            batch_size=batch_size,
            workers=workers,
            failed=failures.__setitem__,
        )
        output.mkdir(parents=True, exist_ok=True)
    stems = _distinct_stems(pictures)

    def write(result: tuple[Path, Segmentation]) -> str:
        picture, segmentation = result
        with working_on(picture):
            overlay = write_result(segmentation, output / stems[picture])
        return f"{escape(str(picture))} -> {escape(str(overlay))}: {escape(_in_words(segmentation))}"

    with (
        progress_bar() as progress,
        _warnings_by_picture(),
        closing(results),
        closing(ahead(results, write, workers)) as all_,
    ):
        task, written = progress.add_task("Segmenting", total=len(pictures)), 0
        for (picture, _), outcome in all_:
            try:
                progress.console.print(outcome.result())
                written += 1
            except ITEM_ERRORS as error:
                failures[picture] = error
            progress.update(task, completed=written + len(failures))
    for picture in filter(failures.__contains__, pictures):
        stderr.print(f"[red]failed[/] {escape(str(picture))}: {escape(first_line(failures[picture]))}")
    done = len(pictures) - len(failures)
    stdout.print(f"{done} of {len(pictures)} pictures segmented, results in {escape(str(output))}")
    if failures:
        raise typer.Exit(RUN_ERROR)


@app.command(
    no_args_is_help=True,
    epilog="**Example**: `zs3fast convert voc_inductive.pth zegclip_voc.safetensors --trained-on voc20`",
)
def convert(
    official: Annotated[Path, typer.Argument(help="Official checkpoint (.pth).")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    trained_on: Annotated[
        str | None,
        typer.Option(help="The dataset it was trained on; its class list and split travel with the weights."),
    ] = None,
    seen_offset: Annotated[
        float | None, typer.Option(help="Taken off the scores of seen classes; 0 for self-trained checkpoints.")
    ] = None,
) -> None:
    """Convert an official checkpoint into one safetensors file that holds its configuration too.

    A text tower inside the checkpoint is kept, so the file can embed class names by itself.
    """
    from zs3fast.inference.segmenter import read_official
    from zs3fast.weights import save

    with one_line_errors(USAGE_ERROR):
        if out.suffix != ".safetensors":
            raise ValueError(f"out: expected a .safetensors file, got {out}")
        options = _training_vocabulary(trained_on)
        if seen_offset is not None:
            options["seen_offset"] = seen_offset
        model, tower = read_official(official, **options)
    with one_line_errors(RUN_ERROR):
        save(model, out, tower)
    seen = (
        f"{len(model.seen)} of {model.num_classes} classes seen" if trained_on else "training vocabulary not recorded"
    )
    text = "with its text tower" if tower else "without a text tower"
    stdout.print(f"{escape(str(out))}: {model.config['method']}, {model.image_size} pixels, {seen}, {text}")


@app.command(epilog="**Example**: `zs3fast info`")
def info() -> None:
    """Show what is installed and built, what each op would run on and why not elsewhere, weights and caches."""
    import torch

    import zs3fast
    from zs3fast.ops import _dispatch, _extension
    from zs3fast.text import cache_dir

    facts = Table.grid(padding=(0, 2))
    facts.add_row("zs3fast", f"{zs3fast.__version__} in {Path(zs3fast.__file__).parent}")
    facts.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "open_clip_torch", "safetensors", "transformers"):
        facts.add_row(package, _version(package))
    facts.add_row("extension", ", ".join(f"{key} {value}" for key, value in _extension.info().items()))
    facts.add_row("backend", f"{_dispatch.requested_backend()} (ZS3FAST_BACKEND)")
    facts.add_row("devices", ", ".join([f"cpu ({torch.get_num_threads()} threads)", *_cuda_devices()]))
    facts.add_row("methods", ", ".join(zs3fast.list_models()))
    facts.add_row("cache", f"{cache_dir()} (ZS3FAST_CACHE)")
    facts.add_row("  weights", _listing(cache_dir() / "weights"))
    facts.add_row("  text embeddings", _listing(cache_dir() / "text", names=False))
    stdout.print(facts)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        stdout.print(_backend_table(device))


def _mount() -> None:
    """The commands of the other rooms, whose modules import only what a help text needs."""
    from zs3fast.data import command as data
    from zs3fast.evaluation import command as evaluation
    from zs3fast.tiny import demo
    from zs3fast.training import command as training

    app.command("demo", epilog=demo.EPILOG)(demo.demo)
    app.command("train", epilog=training.EPILOG)(training.train)
    app.command("eval", no_args_is_help=True, epilog=evaluation.EPILOG)(evaluation.evaluate)
    data_app = typer.Typer(no_args_is_help=True, help="Datasets on disk.")
    data_app.callback()(lambda: None)  # keeps "check" a sub-command
    data_app.command("check", no_args_is_help=True, epilog=data.EPILOG)(data.data_check)
    app.add_typer(data_app, name="data")


def _segmenter(
    entries: list[ClassEntry] | None,
    *,
    weights: str | None,
    trained_on: str | None,
    text_embeddings: Path | None,
    templates: str | None,
    method: str,
    clip: str,
    pretrained: str | None,
    attention: str | None,
    proposer: str | None,
    crops: str | None,
    boxes: str | None,
    device: str,
    seed: int,
    compile_: bool,
    quantize: str | None,
    dtype: str | None,
) -> Segmenter:
    import torch

    from zs3fast.inference.segmenter import TINY, Segmenter, find_weights, is_converted
    from zs3fast.models.registry import create_model
    from zs3fast.proposals import load_box_proposer, load_mask_proposer
    from zs3fast.text import TextEncoder, load_text_embeddings

    options = {
        "class_names": entries,
        "templates": templates,
        "device": device,
        "crops": crops,
        "compile": compile_,
        "quantize": quantize,
        "dtype": None if dtype is None else getattr(torch, dtype, dtype),
    }
    options["proposer"] = None if proposer is None else load_mask_proposer(proposer, device)
    options["boxes"] = None if boxes is None else load_box_proposer(boxes, device)
    if text_embeddings is not None:
        options["text_embeddings"] = load_text_embeddings(text_embeddings, None if entries is None else len(entries))
    if attention is not None and (weights is not None or method != _TRAINING_FREE):
        raise ValueError(f"--attention is for --method {_TRAINING_FREE} without --weights, got {attention!r}")
    if weights is not None:
        path = find_weights(weights)
        if weights.startswith(TINY):
            _note_strange_words(weights, entries or ())
        if is_converted(path) and trained_on is not None:
            raise ValueError(f"--trained-on is for official checkpoints, {path} knows its own training vocabulary")
        if not is_converted(path) and trained_on is None:
            stderr.print("[yellow]note[/]: no --trained-on for an official checkpoint, so no class counts as seen")
        segmenter = Segmenter.from_pretrained(path, **options, official=_training_vocabulary(trained_on))
    else:
        if entries is None:
            raise ValueError("expected class names: give --classes, --classes-file or --dataset")
        torch.manual_seed(seed)
        special = {} if attention is None else {"attention": attention}
        model = create_model(method, clip=clip, pretrained=pretrained, seen=[], num_classes=len(entries), **special)
        if text_embeddings is None:
            with _quiet("zs3fast"):  # the note below says it for image and text at once
                options["text_encoder"] = TextEncoder.from_open_clip(clip, pretrained).to(device)
        segmenter = Segmenter(model, **options)
        if pretrained is None or model.trainable():
            what = "the decoder's" if pretrained else "all"
            stderr.print(
                f"[yellow]untrained[/]: no --weights given, so {what} weights are random (seed {seed}) and the labels "
                "mean nothing. This run only shows that the parts work"
            )
    if entries is None and segmenter.classes is None:
        raise ValueError("expected class names: these weights carry none, give --classes, --classes-file or --dataset")
    return segmenter


def _note_strange_words(weights: str, entries: Iterable[ClassEntry]) -> None:
    """Say which names the small models in the package have not met."""
    from zs3fast.data.world.vocabulary import WORDS

    strange = [entry[0] for entry in entries if not WORDS.issuperset(" ".join(entry).lower().split())]
    if strange:
        names = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "")
        stderr.print(
            f"[yellow]note[/]: {weights} has seen painted scenes alone and does not know {escape(names)}; photographs "
            "need other weights"
        )


def write_result(result: Segmentation, target: Path) -> Path:
    """Write a picture's three files, TARGET_labels.png, TARGET_overlay.png and TARGET.json; the overlay's path."""
    from zs3fast.utils.files import replacing
    from zs3fast.utils.rendering import save_picture

    labels, overlay, summary = (target.parent / f"{target.name}{end}" for end in (*_OUTPUT_SUFFIXES, ".json"))
    result.save(labels)
    save_picture(result.overlay(), overlay)
    content = {**result.to_dict(), "labels": labels.name, "overlay": overlay.name}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if any("\ud800" <= character <= "\udfff" for character in text):  # a file name that is not UTF-8
        text = json.dumps(content, indent=1) + "\n"
    with replacing(summary) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return overlay


@contextmanager
def _warnings_by_picture() -> Iterator[None]:
    """Within the block, warnings of any thread are a line each, with the picture they are about."""
    from zs3fast.inference.streaming import current_item

    def show(message: Warning | str, *_: object, **__: object) -> None:
        picture = current_item()
        whose = "" if picture is None else f" {escape(str(picture))}:"
        stderr.print(f"[yellow]warning[/]{whose} {escape(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _in_words(result: Segmentation) -> str:
    classes = sorted(result.to_dict()["classes"], key=lambda entry: -entry["pixels"])
    present = [f"{entry['name']} {entry['percent']:.0f} %" for entry in classes if entry["pixels"]]
    more = f", and {len(present) - 4} more" if len(present) > 4 else ""
    return ", ".join(present[:4]) + more or "nothing labelled"


def _class_list(classes: str | None, classes_file: Path | None, dataset: str | None) -> list[ClassEntry] | None:
    from zs3fast.text import class_names, parse_classes, read_class_file

    given = {"--classes": classes, "--classes-file": classes_file, "--dataset": dataset}
    given = [option for option, value in given.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"expected one class list, got {' and '.join(given)}")
    if classes is not None:
        return parse_classes(classes, "--classes")
    if classes_file is not None:
        return read_class_file(classes_file)
    if dataset is None:
        return None
    from zs3fast.data.registered import described_classes

    return described_classes(dataset) or [(name,) for name in class_names(dataset)]


def _training_vocabulary(trained_on: str | None) -> dict[str, object]:
    """What `load_official` should know of the dataset a checkpoint was trained on."""
    from zs3fast.text import class_names, seen_classes

    if trained_on is None:
        return {}
    names = class_names(trained_on)
    return {"class_names": names, "num_classes": len(names), "seen": seen_classes(trained_on)}


def _find_pictures(inputs: Sequence[str]) -> list[Path]:
    """Files as given, the images of folders, what globs match; each once, in order."""
    from zs3fast.utils.images import image_files

    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            matches, unread = image_files(path.iterdir())
        elif path.exists() or not glob.has_magic(text):
            matches, unread = [path], []  # a file that is not there is reported with the other failures
        else:
            matches, unread = image_files(Path(match) for match in glob.glob(text, recursive=True))
        matches = [match for match in matches if match == path or not match.name.endswith(_OUTPUT_SUFFIXES)]
        left_out = _left_out(unread)
        if not matches:
            raise ValueError(f"INPUT: no pictures in {text}{f'; {left_out}' if left_out else ''}")
        if left_out:
            stderr.print(f"[yellow]note[/] {escape(text)}: {escape(left_out)}")
        found.update(dict.fromkeys(matches))
    return list(found)


def _left_out(unread: list[Path]) -> str:
    if not unread:
        return ""
    suffixes = ", ".join(sorted({path.suffix.lower() for path in unread}))
    which = unread[0].name if len(unread) == 1 else f"{len(unread)} files, such as {unread[0].name}, are"
    return f"{which}{' is' if len(unread) == 1 else ''} left out, as Pillow does not read {suffixes}"


def _distinct_stems(pictures: list[Path]) -> dict[Path, str]:
    """Names of the results: the picture's stem, with a number where another picture has it (on any file system)."""
    natural = {_stem(picture).casefold() for picture in pictures}
    used: set[str] = set()
    stems = {}
    for picture in pictures:
        stem, number = _stem(picture), 1
        while stem.casefold() in used or (number > 1 and stem.casefold() in natural):
            number += 1
            stem = _stem(picture, f"-{number}")
        used.add(stem.casefold())
        stems[picture] = stem
        if number > 1:
            stderr.print(f"[yellow]note[/] {escape(str(picture))}: results are named {escape(stem)}, its own is taken")
    return stems


def _stem(picture: Path, end: str = "") -> str:
    """What the names of a picture's results begin with: its stem (never "." or "..", nor hidden), as long as fits."""
    stem = picture.stem.lstrip(".") or "picture"
    while len(os.fsencode(stem + end)) + max(map(len, _OUTPUT_SUFFIXES)) > 255:  # bytes are what is counted
        stem = stem[:-1]
    return stem + end


def _device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {device!r} cannot be used here ({first_line(error)})") from None
    return device


def _backend_table(device: str) -> Table:
    """For every op and backend, what it has against a float32 request on this device."""
    import torch

    from zs3fast import ops  # noqa: F401 - registers them
    from zs3fast.ops import _dispatch

    table = Table(title=f"float32 on {device}", title_justify="left", show_lines=True)
    for heading in ("op", "auto takes", *_dispatch.BACKENDS):
        table.add_column(heading, overflow="fold")
    request = torch.zeros(1, 8, 16, 64, device=device)
    for op in _dispatch.registered():
        if op.endswith("_backward"):
            continue
        reasons = {backend: _dispatch.objections(op, backend, request) for backend in _dispatch.BACKENDS}
        chosen = next(backend for backend in _dispatch.BACKENDS if not reasons[backend])
        table.add_row(op, chosen, *("; ".join(reasons[backend]) or "yes" for backend in _dispatch.BACKENDS))
    return table


def _cuda_devices() -> list[str]:
    import torch

    return [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]


def _listing(folder: Path, names: bool = True) -> str:
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 2**20
    listed = f": {', '.join(file.stem for file in files)}" if names and files else ""
    return f"{len(files)} files, {size:.1f} MiB{listed}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_mount()
