"""What a run says of itself: a line of JSON an iteration, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from zs3fast.utils.distributed import DistEnv


class RunLog:
    """Keeps the terms of every iteration on the device and writes them out every so often.

    `log.jsonl` in the run's folder has one line an iteration: {"iteration", "lr", "loss", terms}, each the mean over
    all images of the iteration. Lines behind `start` are of an earlier attempt and are cut off.
    """

    def __init__(self, folder: Path, env: DistEnv, start: int, stop: int, images: int, tensorboard: bool):
        self.path = folder / "log.jsonl"
        self._group, self._images = env, images
        self._pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self._writer = self._progress = None
        self._since = time.perf_counter()
        if not env.main:
            return
        _cut(self.path, start)
        self.console = Console(soft_wrap=True, highlight=False)
        if tensorboard:
            self._writer = _tensorboard(folder / "tensorboard", start)
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self.console)
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
        values = torch.stack([torch.stack([terms[name] for name in names]) for _, _, terms in pending])
        values = (self._group.total(values) / self._group.world).cpu().double().numpy()
        for (iteration, _, _), row in zip(pending, values):
            bad = [f"{name} {value:g}" for name, value in zip(names, row) if not np.isfinite(value)]
            if bad:
                raise RuntimeError(
                    f"iteration {iteration}: the loss is not finite ({', '.join(bad)}); the weights are those of "
                    "the iteration before"
                )
        last = dict(zip(names, values[-1].tolist()))
        if self._group.main:
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
        if self._progress is not None:
            self._progress.update(self._task, completed=iteration + 1, description=text)
        else:
            self.console.print(f"iteration {iteration}: {text}")

    def note(self, text: str) -> None:
        """A line for the reader."""
        if self._group.main:
            self.console.print(text)

    def scores(self, iteration: int, values: Mapping[str, float]) -> None:
        """Validation scores, into validation.jsonl and TensorBoard."""
        if not self._group.main:
            return
        with open(self.path.with_name("validation.jsonl"), "a") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"validation/{name}", value, iteration)

    def picture(self, iteration: int, name: str, pixels: np.ndarray) -> None:
        """A picture [H, W, 3] uint8 for TensorBoard."""
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
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "log.tensorboard: tensorboard is not installed (pip install 'zs3fast[train]', or --set "
            "log.tensorboard=false)"
        ) from None
    return SummaryWriter(str(folder), purge_step=start)
