"""Rows a second of a bulk run with 1 and 2 actors, against the plain loop in one process; and what starting costs.

    python bench/bulk.py                                   # 400 images, the small model in the package
    python bench/bulk.py --images 40 --vit                 # the size of ViT-B/16 (random weights), overhead of Ray

The plain loop is what an actor does, `segment_rows` and a shard written, without Ray. The rate of a bulk run is taken
between its first shard and its last, so start-up (said apart: until the first shard) is not in it. One thread a model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zs3fast.inference.bulk import BulkOptions, bulk, segment_rows  # noqa: E402
from zs3fast.inference.bulk_files import Shards  # noqa: E402
from zs3fast.inference.loading import from_clip  # noqa: E402
from zs3fast.inference.segmenter import Segmenter  # noqa: E402

CLASSES = "red sand, star, grass, water, stone wall"


def make_images(folder: Path, count: int, side: int) -> list[Path]:
    """JPEG files, smooth as photographs are."""
    paths = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        paths.append(folder / f"{number:06}.jpg")
        Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def plain(segmenter: Segmenter, paths: list[Path], output: Path, options: BulkOptions) -> float:
    """Rows a second without Ray."""
    shards, stamp = Shards(str(output), options.labels), {"model": "", "class_list": ""}
    segmenter(paths[0])
    begun = time.perf_counter()
    for at in range(0, len(paths), options.shard_rows):
        part = paths[at : at + options.shard_rows]
        rows: list[dict[str, Any]] = [{"id": str(path), "bytes": path.read_bytes(), "error": None} for path in part]
        shards.write([{**row, **stamp} for row in segment_rows(segmenter, rows, options)])
    return len(paths) / (time.perf_counter() - begun)


def on_ray(segmenter: Segmenter, folder: Path, output: Path, options: BulkOptions) -> tuple[float, float]:
    """Rows a second between the first shards and the last, by the times of the files, and seconds until the first."""
    begun = time.time()
    bulk([str(folder)], str(output), segmenter, "bench", options)
    written = sorted((path.stat().st_mtime, path) for path in output.glob("shard-*"))
    first, last = written[options.actors - 1][0], written[-1][0]  # every actor is at work
    rows = sum(pq.read_metadata(path).num_rows for _, path in written[options.actors :])
    return rows / (last - first), written[0][0] - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--side", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--shard-rows", type=int, default=10)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--vit", action="store_true", help="MaskCLIP on a ViT-B/16 of random weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.vit:
        model = from_clip("maskclip", untrained=True, seen=[])
        segmenter = Segmenter(model, class_names=CLASSES, device="cpu", dtype="float32")
    else:
        segmenter = Segmenter.from_pretrained("zs3fast-tiny", class_names=CLASSES, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "in"
        folder.mkdir()
        paths = make_images(folder, args.images, args.side)
        how: dict[str, Any] = {"shard_rows": args.shard_rows, "dtype": "float32", "workers": 0}
        alone = plain(segmenter, paths, Path(name) / "plain", BulkOptions(**how))
        print(f"plain loop   {alone:8.2f} rows/s", flush=True)
        for actors in args.actors:
            options = BulkOptions(actors=actors, **how)
            rate, start = on_ray(segmenter, folder, Path(name) / f"out{actors}", options)
            print(
                f"{actors} actor(s)   {rate:8.2f} rows/s, {rate / alone:.2f} x plain; first shard after {start:.1f} s"
            )


if __name__ == "__main__":
    main()
