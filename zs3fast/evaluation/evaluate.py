"""Segment a test set, each image once however many processes there are, and count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zs3fast.evaluation.binary import BinaryCounts, PairScores
from zs3fast.evaluation.confusion import Confusion
from zs3fast.evaluation.pairs import group_by_image
from zs3fast.evaluation.partial import PartialResults
from zs3fast.evaluation.protocols import LabelledImages, Setting
from zs3fast.evaluation.ratios import mean, percent
from zs3fast.evaluation.scores import DENOMINATORS, Scores, class_iou, pixel_accuracy, scores
from zs3fast.utils.distributed import rank_and_world

Progress = Callable[[int, int], None]  # work items done in this process, of how many


@dataclass(frozen=True)
class ItemScore:
    """One image, or one (image, class) pair, on its own.

    image: index into the dataset.  id: its name there.  class_index: the class asked for; None for whole label maps.
    iou: percent; for label maps the mean over the image's classes. None where nothing is labelled.
    pacc: right pixels in percent, or None.  pixels: labelled pixels.  times: how often the pair counts.
    """

    image: int
    id: str
    class_index: int | None
    iou: float | None
    pacc: float | None
    pixels: int
    times: int = 1


@dataclass(frozen=True, eq=False)
class Report:
    """What an evaluation found.

    scores:  of the whole set, in percent.
    table:   int64 counts: [C, C + 1] of `Confusion`, or [C, 4] of `BinaryCounts` for pairs.
    items:   every image or pair on its own, in dataset order.
    images:  how many were segmented.  seconds: wall time of this run, reading included.
    settings: what else the numbers depend on.  notes: what a reader should know.
    """

    dataset: str
    split: str
    setting: Setting
    class_names: tuple[str, ...]
    scores: Scores | PairScores
    table: np.ndarray
    items: tuple[ItemScore, ...]
    images: int
    seconds: float
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()

    def worst(self, count: int) -> list[ItemScore]:
        """The items with the lowest IoU, lowest first; equals in dataset order."""
        return sorted((item for item in self.items if item.iou is not None), key=lambda item: item.iou or 0.0)[:count]


def evaluate(
    segmenter_like: Callable[..., np.ndarray | Tensor],
    dataset: LabelledImages,
    *,
    setting: Setting | None = None,
    denominator: str = "gt_or_pred",
    pass_paths: bool = False,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
    progress: Progress | None = None,
    partial: PartialResults | None = None,
    settings: dict[str, Any] | None = None,
) -> Report:
    """Score label maps over a dataset.

    Under torch.distributed rank r takes images r, r + world, ...; the counts are integers and are summed, so the report
    is the same for any number of processes, and every process gets it.

    Args:
        segmenter_like: image uint8 [H, W, 3] -> labels [H, W] at the image's own size, -1 for none; see `labeller`.
        dataset: its samples' labels are 0..C-1 or its `ignore_index`.
        setting: says which classes are seen. None: the dataset's own split.
        denominator: see `scores`.
        pass_paths: call `segmenter_like` with the image's path as well.
        limit: only the first so many images.
        device: where pixels are counted.
        workers: processes that read images ahead.
        progress: called after each image with (done, total) of this process.
        partial: where results so far are kept.
        settings: noted in the report.
    """
    if denominator not in DENOMINATORS:
        raise ValueError(f"denominator: expected one of {', '.join(DENOMINATORS)}, got {denominator!r}")
    setting = setting or Setting("inductive", tuple(dataset.seen), tuple(dataset.seen) if dataset.unseen else None)
    counter = Confusion(dataset.num_classes, dataset.ignore_index, device)
    items = [(index, None) for index in range(_limited(len(dataset), limit))]

    def score(index: int, sample: Any, _: None) -> list[ItemScore]:
        path = (dataset.image_path(index),) if pass_paths else ()
        added = counter.update(segmenter_like(sample.image, *path), sample.labels)
        iou, pacc, pixels = mean(class_iou(added, denominator)), pixel_accuracy(added), int(added.sum())
        return [ItemScore(index, sample.id, None, _or_none(iou), _or_none(pacc), pixels)]

    started = time.perf_counter()
    records = _run(items, score, dataset, counter, workers, progress, partial)
    return Report(
        dataset=dataset.name,
        split=dataset.split,
        setting=setting,
        class_names=tuple(dataset.class_names),
        scores=scores(counter, setting.seen, denominator),
        table=counter.table.cpu().numpy(),
        items=tuple(records),
        images=len(items),
        seconds=time.perf_counter() - started,
        settings={"denominator": denominator, "limit": limit, **(settings or {})},
        notes=setting.notes,
    )


def evaluate_pairs(
    segmenter_like: Callable[..., np.ndarray | Tensor],
    dataset: LabelledImages,
    pairs: Iterable[tuple[int, int]],
    *,
    pass_paths: bool = False,
    label_size: tuple[int, int] | None = None,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
    progress: Progress | None = None,
    partial: PartialResults | None = None,
    settings: dict[str, Any] | None = None,
    notes: Iterable[str] = (),
) -> Report:
    """Score binary masks over (image, class) pairs (ClsCLIP: PASCAL-5i and COCO-20i).

    Each image is segmented once for all classes it is asked about; a pair that stands in the list twice counts twice.

    Args:
        segmenter_like: (image uint8 [H, W, 3], P class indices) -> bool masks [P, H, W]; see `PairSegmenter`.
        pairs: (image index, class index), as `zs3fast.data.test_pairs` lists them.
        label_size: (H, W) that label maps are shrunk to, by nearest neighbour, and masks come in, as few-shot protocols
            do; None: masks and label maps have the image's size.
        limit: only the first so many pairs.
        notes: what a reader of the report should know.
        others: as in `evaluate`; processes share the images.
    """
    pairs = list(pairs)
    items = group_by_image(pairs[: _limited(len(pairs), limit)])
    counter = BinaryCounts(dataset.num_classes, dataset.ignore_index, device)

    def score(index: int, sample: Any, classes: dict[int, int]) -> list[ItemScore]:
        path = (dataset.image_path(index),) if pass_paths else ()
        labels = sample.labels if label_size is None else _nearest(sample.labels, label_size)
        masks = segmenter_like(sample.image, list(classes), *path)
        if len(masks) != len(classes):
            raise ValueError(f"segmenter_like: expected {len(classes)} masks, got {len(masks)}")
        records = []
        for mask, (class_index, times) in zip(masks, classes.items(), strict=True):
            hit, false, missed, rest = counter.update(mask, labels, class_index, times).tolist()
            pixels = hit + false + missed + rest
            iou, pacc = (float(percent(*ratio)) for ratio in ((hit, hit + false + missed), (hit + rest, pixels)))
            records.append(ItemScore(index, sample.id, class_index, _or_none(iou), _or_none(pacc), pixels, times))
        return records

    started = time.perf_counter()
    records = _run(items, score, dataset, counter, workers, progress, partial)
    return Report(
        dataset=dataset.name,
        split=dataset.split,
        setting=Setting("fold", (), tuple(dataset.seen)),
        class_names=tuple(dataset.class_names),
        scores=counter.scores(),
        table=counter.table.cpu().numpy(),
        items=tuple(records),
        images=len(items),
        seconds=time.perf_counter() - started,
        settings={"limit": limit, **(settings or {})},
        notes=tuple(notes),
    )


class Items(Protocol):
    """Things by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Reader(Dataset[Any]):
    """Items by index; what cannot be read comes back as the error, since a worker would bury it in a traceback."""

    def __init__(self, dataset: Items):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return error


def _run(
    items: list[tuple[int, Any]],
    score: Callable[[int, Any, Any], list[ItemScore]],
    dataset: LabelledImages,
    counter: Confusion | BinaryCounts,
    workers: int,
    progress: Progress | None,
    partial: PartialResults | None,
) -> list[ItemScore]:
    """Score this process's share of (image index, what to ask), add up all processes; records in dataset order."""
    rank, world = rank_and_world()
    earlier, earlier_records = _earlier(partial, rank)
    scored = {record["image"] for record in earlier_records}
    mine = [item for item in items if item[0] not in scored][rank::world]
    order = [index for index, _ in mine]
    loader = DataLoader(Reader(dataset), batch_size=None, sampler=order, num_workers=workers, collate_fn=_as_it_is)
    records: list[ItemScore] = []
    for done, ((index, asked), sample) in enumerate(zip(mine, loader), 1):
        if isinstance(sample, Exception):
            raise sample
        try:
            records += score(index, sample, asked)
        except (ValueError, TypeError) as error:
            raise type(error)(f"image {sample.id} of {dataset.name}: {error}") from error
        if partial is not None and partial.due():
            partial.save(counter.table.cpu().numpy(), map(asdict, records))
        if progress is not None:
            progress(done, len(mine))
    if earlier is not None and rank == 0:
        counter.table += torch.from_numpy(earlier).to(counter.table.device)
    counter.all_reduce()
    everything = [ItemScore(**record) for record in earlier_records] + _gathered(records, world)
    return sorted(
        everything, key=lambda record: (record.image, -1 if record.class_index is None else record.class_index)
    )


def _earlier(partial: PartialResults | None, rank: int) -> tuple[np.ndarray | None, list[dict[str, Any]]]:
    """Counts (in rank 0) and records (in all) of the runs this one goes on from."""
    if partial is None:
        return None, []
    loaded: list[Any] = [None]
    if rank == 0:
        try:
            loaded = [partial.load()]
        except ValueError as error:  # for all processes to raise
            loaded = [error]
    if rank_and_world()[1] > 1:
        dist.broadcast_object_list(loaded, src=0)
    if isinstance(loaded[0], ValueError):
        raise loaded[0]
    partial.start(rank)
    if rank_and_world()[1] > 1:
        dist.barrier()  # all have chosen their file before the first is written
    out: tuple[np.ndarray | None, list[dict[str, Any]]] = loaded[0]
    return out


def _gathered(records: list[ItemScore], world: int) -> list[ItemScore]:
    if world == 1:
        return records
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, records)
    return [record for part in parts for record in part]


def _limited(count: int, limit: int | None) -> int:
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    if not count:
        raise ValueError("dataset: expected at least one image or pair, got none")
    return count if limit is None else min(limit, count)


def _nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map [H, W] at another size."""
    pixels = torch.from_numpy(labels)[None, None].double()
    return F.interpolate(pixels, size, mode="nearest")[0, 0].to(torch.int32).numpy()


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _as_it_is(sample: Any) -> Any:
    """A `collate_fn`: samples stay what the dataset made them."""
    return sample
