"""Training items as a function of (seed, position) alone: not of workers, ranks or restarts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from zs3fast.data.presence import class_pixels
from zs3fast.data.transforms import ClsclipTransform, FlipTransform

if TYPE_CHECKING:
    from zs3fast.data.datasets import SegmentationDataset
    from zs3fast.data.transforms import Transform


class TrainingSet(Dataset[dict[str, Any]]):
    """Augmented training items, indexed by position in the whole run: 0, 1, 2, ... over any number of epochs.

    Position p lies in epoch p // n and takes entry p % n of that epoch's permutation; its augmentation draws from
    `np.random.default_rng((seed, p))`. An epoch ends where it ends: a batch may hold the last items of one and the
    first of the next, so no item is ever dropped.

    Args:
        dataset:   where the samples come from.
        transform: (sample, rng) -> (images [3, S, S], labels [S, S]), from `train_transform`.
        seed:      at least 0.
    Returns (indexed by a position):
        {"images": float32 [3, S, S], "labels": int64 [S, S], "id": str}
    """

    def __init__(self, dataset: SegmentationDataset, transform: Transform, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self._epoch: tuple[int, np.ndarray] | None = None
        if not len(self):
            raise ValueError(f"dataset: expected something to train on, got none in {dataset.name} {dataset.split}")

    def __len__(self) -> int:
        """Items of one epoch."""
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self._entry(position)
        sample = self.dataset[index]
        images, labels = self.transform(sample, np.random.default_rng((self.seed, position)))
        return {"images": images, "labels": labels, "id": sample.id}

    def _entry(self, position: int) -> int:
        """Which entry of an epoch lies at a position; the last epoch's permutation is kept."""
        if position < 0:
            raise IndexError(f"position: expected at least 0, got {position}")
        epoch, place = divmod(position, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            # The 1 keeps this stream apart from the augmentation's of position `epoch`.
            self._epoch = epoch, np.random.default_rng((self.seed, epoch, 1)).permutation(len(self))
        return int(self._epoch[1][place])


class PairSet(TrainingSet):
    """(image, class) pairs: one item asks where one class is. An epoch is all pairs, each once.

    Args:
        dataset, seed: as for `TrainingSet`.
        transform: that of recipe "clsclip" or "flip", whose crops keep some of the class asked for.
        classes: the classes asked for; the dataset's seen classes by default.
        min_pixels: pairs with fewer pixels of the class in the whole image are left out.
        negative_prob: how often the class asked for is one of `classes` that is not in the image at all.
        drop_unseen_images: leave out images that also hold one of the dataset's unseen classes.
    Returns (indexed by a position):
        as `TrainingSet`, and "class_index": int, present in "labels" unless the item is a negative.
    """

    transform: ClsclipTransform | FlipTransform

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: Transform,
        seed: int = 0,
        classes: Sequence[int] | None = None,
        *,
        min_pixels: int = 1,
        negative_prob: float = 0.0,
        drop_unseen_images: bool = False,
    ) -> None:
        if not isinstance(transform, (ClsclipTransform, FlipTransform)):
            raise ValueError(
                "transform: expected recipe 'clsclip' or 'flip', no other keeps the class asked for in its crops"
            )
        classes = dataset.seen if classes is None else sorted(set(classes))
        if not classes or not all(0 <= c < dataset.num_classes for c in classes):
            raise ValueError(f"classes: expected some of 0..{dataset.num_classes - 1}, got {list(classes)}")
        if not 0 <= negative_prob <= 1:
            raise ValueError(f"negative_prob: expected 0..1, got {negative_prob}")
        self.classes = tuple(classes)
        self.negative_prob = negative_prob
        present = class_pixels(dataset)
        self._present = [frozenset(pixels) for pixels in present] if negative_prob else []
        unseen = set(dataset.unseen) if drop_unseen_images else set()
        self.pairs = np.array(
            [
                (index, c)
                for index, pixels in enumerate(present)
                for c in self.classes
                if pixels.get(c, 0) >= max(1, min_pixels) and not unseen & pixels.keys()
            ],
            np.int64,
        ).reshape(-1, 2)
        super().__init__(dataset, transform, seed)

    def __len__(self) -> int:
        """Pairs, which one epoch goes through."""
        return len(self.pairs)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index, class_index = map(int, self.pairs[self._entry(position)])
        rng = np.random.default_rng((self.seed, position))
        focus: int | None = class_index
        if rng.random() < self.negative_prob:
            absent = [c for c in self.classes if c not in self._present[index]]
            if absent:
                focus, class_index = None, int(rng.choice(absent))
        sample = self.dataset[index]
        images, labels = self.transform(sample, rng, class_index=focus)
        return {"images": images, "labels": labels, "id": sample.id, "class_index": class_index}


class PositionSampler(Sampler[list[int]]):
    """Batches of positions: iteration t covers positions t * batch_size .. (t + 1) * batch_size - 1 over all ranks.

    Rank r takes the r-th contiguous slice, so the same total batch means the same data for any number of ranks, and a
    restart at iteration t goes on as if nothing had happened. Pass it to a DataLoader as `batch_sampler`.

    Args:
        start_iteration: the first iteration to yield.
        batch_size: items of an iteration over all ranks together, a multiple of `world`.
        rank, world: this process and the number of processes.
        stop_iteration: the first iteration not to yield; None: never stops.
    """

    def __init__(
        self,
        start_iteration: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        stop_iteration: int | None = None,
    ) -> None:
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank: expected 0..world - 1 with world at least 1, got rank {rank}, world {world}")
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size: expected a positive multiple of {world} processes, got {batch_size}")
        if start_iteration < 0:
            raise ValueError(f"start_iteration: expected at least 0, got {start_iteration}")
        self.start_iteration = start_iteration
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.stop_iteration = stop_iteration

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world
        iteration = self.start_iteration
        while self.stop_iteration is None or iteration < self.stop_iteration:
            first = iteration * self.batch_size + self.rank * share
            yield list(range(first, first + share))
            iteration += 1

    def __len__(self) -> int:
        if self.stop_iteration is None:
            raise TypeError("a sampler without stop_iteration has no length")
        return max(0, self.stop_iteration - self.start_iteration)


def seed_worker(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: one thread a worker, as the items themselves need no seeding."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # whose threads, moreover, a forked process does not have
