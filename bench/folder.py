"""Images a second over a folder: JPEG files in, three result files each, one after the other against overlapped.

    python bench/folder.py                                            # ZegCLIP, C = 20, on the CPU
    python bench/folder.py --device cuda --dtype bfloat16 --workers 1 4 8 --batch-size 1 4 --compile

Every contender reads the same images, made here with the sizes and textures of photographs, and writes what
`zs3fast segment` writes. Its labels are checked against those of the sequential one first. Times are of one image.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import contenders, end_to_end, harness  # noqa: E402
from bench.data import make_voc  # noqa: E402
from bench.harness import Contender, OverBudget, Timing  # noqa: E402
from bench.setting import DTYPES, ONE_STAGE, Setting, make_inputs  # noqa: E402
from zs3fast.cli import write_result  # noqa: E402
from zs3fast.inference.segmenter import Segmenter  # noqa: E402
from zs3fast.inference.streaming import ahead  # noqa: E402

SAME_LABELS = 0.999  # windows that share a batch with others, or run compiled, round otherwise


def sequential(segmenter: Segmenter, paths: Sequence[Path], output: Path) -> Path:
    """One image after the other, each read, segmented and written before the next."""
    for path in paths:
        write_result(segmenter(path), output / path.stem)
    return output


def overlapped(segmenter: Segmenter, workers: int, batch_size: int, paths: Sequence[Path], output: Path) -> Path:
    """Reading, the model and writing side by side, as `zs3fast segment` runs them."""

    def write(result: tuple[Path, Any]) -> None:
        write_result(result[1], output / result[0].stem)

    results = segmenter.stream(paths, workers=workers, batch_size=batch_size)
    with closing(ahead(results, write, workers)) as written:
        for _, outcome in written:
            outcome.result()
    return output


def check_labels(paths: Sequence[Path], expected: Path, output: Path) -> None:
    """Raise OverBudget unless every label map in `output` is that of `expected`, but for ties."""
    for path in paths:
        got, want = (np.asarray(Image.open(folder / f"{path.stem}_labels.png")) for folder in (output, expected))
        if got.shape != want.shape or not (got == want).mean() >= SAME_LABELS:
            raise OverBudget(f"{output.name}: labels of {path.name} are not those of the sequential run")


def make_contenders(args: argparse.Namespace, setting: Setting, folder: Path) -> list[Contender]:
    """Sequential first: the others are checked against what it writes."""
    paths = sorted((folder / "VOC2012" / "JPEGImages").iterdir())
    model = contenders.make_ours(setting, contenders.make_baseline(setting).state_dict(), args.device)
    segmenter = end_to_end.make_segmenter(model, setting, args.device)
    check = partial(check_labels, paths, folder / "sequential")

    def contender(name: str, run: Callable[[Sequence[Path], Path], Path]) -> Contender:
        return Contender(name, partial(run, paths, folder / name), None if name == "sequential" else check)

    found = [contender("sequential", partial(sequential, segmenter))]
    ways = [(segmenter, "")]
    if args.compile:
        options = {
            "text_embeddings": make_inputs(setting)[1],
            "class_names": segmenter.classes,
            "dtype": segmenter.dtype,
        }
        ways.append((Segmenter(model, **options, compile=True), " compiled"))
    for way, suffix in ways:
        for batch_size in args.batch_size:
            for workers in args.workers:
                name = f"{workers} workers, batch {batch_size}{suffix}"
                found.append(contender(name, partial(overlapped, way, workers, batch_size)))
    return found


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=ONE_STAGE, default="zegclip")
    parser.add_argument("--classes", type=int, default=20, help="length C of the class list")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of the model")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1], help="threads that read, and that write")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1])
    parser.add_argument("--compile", action="store_true", help="also through torch.compile")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--size", nargs=2, type=int, default=(375, 500), help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a toy network: exercises this script, measures nothing")
    parser.add_argument("--json", type=Path, help="where to write (bench/results/<device>/folder.json)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write `bench/results/<device>/folder.json`; the rows."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    setting = Setting(args.model, args.classes, dtype=args.dtype)
    setting = setting.tiny() if args.tiny else setting
    with tempfile.TemporaryDirectory() as folder:
        make_voc(Path(folder) / "VOC2012", args.pictures, tuple(args.size))
        found = make_contenders(args, setting, Path(folder))
        times = harness.measure(found, rounds=args.rounds, device=args.device)
    described = harness.environment(args.device)
    rows = []
    for name, timing in times.items():
        per_image = Timing([sample / args.pictures for sample in timing.samples], timing.peak_bytes)
        rows.append(
            harness.row(
                args.model,
                name,
                f"{setting.shape}, {args.size[0]} x {args.size[1]}",
                per_image,
                dtype=setting.torch_dtype,
                pass_="folder",
                described=described,
                images_per_second=round(1 / per_image.median, 3),
            )
        )
        print(f"{args.model:8s} {name:28s} {rows[-1]['images_per_second']:9.2f} images/s", flush=True)
    if args.json is not None or not args.tiny:
        harness.write_results(args.json or harness.results_path("folder", args.device), rows)
    return rows


if __name__ == "__main__":
    main()
