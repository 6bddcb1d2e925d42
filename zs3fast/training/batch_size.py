"""How many images fit: training steps of one batch size after another until a memory budget is full.

Every size runs in a process of its own, so its peak is of that size alone and running out of memory ends nothing else.
The step is the one that the configuration trains with (forward, loss, backward, AdamW; its precision, recomputation and
compilation) on a model with random weights. Images are noise and labels blocks of classes, both of the configuration's
size: nothing is read but the dataset's list of classes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zs3fast.training import loop, setup
from zs3fast.training.config import TrainConfig, from_dict
from zs3fast.training.optimiser import freeze, make_optimizer
from zs3fast.utils import distributed, memory

MOST = 1024
SPARE = 0.9  # of the memory that is free, where no budget is given
TIMED = 2  # iterations, after one that makes the optimiser's state
NO_ROOM = {"peak_bytes": None, "seconds": None}


@dataclass(frozen=True)
class Classes:
    """The part of a dataset that a step needs; a `setup.Vocabulary`."""

    class_names: list[str]
    seen: list[int]
    ignore_index: int


@dataclass(frozen=True)
class Trial:
    """One batch size: what a step took. peak_bytes: None if it did not fit.  seconds: of an iteration."""

    batch: int
    peak_bytes: int | None
    seconds: float | None


@dataclass(frozen=True)
class BatchSizes:
    """The search: its trials in the order they ran, the largest batch that fits (0: none), the budget in bytes.

    budget: None: all of the GPU.  complete: False if the search ended at its last size, which fits.
    """

    trials: tuple[Trial, ...]
    largest: int
    budget: int | None
    complete: bool

    def bytes_an_image(self, trial: Trial) -> float | None:
        """What each image adds: the slope from the smallest batch that fits. None for that batch, and what did not."""
        first = min((t for t in self.trials if t.peak_bytes is not None), key=lambda t: t.batch, default=trial)
        if trial.peak_bytes is None or first.peak_bytes is None or trial.batch == first.batch:
            return None
        return (trial.peak_bytes - first.peak_bytes) / (trial.batch - first.batch)


def find_batch_size(
    config: TrainConfig,
    memory_gib: float | None = None,
    most: int = MOST,
    progress: Callable[[Trial], None] | None = None,
) -> BatchSizes:
    """The largest number of images a forward and backward pass of this training takes on one process.

    Sizes double until one does not fit, then the gap is halved. On the CPU the peak is the process's resident memory,
    libraries included; on a GPU it is what torch allocated.

    Args:
        config: as for `train`; `batch_size` and `micro_batch` are not used. Weights are not read.
        memory_gib: the budget. None: all of the GPU; on the CPU 0.9 of the memory that is free.
        most: the largest size tried.
        progress: called with every trial as it ends.
    Raises:
        ValueError: a budget or size out of range, a configuration or data that will not do.
        RuntimeError: a step that fails for another reason than memory.
    """
    if most < 1:
        raise ValueError(f"most: expected at least 1, got {most}")
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise ValueError(f"memory: expected a number of GiB above 0, got {memory_gib:g}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("WORLD_SIZE: the search is for one process, expected to run without torchrun")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    budget = _budget(device, memory_gib)
    dataset = setup.open_data(config)
    vocabulary = Classes(list(dataset.class_names), list(dataset.seen), dataset.ignore_index)
    config = replace(config, device=device, init_from=None, model={**config.model, "pretrained": None})
    trials: list[Trial] = []

    def fits(batch: int) -> int | None:
        trials.append(_in_fresh_process(config, vocabulary, batch, budget))
        if progress is not None:
            progress(trials[-1])
        return trials[-1].peak_bytes

    largest, _ = largest_batch(fits, most)
    return BatchSizes(tuple(trials), largest, budget, largest < most)


def largest_batch(fits: Callable[[int], int | None], most: int) -> tuple[int, int | None]:
    """The largest batch up to `most` for which `fits(batch)` gives peak bytes and not None: doubling, then halving."""
    low, peak, high = 0, None, 1
    while high <= most and (found := fits(high)) is not None:
        low, peak, high = high, found, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        found = fits(middle)
        if found is None:
            high = middle
        else:
            low, peak = middle, found
    return low, peak


def micro_batch(batch_size: int, largest: int) -> int:
    """The largest forward pass that divides an iteration of `batch_size` images and is not above `largest` >= 1."""
    return max(size for size in range(1, min(batch_size, largest) + 1) if batch_size % size == 0)


def _budget(device: str, memory_gib: float | None) -> int | None:
    given = None if memory_gib is None else int(memory_gib * 2**30)
    if device.startswith("cuda"):
        return given
    free = memory.available_bytes()
    if given is not None and given > free:
        raise ValueError(f"memory: expected at most {free / 2**30:.1f} GiB, which are free, got {memory_gib:g}")
    return int(SPARE * free) if given is None else given


def _in_fresh_process(config: TrainConfig, vocabulary: Classes, batch: int, budget: int | None) -> Trial:
    request = {"config": config.to_dict(), "vocabulary": asdict(vocabulary), "batch": batch, "budget": budget}
    request["threads"] = torch.get_num_threads()
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "zs3fast.training.batch_size"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode == -signal.SIGKILL:  # by the system, which had no memory left
        return Trial(batch, None, None)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"batch {batch}: the training step failed: {reason}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise ValueError(answer["error"])
    return Trial(batch, answer["peak_bytes"], answer["seconds"])


# In the fresh process ------------------------------------------------------------------------------------------------


def main() -> None:
    """Read a request, print the answer as one line of JSON."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    config = from_dict(request["config"])
    try:
        answer = _try(config, Classes(**request["vocabulary"]), request["batch"], request["budget"])
    except (RuntimeError, MemoryError, ImportError, ValueError, OSError) as error:
        if memory.out_of_memory(error):
            answer = NO_ROOM
        elif isinstance(error, (ValueError, OSError)):
            answer = {"error": str(error)}
        else:
            raise
    print(json.dumps(answer))


def _try(config: TrainConfig, vocabulary: Classes, batch_size: int, budget: int | None) -> dict[str, Any]:
    with distributed.dist_env(config.device) as env:
        if env.device.type == "cpu" and budget is not None and memory.resident_bytes() > budget:
            return NO_ROOM  # the libraries alone
        _limit(env.device, budget)
        seconds = [time.perf_counter() - started for started in _iterations(config, vocabulary, batch_size, env)]
    cuda = env.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(env.device) if cuda else memory.peak_resident_bytes()
    if budget is not None and peak > budget:
        return NO_ROOM
    return {"peak_bytes": peak, "seconds": sum(seconds[-TIMED:]) / TIMED}


def _limit(device: torch.device, budget: int | None) -> None:
    if device.type != "cuda":
        assert budget is not None  # `_budget` gives one on the CPU
        memory.limit_memory(budget)
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if budget is None:
        return
    if budget > total:
        raise ValueError(
            f"memory: expected at most {total / 2**30:.1f} GiB, which the GPU has, got {budget / 2**30:.1f}"
        )
    torch.cuda.set_per_process_memory_fraction(budget / total, device)


def _iterations(config: TrainConfig, vocabulary: Classes, size: int, env: distributed.DistEnv) -> Iterator[float]:
    """Run the loop's iterations; yields when each began."""
    device = env.device
    model = setup.new_model(config, vocabulary)
    freeze(model)
    rows = torch.nn.functional.normalize(torch.randn(len(vocabulary.class_names), model.embed_dim), dim=-1)
    step = setup.build_step(config, vocabulary, model, rows, device)
    optimizer = make_optimizer(model, config.optimizer)
    batch = {name: value.to(device) for name, value in setup.synthetic_batch(config, vocabulary, size).items()}
    split = setup.Shares(size, size, size, 1)
    for iteration in range(1 + TIMED):
        started = time.perf_counter()
        loop.gradients(step, step, batch, split, env, (config.seed, iteration))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield started


if __name__ == "__main__":
    main()
