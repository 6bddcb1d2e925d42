"""A bulk run against the plain loop, with 1 and 2 actors; and the memory of runs of more and more rows.

    python bench/bulk.py --rounds 2                      # rows/s: the small model in the package, images of 128 pixels
    python bench/bulk.py --vit --images 24 --rounds 2    # a ViT-B/16 (random weights: only speed), what Ray costs
    python bench/bulk.py --memory 1000 10000             # peak memory by kind of process, extrapolated to 10^5 rows

The plain loop is what an actor does, `segment_rows` and a shard written, without Ray; one thread a model. Rounds
alternate between the contenders. The rate of a bulk run is taken between every actor's first shard and the last, so
start-up (told apart: until the first shard) is not in it; readers go on starting for some seconds beside the first
images, though, so a run of the small model takes a thousand. Memory is the command's: proportional set sizes (what
processes share is counted once), twice a second.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import harness  # noqa: E402
from bench.harness import Timing  # noqa: E402
from zs3fast.inference.bulk import BulkOptions, bulk, segment_rows  # noqa: E402
from zs3fast.inference.bulk_files import Shards  # noqa: E402
from zs3fast.inference.loading import from_clip  # noqa: E402
from zs3fast.inference.segmenter import Segmenter  # noqa: E402

CLASSES = "red sand, star, grass, water, stone wall"
PLAIN = "plain loop"
FAR = 100_000  # rows that memory is extrapolated to
SHARDS = 10  # of a run, unless --shard-rows says otherwise: their times are what rates are made of
Row = dict[str, Any]


def make_images(folder: Path, count: int, side: int) -> list[Path]:
    """JPEG files, smooth as photographs are."""
    folder.mkdir()
    paths = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        paths.append(folder / f"{number:06}.jpg")
        Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def plain(segmenter: Segmenter, paths: Sequence[Path], output: Path, options: BulkOptions) -> float:
    """Seconds a row without Ray."""
    shards, stamp = Shards(str(output), options.labels), {"model": "", "class_list": ""}
    segmenter(paths[0])
    begun = time.perf_counter()
    for at in range(0, len(paths), options.shard_rows):
        part = paths[at : at + options.shard_rows]
        rows: list[Row] = [{"id": str(path), "bytes": path.read_bytes(), "error": None} for path in part]
        shards.write([{**row, **stamp} for row in segment_rows(segmenter, rows, options)])
    return (time.perf_counter() - begun) / len(paths)


def on_ray(segmenter: Segmenter, folder: Path, output: Path, options: BulkOptions) -> tuple[float, float]:
    """Seconds a row between the first shards and the last, by the times of the files, and seconds until the first."""
    begun = time.time()
    bulk([str(folder)], str(output), segmenter, "bench", options)
    written = sorted((path.stat().st_mtime, path) for path in output.glob("shard-*"))
    first, last = written[options.actors - 1][0], written[-1][0]  # every actor is at work
    rows = sum(pq.read_metadata(path).num_rows for _, path in written[options.actors :])
    return (last - first) / rows, written[0][0] - begun


def measure_rates(args: argparse.Namespace, folder: Path) -> list[Row]:
    """A row for the plain loop and each number of actors."""
    if args.vit:
        model = from_clip("maskclip", untrained=True, seen=[])
        segmenter = Segmenter(model, class_names=CLASSES, device="cpu", dtype="float32")
    else:
        segmenter = Segmenter.from_pretrained("zs3fast-tiny", class_names=CLASSES, device="cpu", dtype="float32")
    name = "maskclip ViT-B-16" if args.vit else "zs3fast-tiny"
    paths = make_images(folder / "in", args.images, args.side)
    how: dict[str, Any] = {"shard_rows": args.shard_rows, "dtype": "float32", "workers": 0}
    times: dict[str, list[float]] = {PLAIN: [], **{f"{n} actor{'s' * (n > 1)}": [] for n in args.actors}}
    starts: dict[str, list[float]] = {backend: [] for backend in times}
    for number in range(args.rounds):
        times[PLAIN].append(plain(segmenter, paths, folder / f"plain{number}", BulkOptions(**how)))
        for backend, actors in zip(list(times)[1:], args.actors):
            options = BulkOptions(actors=actors, **how)
            seconds, start = on_ray(segmenter, folder / "in", folder / f"out{actors}-{number}", options)
            times[backend].append(seconds)
            starts[backend].append(start)
    described, rows = harness.environment(), list[Row]()
    shape = f"{args.images} images of {args.side} pixels, shards of {args.shard_rows}"
    for backend, samples in times.items():
        timing = Timing(samples)
        extra: Row = {"images_per_second": round(1 / timing.median, 3)}
        if backend != PLAIN:
            extra["of_plain"] = round(Timing(times[PLAIN]).median / timing.median, 3)
            extra["first_shard_s"] = round(Timing(starts[backend]).median, 1)
        rows.append(harness.row(name, backend, shape, timing, pass_="bulk", described=described, **extra))
        print(backend, extra, "of rounds", [round(1 / one, 2) for one in samples], flush=True)
    return rows


def measure_memory(args: argparse.Namespace, folder: Path) -> list[Row]:
    """A row for every number of images and kind of process: its peak; and what the line through the last two says."""
    described, rows = harness.environment(), list[Row]()
    peaks: list[tuple[int, dict[str, int]]] = []
    for count in args.memory:
        make_images(folder / f"in{count}", count, args.side)
        command = [sys.executable, "-m", "zs3fast", "bulk", str(folder / f"in{count}"), str(folder / f"out{count}")]
        command += ["-w", "zs3fast-tiny", "-c", CLASSES, "--actors", str(args.actors[-1])]
        process = psutil.Popen([*command, "--shard-rows", str(args.shard_rows)], stdout=subprocess.DEVNULL)
        peaks.append((count, peak_of(process)))
        if process.wait() != 0:
            raise RuntimeError(f"the run of {count} images failed")
        print(count, {kind: f"{peak / 2**20:.0f} MiB" for kind, peak in peaks[-1][1].items()}, flush=True)
    if len(peaks) > 1:
        (few, before), (many, after) = peaks[-2:]
        line = {kind: after[kind] + (after[kind] - before[kind]) / (many - few) * (FAR - many) for kind in after}
        peaks.append((FAR, {kind: int(value) for kind, value in line.items()}))
        print(FAR, {kind: f"{peak / 2**20:.0f} MiB" for kind, peak in peaks[-1][1].items()}, "extrapolated")
    for count, of in peaks:
        shape = f"{count} images of {args.side} pixels, shards of {args.shard_rows}, {args.actors[-1]} actors"
        same: Row = {"pass_": "bulk memory", "described": described, "images": count}
        for kind, peak in of.items():
            kind = kind if count in args.memory else f"{kind}, extrapolated"
            rows.append(harness.row("zs3fast-tiny", kind, shape, None, peak_bytes=peak, **same))
    return rows


def peak_of(process: psutil.Process) -> dict[str, int]:
    """Peak bytes of the driver, of the largest actor, and of all processes together, until the driver ends."""
    peak = {"driver": 0, "largest actor": 0, "all processes": 0}
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        total = 0
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for one in family:
            try:
                size, called = one.memory_full_info().pss, " ".join(one.cmdline())
            except psutil.Error:  # it has ended
                continue
            total += size
            kind = "driver" if one.pid == process.pid else "largest actor" if "MapWorker" in called else None
            if kind is not None:
                peak[kind] = max(peak[kind], size)
        peak["all processes"] = max(peak["all processes"], total)
        time.sleep(0.5)
    return peak


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, print and write `bench/results/<device>/bulk.json`; the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--shard-rows", type=int, help=f"rows of a shard (so many that there are {SHARDS})")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vit", action="store_true", help="MaskCLIP on a ViT-B/16 of random weights")
    parser.add_argument("--memory", type=int, nargs="+", help="measure memory instead, with these numbers of images")
    parser.add_argument("--json", type=Path, help="where to write (bench/results/<device>/bulk.json)")
    args = parser.parse_args(argv)
    args.shard_rows = args.shard_rows or max(1, min([args.images, *(args.memory or ())]) // SHARDS)
    if not args.memory and args.images < 3 * max(args.actors) * args.shard_rows:
        parser.error(f"--images: expected at least {3 * max(args.actors)} shards' rows for a rate, got {args.images}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rows = (measure_memory if args.memory else measure_rates)(args, Path(name))
    harness.update_results(args.json or harness.results_path("bulk"), rows)
    return rows


if __name__ == "__main__":
    main()
