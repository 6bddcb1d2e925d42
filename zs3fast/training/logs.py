"""What a run says of itself: a line of JSON an iteration, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

from zs3fast.utils.console import progress_bar, stdout
from zs3fast.utils.distributed import DistEnv
from zs3fast.utils.memory import resident_bytes

logger = logging.getLogger("zs3fast")


class RunLog:
    """Keeps the terms of every iteration on the device and writes them out every so often.

    `log.jsonl` in the run's folder has one line an iteration: {"iteration", "lr", "loss", terms}, each the mean over
    all images of the iteration. Lines behind `start` are of an earlier attempt and are cut off.
    """

    def __init__(self, folder: Path, env: DistEnv, start: int, stop: int, images: int, tensorboard: bool):
        self.path = folder / "log.jsonl"
        self._env, self._images = env, images
        self._pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self._writer = self._progress = None
        self._start, self._stop = start, stop
        self._since = self._began = time.perf_counter()
        if not env.main:
            return
        _cut(self.path, start)
        if tensorboard:
            self._writer = _tensorboard(folder / "tensorboard", start)
        if stdout.is_terminal:
            self._progress = progress_bar(stdout, transient=False)
            self._task = self._progress.add_task("training", total=stop, completed=start)
            self._progress.start()

    def add(self, iteration: int, lr: float, terms: Mapping[str, Tensor]) -> None:
        """Note an iteration's terms; nothing is waited for."""
        self._pending.append((iteration, lr, {name: term.detach().float() for name, term in terms.items()}))

    def flush(self) -> dict[str, float]:
        """Write what was noted; every process must call this. Returns the last iteration's terms.

        Raises:
            RuntimeError: a loss that is not finite.
        """
        if not self._pending:
            return {}
        pending, self._pending = self._pending, []
        names = list(pending[0][2])
        stacked = torch.stack([torch.stack([terms[name] for name in names]) for _, _, terms in pending])
        values = (self._env.total(stacked) / self._env.world).cpu().double().numpy()
        for (iteration, _, _), row in zip(pending, values):
            bad = [f"{name} {value:g}" for name, value in zip(names, row) if not np.isfinite(value)]
            if bad:
                raise RuntimeError(
                    f"iteration {iteration}: the loss is not finite ({', '.join(bad)}); the weights are those of "
                    "the iteration before"
                )
        last = dict(zip(names, values[-1].tolist()))
        if self._env.main:
            seconds = (time.perf_counter() - self._since) / len(pending)
            self._write(pending, names, values, seconds)
        self._since = time.perf_counter()
        return last

    def _write(self, pending: list[Any], names: list[str], values: np.ndarray, seconds: float) -> None:
        with open(self.path, "a") as file:
            for (iteration, lr, _), row in zip(pending, values.tolist()):
                file.write(json.dumps({"iteration": iteration, "lr": lr, **dict(zip(names, row))}) + "\n")
        iteration, lr, _ = pending[-1]
        means = dict(zip(names, values.mean(0).tolist()))
        speed = {"seconds_per_iteration": seconds, "images_per_second": self._images / seconds}
        if self._writer is not None:
            for name, value in {**means, "lr": lr, **speed}.items():
                self._writer.add_scalar(f"train/{name}", value, iteration)
            self._writer.flush()
        text = f"loss {means['loss']:.4g}  lr {lr:.3g}  {speed['images_per_second']:.3g} images/s"
        done, memory = iteration + 1, f"{self._memory() / 2**20:.0f} MiB"
        if self._progress is not None:
            self._progress.update(self._task, completed=done, description=f"{text}  {memory}")
        else:
            left = (self._stop - done) * (time.perf_counter() - self._began) / (done - self._start)
            eta = timedelta(seconds=round(left))
            stdout.print(f"iteration {done}/{self._stop}: {text}  eta {eta}  {memory}")

    def _memory(self) -> int:
        """Bytes: the most that was allocated on the GPU, or what this process holds."""
        device = self._env.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()

    def note(self, text: str) -> None:
        """A line for the reader."""
        if self._env.main:
            stdout.print(escape(text))

    def scores(self, iteration: int, values: Mapping[str, float]) -> None:
        """Validation scores, into validation.jsonl and TensorBoard."""
        if not self._env.main:
            return
        with open(self.path.with_name("validation.jsonl"), "a") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"validation/{name}", value, iteration)

    def image(self, iteration: int, name: str, pixels: np.ndarray) -> None:
        """An image [H, W, 3] uint8 for TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, iteration, dataformats="HWC")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()


def _cut(path: Path, start: int) -> None:
    """Keep the lines of iterations before `start`; a line that a killed writer left unfinished goes too."""
    for file in (path, path.with_name("validation.jsonl")):
        if not file.exists():
            continue
        kept = []
        last = start if file is not path else start - 1  # a validation is named after the iterations done before it
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["iteration"] <= last:
                kept.append(line + "\n")
        temporary = file.with_name(f".{file.name}")
        temporary.write_text("".join(kept))
        temporary.replace(file)


def _tensorboard(folder: Path, start: int) -> Any:
    """A writer of event files; None, with a warning, where there is none to be had: the run does not need it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning(
            "log.tensorboard: tensorboard is not installed (pip install 'zs3fast[train]'): no event files, log.jsonl "
            "has it all"
        )
        return None
    return SummaryWriter(str(folder), purge_step=start)
