"""Results so far on disk, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from zs3fast.utils.files import replacing


class PartialResults:
    """A folder of files, each with the counts of some work items and the list of these items in one.

    A file is replaced whole, so its counts and its list always agree and no item is lost or counted twice, whenever
    the process dies. Runs of any number of processes can go on from one another.

    Args:
        folder: made when first written to.
        settings: what the counts depend on; JSON-safe. Files made with others are refused.
        resume: go on from the files there. False: they are deleted.
        every: seconds between two writes.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any], resume: bool, every: float = 30.0):
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))
        self.resume = resume
        self.every = every
        self._written = time.monotonic()
        self._own: Path | None = None

    def load(self) -> tuple[np.ndarray | None, list[dict[str, Any]]]:
        """The counts of earlier runs, None without any, and their item records; call in one process only.

        Raises:
            ValueError: files of an evaluation with other settings, naming the first that differs.
        """
        table, records = None, []
        for file in self._files():
            if not self.resume:
                file.unlink()
                continue
            with np.load(file, allow_pickle=False) as content:
                header, counts = json.loads(str(content["header"])), content["table"]
            self._check(file, header["settings"])
            table = counts if table is None else table + counts
            records += header["records"]
        return table, records

    def start(self, rank: int) -> None:
        """Choose this process's file; after `load`, before any process writes."""
        runs = [int(file.stem.split("-")[1]) for file in self._files()]
        self._own = self.folder / f"part-{max(runs, default=-1) + 1}-{rank}.npz"

    def due(self) -> bool:
        """Whether the last write is long enough ago."""
        return time.monotonic() - self._written >= self.every

    def save(self, table: np.ndarray, records: Iterable[dict[str, Any]]) -> None:
        """Write this process's counts and records."""
        assert self._own is not None  # `start` has chosen it
        header = json.dumps({"settings": self.settings, "records": list(records)})
        with replacing(self._own) as temporary:
            np.savez_compressed(temporary, table=table, header=np.array(header))
        self._written = time.monotonic()

    def clear(self) -> None:
        """Delete the files, and the folder if nothing else is in it."""
        for file in self._files():
            file.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*-*.npz"))

    def _check(self, file: Path, settings: dict[str, Any]) -> None:
        for key in sorted(self.settings.keys() | settings.keys()):
            if self.settings.get(key) != settings.get(key):
                raise ValueError(
                    f"resume: {file} was made with {key} = {settings.get(key)!r}, this is {self.settings.get(key)!r}: "
                    "start anew, or in another folder"
                )
