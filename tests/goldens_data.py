"""Goldens: what the official implementations answered."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDERS = [Path(__file__).parent / "goldens", *map(Path, filter(None, [os.environ.get("ZS3FAST_GOLDENS")]))]
SEEN = [0, 1, 2, 4, 6]
HEADS = 4


def golden_files(method: str) -> list[Path]:
    """Files of a method, one of each name; the tests' own copy first."""
    files = {path.name: path for folder in reversed(FOLDERS) for path in sorted(folder.glob(f"{method}*.npz"))}
    return list(files.values())


class Golden:
    """One golden file; `golden["eval/scores"]` is a tensor."""

    def __init__(self, path: Path):
        self._arrays = dict(np.load(path))

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self._arrays[key])

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors under `prefix/`, by the rest of their key."""
        return {key[len(prefix) + 1 :]: self[key] for key in self._arrays if key.startswith(prefix + "/")}


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm."""
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()
