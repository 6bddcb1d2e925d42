"""Images a second of loading and augmenting training samples, by the number of worker processes.

Reads real images where --root holds a dataset; otherwise it makes its own (--pictures of --size, JPEG and PNG with
the sizes and textures of photographs).

    python bench/data.py                                          # its own images, all recipes, 0, 1 and 2 workers
    python bench/data.py --dataset voc20 --root VOCdevkit/VOC2012 --workers 0 4 16
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import harness  # noqa: E402
from bench.harness import Timing  # noqa: E402
from zs3fast.data import PositionSampler, SegmentationDataset, TrainingSet, open_dataset, train_transform  # noqa: E402
from zs3fast.data.sampling import seed_worker  # noqa: E402

RECIPES = {"decode": None, "zegclip": 512, "maft": 640, "clsclip": 352}  # "decode": reading alone


def make_voc(root: Path, images: int, size: tuple[int, int], seed: int = 0) -> None:
    """A VOC tree of smooth random images with blocks of labels."""
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    ids = [f"2012_{number:06d}" for number in range(images)]
    for name in ids:
        small = Image.fromarray(rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8))
        photo = np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC), np.int16)
        photo = (photo + rng.integers(-8, 9, photo.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(photo).save(root / "JPEGImages" / f"{name}.jpg", quality=92)
        blocks = Image.fromarray(rng.choice([0, 1, 5, 15, 255], (5, 7), p=[0.6, 0.1, 0.1, 0.1, 0.1]).astype(np.uint8))
        blocks.resize(size[::-1], Image.Resampling.NEAREST).save(root / "SegmentationClassAug" / f"{name}.png")
    for listing in ("train_aug", "val"):
        (root / "ImageSets/Segmentation" / f"{listing}.txt").write_text("\n".join(ids) + "\n")


class _Decoded(TrainingSet):
    """Samples read and not augmented; only their number of pixels is handed on."""

    def __getitem__(self, position: int) -> int:
        return self.dataset[self._entry(position)].labels.size


def images_per_second(dataset: SegmentationDataset, recipe: str, workers: int, images: int, batch: int) -> float:
    """One pass over `images` positions after the workers have started and delivered their first batches."""
    size = RECIPES[recipe]
    if size is None:
        items: TrainingSet = _Decoded(dataset, None)
    else:
        items = TrainingSet(dataset, train_transform(recipe, size, ignore_index=dataset.ignore_index))
    warm = max(1, 2 * workers)
    iterations = warm + max(1, images // batch)
    sampler = PositionSampler(0, batch, stop_iteration=iterations)
    loader = DataLoader(items, batch_sampler=sampler, num_workers=workers, worker_init_fn=seed_worker)
    batches = iter(loader)
    for _ in range(warm):
        next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return (iterations - warm) * batch / (time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write `bench/results/<device>/data.json`; the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="voc20")
    parser.add_argument("--root", type=Path, help="the dataset's folder; left out: images made here")
    parser.add_argument("--split", default="train")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--workers", nargs="+", type=int, default=sorted({0, 1, 2, min(8, os.cpu_count() or 1)}))
    parser.add_argument("--images", type=int, default=128, help="images of a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=32, help="how many to make without --root")
    parser.add_argument("--size", nargs=2, type=int, default=(375, 500), help="height and width of those")
    parser.add_argument("--json", type=Path, help="where to write (bench/results/<device>/data.json)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.root is None:
            make_voc(Path(folder) / "VOC2012", args.pictures, tuple(args.size))
        dataset = open_dataset(args.dataset, args.root or folder, args.split)
        cases = [(recipe, workers) for recipe in args.recipes for workers in args.workers]
        rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
        for _ in range(args.rounds):  # in turns, so that a busy machine slows all of them down
            for recipe, workers in cases:
                rates[recipe, workers].append(images_per_second(dataset, recipe, workers, args.images, args.batch))
    described = harness.environment("cpu")
    what = args.dataset if args.root else f"made {args.size[0]} x {args.size[1]}"
    rows = []
    for (recipe, workers), samples in rates.items():
        rows.append(loading_row(recipe, workers, samples, what, described))
        print(f"{recipe:8s} {workers:3d} workers {rows[-1]['images_per_second']:9.1f} images/s", flush=True)
    harness.write_results(args.json or harness.results_path("data", "cpu"), rows)
    return rows


def loading_row(
    recipe: str, workers: int, rates: Sequence[float], images: str, described: dict[str, Any]
) -> dict[str, Any]:
    """A row of the results file, from images a second of each round; its times are of one image."""
    return harness.row(
        recipe,
        f"{workers} workers",
        images,
        Timing([1 / rate for rate in rates]),
        dtype=torch.uint8,
        pass_="loading",
        described=described,
        images_per_second=round(statistics.median(rates), 2),
        crop_size=RECIPES[recipe],
        workers=workers,
    )


if __name__ == "__main__":
    main()
