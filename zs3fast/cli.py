"""The `zs3fast` command. It imports what a help text needs; what does the work is imported by the work."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import platform
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from zs3fast._version import __version__
from zs3fast.inference.results import distinct_stems, find_images, in_words, warnings_by_image, write_result
from zs3fast.utils import cli_options as options
from zs3fast.utils.console import (
    INTERRUPTED,
    RUN_ERROR,
    USAGE_ERROR,
    by_interrupt,
    first_line,
    one_line_errors,
    progress_bar,
    stderr,
    stdout,
)
from zs3fast.utils.constants import REFINE_STEPS

if TYPE_CHECKING:
    from typer._click.core import Command, Context

    from zs3fast.inference.segmenter import Segmenter
    from zs3fast.text.vocabulary import ClassEntry
    from zs3fast.types import Segmentation
    from zs3fast.utils.distributed import DistEnv

_EVERYDAY = "context59"  # what a method without a training vocabulary looks for, unless told
_PATIENCE = timedelta(days=30)  # of a process that is done, for the others
_SHORT_LIST = 8  # classes that hardly name everything in a photo


class Elsewhere(NamedTuple):
    """A command of another room, imported when it is called.

    module, function: where it is.  help: the first line of its help text.  needs_arguments: shows its help without any.
    group: it is a group of commands, of which this one is `function`'s.
    """

    module: str
    function: str
    help: str
    needs_arguments: bool = False
    group: str | None = None


ELSEWHERE = {
    "demo": Elsewhere(
        "zs3fast.tiny.demo",
        "demo",
        "Segment scenes of the procedural world with every method, print scores, draw an image.",
    ),
    "train": Elsewhere("zs3fast.training.command", "train", "Train a method as published."),
    "eval": Elsewhere(
        "zs3fast.evaluation.command",
        "evaluate",
        "Score weights on a dataset and set the result beside the published one.",
        True,
    ),
    "export": Elsewhere(
        "zs3fast.inference.export_command",
        "export",
        "Write a model as a graph for another runtime, and hold the file to the model at once.",
        True,
    ),
    "figures": Elsewhere(
        "zs3fast.inference.figures_command",
        "figures",
        "Draw what a method's paper shows of it, or weights side by side, on images of one's own.",
        True,
    ),
    "bulk": Elsewhere(
        "zs3fast.inference.bulk_command",
        "bulk",
        "Segment any number of images on Ray into Parquet shards, each exactly once.",
        True,
    ),
    "serve": Elsewhere(
        "zs3fast.inference.serve_command",
        "serve",
        "Answer images with label maps over HTTP, on Ray Serve: POST /segment, GET /health.",
    ),
    "app": Elsewhere(
        "zs3fast.app.command",
        "app",
        "Show a page for one photo at a time: drop it, type words, see which pixels are which.",
    ),
    "data": Elsewhere("zs3fast.data.command", "data_check", "Datasets on disk.", True, "check"),
}
_STYLE: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": "markdown"}


class _LazyGroup(TyperGroup):
    """Shows the commands of other rooms by their first lines, and imports one when it is called."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_steps(args))

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        name = args[0] if args else ""
        if name in ELSEWHERE:
            self.commands[name] = load_command(name)
        return super().resolve_command(ctx, args)


def _with_steps(args: list[str]) -> list[str]:
    """The command line with the published number behind each --refine that has none; Typer has no such options."""
    out: list[str] = []
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        out.append(arg)
        if arg == "--refine" and not following.lstrip("-").isdecimal():
            out.append(str(REFINE_STEPS))
    return out


def load_command(name: str) -> Command:
    """The command `name` of `ELSEWHERE`."""
    place = ELSEWHERE[name]
    module = importlib.import_module(place.module)
    single = typer.Typer(**_STYLE, no_args_is_help=place.group is not None, help=place.help)
    if place.group is not None:
        single.callback()(lambda: None)  # keeps it a group
    single.command(place.group or name, epilog=module.EPILOG, no_args_is_help=place.needs_arguments)(
        getattr(module, place.function)
    )
    command = typer.main.get_command(single)
    command.name = name
    return command


def _show_version(value: bool) -> None:
    if value:
        stdout.print(f"zs3fast {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="zs3fast",
    epilog="Ends with 0: all is done; 1: it went wrong on the way, for some of the images or because a disk is full; "
    "2: what was asked for is wrong or cannot be had here; 130: interrupted.",
    cls=_LazyGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **_STYLE,
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """CLIP-based zero-shot semantic segmentation: images and class names in, label maps out."""


@app.command(no_args_is_help=True, epilog="**Example**: `zs3fast segment photo.jpg --classes 'cat, sofa, grass'`")
def segment(
    inputs: options.Inputs,
    classes: options.Classes = None,
    classes_file: options.ClassesFile = None,
    dataset: options.ClassDataset = None,
    weights: options.Weights = None,
    trained_on: options.TrainedOn = None,
    text_embeddings: options.TextEmbeddings = None,
    templates: options.Templates = None,
    method: options.Method = None,
    clip: options.Clip = None,
    pretrained: options.Pretrained = None,
    quick_gelu: options.QuickGelu = None,
    untrained: options.Untrained = False,
    attention: options.Attention = None,
    protocol: options.Protocol = None,
    refine: options.Refine = None,
    output: options.Output = Path("zs3fast_out"),
    min_score: options.MinScore = None,
    background: options.Background = "",
    proposer: options.Proposer = None,
    crops: options.Crops = None,
    boxes: options.Boxes = None,
    device: options.Device = None,
    seed: options.Seed = 0,
    workers: options.Threads = None,
    batch_size: options.BatchSize = 1,
    compile_: options.Compile = False,
    quantize: options.Quantize = None,
    dtype: options.Dtype = "auto",
    legend: options.Legend = True,
    blend: options.Blend = 0.6,
) -> None:
    """Segment images into classes given by name.

    For each image three files are written: NAME_labels.png (class indices; 255 = unlabelled, 65535 for more than 255
    classes), NAME_overlay.png (the image under its colours, with a legend) and NAME.json (a summary).
    Under `torchrun --nproc-per-node 4 -m zs3fast segment ...` every process takes its share of the images.
    """
    from zs3fast.inference.chosen import not_both
    from zs3fast.utils.distributed import dist_env
    from zs3fast.utils.files import expect_folder

    with one_line_errors(USAGE_ERROR), dist_env(device, _PATIENCE) as env:
        with _heard(env.main):
            images = env.agreed(find_images(inputs))
            stems = distinct_stems(images)
            expect_folder(output, "output")
            entries = _class_list(classes, classes_file, dataset)
            settings: dict[str, Any] = {
                "templates": templates,
                "crops": crops,
                "compile": compile_,
                "quantize": quantize,
                "dtype": dtype,
            }
            settings |= {"protocol": protocol, "refine": refine}
            proposals = {"proposer": proposer, "boxes": boxes}
            source = {"method": method, "clip": clip, "pretrained": pretrained, "attention": attention}
            chosen = {"method": method, "clip": clip, "pretrained": pretrained, "quick_gelu": quick_gelu}
            not_both(weights, {**chosen, "untrained": untrained or None})
            segmenter = _segmenter(
                entries,
                weights,
                trained_on,
                text_embeddings,
                str(env.device),
                settings,
                proposals,
                {**source, "quick_gelu": quick_gelu, "untrained": untrained, "seed": seed},
            )
        if env.main and dtype == "auto" and str(segmenter.dtype) == "torch.bfloat16":
            stderr.print(
                f"[yellow]note[/]: runs in bfloat16, faster on this {env.device.type}; --dtype float32 does not"
            )
        drawn: dict[str, Any] = {} if legend and blend == 0.6 else {"legend": legend, "blend": blend}
        failures: dict[Path, Exception] = {}  # one bad image does not end the run
        results = segmenter.stream(
            images[env.rank :: env.world],
            min_score=min_score,
            background=background,
            batch_size=batch_size,
            workers=workers,
            failed=failures.__setitem__,
            compact=True,
        )
        segmenter.release_text_encoder()  # the one class list of this run is encoded
        output.mkdir(parents=True, exist_ok=True)
        with one_line_errors(RUN_ERROR):
            covered = _write_all(segmenter, stems, results, failures, workers, output, drawn, env)
            reasons = {image: first_line(error) for image, error in failures.items()}
            ended = env.gathered((reasons, covered))
        failed = {image: reason for reasons, _ in ended for image, reason in reasons.items()}
        if env.main:
            covered = next((note for _, note in ended if note is not None), None)
            small = weights is not None and weights.startswith("zs3fast-tiny")  # which knows no photographs anyway
            if covered is not None and min_score is None and not background and not small:
                stderr.print(f"[yellow]note[/] {escape(covered)}")
            for image in filter(failed.__contains__, images):
                stderr.print(f"[red]failed[/] {escape(str(image))}: {escape(failed[image])}")
            done = len(images) - len(failed)
            stdout.print(f"{done} of {len(images)} images segmented, results in {escape(str(output))}")
        env.barrier()  # torchrun ends all processes where one ends with an error
        if failed:
            raise typer.Exit(RUN_ERROR)


@contextmanager
def _heard(yes: bool) -> Iterator[None]:
    """Within the block, notes are printed only if `yes`: one process of a run says what all would."""
    before, stderr.quiet = stderr.quiet, not yes
    try:
        yield
    finally:
        stderr.quiet = before


def _write_all(
    segmenter: Segmenter,
    stems: dict[Path, str],
    results: Any,
    failures: dict[Path, Exception],
    workers: int | None,
    output: Path,
    overlay: dict[str, Any],
    env: DistEnv,
) -> str | None:
    """Write every result as it comes, threads doing it beside the model; a note where a short list covers an image."""
    from zs3fast.inference.streaming import ITEM_ERRORS, ahead, default_workers, working_on

    covered = None
    share = len(range(env.rank, len(stems), env.world))

    def write(result: tuple[Path, Segmentation]) -> tuple[str, bool]:
        image, segmentation = result
        with working_on(image):
            path = write_result(segmentation, output / stems[image], **overlay)
            everything = len(segmentation.class_names) <= _SHORT_LIST and int(segmentation.labels.min()) >= 0
        return f"{escape(str(image))} -> {escape(str(path))}: {escape(in_words(segmentation))}", everything

    workers = default_workers(segmenter.device) if workers is None else workers
    with (
        progress_bar(shown=env.main) as progress,
        warnings_by_image(),
        closing(results),
        closing(ahead(results, write, workers)) as all_,
    ):
        task, written = progress.add_task("Segmenting", total=share), 0
        for (image, segmentation), outcome in all_:
            try:
                line, everything = outcome.result()
                progress.console.print(line)
                written += 1
                if everything and covered is None:
                    covered = (
                        f"every pixel of {image} went to one of {len(segmentation.class_names)} classes, whatever it "
                        "shows: name what else is there, or let --background auto take it"
                    )
            except ITEM_ERRORS as error:
                failures[image] = error
            progress.update(task, completed=written + len(failures))
    return covered


@app.command(
    no_args_is_help=True,
    epilog="**Example**: `zs3fast convert voc_inductive.pth zegclip_voc.safetensors --trained-on voc20`",
)
def convert(
    official: options.Official,
    out: options.Converted,
    trained_on: options.LearnedOn = None,
    seen_offset: options.SeenOffset = None,
) -> None:
    """Convert an official checkpoint into one safetensors file that holds its configuration too.

    A text tower inside the checkpoint is kept, so the file can embed class names by itself.
    """
    from zs3fast.inference.loading import read_official
    from zs3fast.weights import save

    with one_line_errors(USAGE_ERROR):
        if out.suffix != ".safetensors":
            raise ValueError(f"out: expected a .safetensors file, got {out}")
        vocabulary = _training_vocabulary(trained_on)
        if seen_offset is not None:
            if not math.isfinite(seen_offset):
                raise ValueError(f"seen_offset: expected a finite number, got {seen_offset}")
            vocabulary["seen_offset"] = seen_offset
        model, tower = read_official(official, **vocabulary)
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
    from zs3fast.inference.dtypes import auto_dtype
    from zs3fast.ops import _dispatch, _extension
    from zs3fast.text import cache_dir

    facts = Table.grid(padding=(0, 2))
    facts.add_row("zs3fast", escape(f"{__version__} in {Path(zs3fast.__file__).parent}"))
    facts.add_row("python", escape(f"{platform.python_version()} on {platform.platform()}"))
    for package in ("torch", "triton", "open_clip_torch", "safetensors", "transformers"):
        facts.add_row(package, escape(_version(package)))
    facts.add_row("extension", escape(", ".join(f"{key} {value}" for key, value in _extension.info().items())))
    facts.add_row("backend", escape(f"{_dispatch.requested_backend()} (ZS3FAST_BACKEND)"))
    facts.add_row("devices", escape(", ".join([f"cpu ({torch.get_num_threads()} threads)", *_cuda_devices()])))
    facts.add_row("dtype auto", str(auto_dtype("cuda" if torch.cuda.is_available() else "cpu")).removeprefix("torch."))
    facts.add_row("methods", ", ".join(zs3fast.list_models()))
    facts.add_row("cache", escape(f"{cache_dir()} (ZS3FAST_CACHE)"))
    facts.add_row("  weights", escape(_listing(cache_dir() / "weights")))
    facts.add_row("  text embeddings", escape(_listing(cache_dir() / "text", names=False)))
    stdout.print(facts)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        stdout.print(_backend_table(device))


def _segmenter(
    entries: list[ClassEntry] | None,
    weights: str | None,
    trained_on: str | None,
    text_embeddings: Path | None,
    device: str,
    settings: dict[str, Any],
    proposals: dict[str, str | None],
    source: dict[str, Any],
) -> Segmenter:
    """The segmenter of a weight file, or of CLIP's weights (`source`), for the classes."""
    import torch

    from zs3fast.inference.loading import TINY, find_weights, from_clip, is_converted
    from zs3fast.inference.options import SegmenterOptions
    from zs3fast.inference.segmenter import Segmenter
    from zs3fast.models.registry import model_class
    from zs3fast.proposals import load_box_proposer, load_mask_proposer
    from zs3fast.text import load_text_embeddings

    loaders: dict[str, Any] = {"proposer": load_mask_proposer, "boxes": load_box_proposer}
    found: dict[str, Any] = {
        name: None if spec is None else loaders[name](spec, device) for name, spec in proposals.items()
    }
    chosen = SegmenterOptions(device=device, **settings, **found)
    rows = None
    if text_embeddings is not None:
        rows = load_text_embeddings(text_embeddings, None if entries is None else len(entries))
    texts: dict[str, Any] = {"text_embeddings": rows, "class_names": entries}
    attention = source.pop("attention")
    if weights is not None:
        if attention is not None:
            raise ValueError(f"--attention: expected with --method maskclip and no --weights, got {attention!r}")
        path = find_weights(weights)
        if weights.startswith(TINY):
            _note_strange_words(weights, entries)
        if is_converted(path) and trained_on is not None:
            raise ValueError(
                f"--trained-on: expected an official checkpoint, got {path}, which knows its own vocabulary"
            )
        if not is_converted(path) and trained_on is None:
            stderr.print("[yellow]note[/]: no --trained-on for an official checkpoint, so no class counts as seen")
        with _loading(f"Loading {path.name}"):
            segmenter = Segmenter.from_pretrained(
                path, **texts, options=chosen, official=_training_vocabulary(trained_on)
            )
        if entries is None and segmenter.classes is None:
            raise ValueError(
                "expected class names: these weights carry none, give --classes, --classes-file or --dataset"
            )
        return segmenter
    method, seed = source["method"], source.pop("seed")
    needs_no_training = method is None or model_class(method).training_free
    if attention is not None and (method is None or not needs_no_training):  # the default has its own
        raise ValueError(f"--attention: expected with --method maskclip and no --weights, got {attention!r}")
    if entries is None:
        if method is None or rows is not None or not needs_no_training or source["untrained"]:
            raise ValueError("expected class names: give --classes, --classes-file or --dataset")
        texts["class_names"] = entries = _class_list(None, None, _EVERYDAY)
        stderr.print(f"[yellow]note[/]: no class list given, so the {len(entries or ())} names of {_EVERYDAY} compete")
    special = {} if attention is None else {"attention": attention}
    torch.manual_seed(seed)
    with _loading(f"Loading the weights of {source['clip'] or 'OpenAI CLIP ViT-B-16'}"), _quiet("zs3fast"):
        model = from_clip(**source, seen=[], num_classes=len(entries or ()), **special)
        segmenter = Segmenter(model, **texts, options=chosen)
        if rows is None:
            _ = segmenter.text_encoder  # the note below says it for image and text at once
    if method is None and attention is None:
        stderr.print(
            f"[yellow]note[/]: {model.method} segments, which needs no training, on the weights "
            f"{escape(str(model.config['pretrained']))} of CLIP, {_in_short(segmenter)}; --method takes another"
        )
    if source["untrained"]:
        what = "the decoder's" if source["pretrained"] else "all"
        stderr.print(
            f"[yellow]untrained[/]: {what} weights are random (seed {seed}) and the labels mean nothing. This run only "
            "shows that the parts work"
        )
    return segmenter


def _in_short(segmenter: Segmenter) -> str:
    """How a method without training goes over an image."""
    options = segmenter.options
    protocol, steps = options.protocol or segmenter.model.published_windows, options.refine_steps
    how = "by its published protocol" if protocol == segmenter.model.method else f"by the protocol of {protocol}"
    return f"{how}, " + (f"refined by {steps} steps" if steps else "not refined (--refine)")


def _note_strange_words(weights: str, entries: list[ClassEntry] | None) -> None:
    """Say what the small models in the package have not met: photographs, and of the names those."""
    from zs3fast.data.world.vocabulary import WORDS

    strange = [entry[0] for entry in entries or () if not WORDS.issuperset(" ".join(entry).lower().split())]
    if entries is None or strange:
        names = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "")
        unknown = f" and does not know {escape(names)}" if strange else ""
        stderr.print(
            f"[yellow]note[/]: {weights} has seen painted scenes alone{unknown}; photographs need other weights"
        )


def _class_list(classes: str | None, classes_file: Path | None, dataset: str | None) -> list[ClassEntry] | None:
    """`class_list`, whose dataset may be one of the user's own."""
    from zs3fast.data.registered import described_classes
    from zs3fast.inference.chosen import class_list

    described = (
        None if dataset is None or classes is not None or classes_file is not None else described_classes(dataset)
    )
    return described or class_list(classes, classes_file, dataset)


def _training_vocabulary(trained_on: str | None) -> dict[str, Any]:
    """What `load_official` should know of the dataset a checkpoint was trained on."""
    from zs3fast.text.class_lists import training_vocabulary

    return {} if trained_on is None else training_vocabulary(trained_on)


def _backend_table(device: str) -> Table:
    """For every op and backend, what it has against a float32 request on this device."""
    import torch

    from zs3fast import ops  # noqa: F401  # the import registers them
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
        table.add_row(op, chosen, *(escape("; ".join(reasons[backend])) or "yes" for backend in _dispatch.BACKENDS))
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
def _loading(what: str) -> Iterator[None]:
    """A status line while weights load; a download, which may take minutes, is a line of its own."""
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: stderr.print(escape(record.getMessage()))  # type: ignore[method-assign]  # this one's alone
    logger = logging.getLogger("zs3fast.downloads")
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with stderr.status(escape(what)) if stderr.is_terminal else contextlib.nullcontext():
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run() -> int | str | None:
    """The command line of this process; what it ends with."""
    try:
        app(prog_name="zs3fast")
    except SystemExit as end:
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):  # outside of `one_line_errors`
            stderr.print("[yellow]interrupted[/]")
        return end.code
    except BaseException as error:
        if not by_interrupt(error):
            raise
        stderr.print("[yellow]interrupted[/]")
        return INTERRUPTED
    return 0


def _announce() -> None:
    """The other rooms' commands as the help text lists them."""
    for name, place in ELSEWHERE.items():
        app.command(name, help=place.help)(_called_elsewhere)


def _called_elsewhere() -> None:
    raise AssertionError("replaced by `_LazyGroup` before it is called")


_announce()
