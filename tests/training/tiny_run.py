"""A VOC-shaped tree of ten small images and a configuration that trains on it in about a second."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.tiny_clip import CONFIG as CLIP
from zs3fast.training.config import TrainConfig, from_dict

ROOT = Path(__file__).parents[2]


def voc_tree(root: Path, train: int = 10, val: int = 3, side: int = 56) -> Path:
    """Images whose classes have colours of their own: seen ones, unseen ones, a void border."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (21, 3))
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = {"train": [f"t{i}" for i in range(train)], "val": [f"v{i}" for i in range(val)]}
    for split, ids in names.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(ids) + "\n")
        for number, name in enumerate(ids):
            values = rng.choice([0, 1, 3, 8, 12, 15], 16)
            values[rng.choice(16, 4, replace=False)] = [1, 3, 16 + number % 5, 17]  # two seen, two unseen at least
            labels = values.reshape(4, 4).repeat(side // 4, 0).repeat(side // 4, 1)
            image = np.clip(colours[labels] + rng.integers(-20, 20, (side, side, 3)), 0, 255)
            labels[:2] = 255
            Image.fromarray(image.astype(np.uint8)).save(root / f"JPEGImages/{name}.jpg", quality=95)
            Image.fromarray(labels.astype(np.uint8)).save(root / f"SegmentationClass/{name}.png")
    return root


def text_file(path: Path, classes: int = 20, width: int = 32) -> Path:
    rows = np.random.default_rng(1).standard_normal((classes, width))
    np.save(path, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
    return path


def values(folder: Path, method: str = "zegclip", **changes: Any) -> dict[str, Any]:
    """Nested values of a run on a tree in `folder`; `changes` replace top-level keys."""
    root = folder / "VOC2012"
    if not root.exists():
        voc_tree(root)
        text_file(folder / "text.npy")
    model: dict[str, Any] = {"clip": CLIP, "num_prompts": 2, "decoder_heads": 4, "decoder_width": 48}
    model |= {"regions": 4} if method == "clip_rc" else {}
    return {
        "method": method,
        "iterations": 6,
        "batch_size": 4,
        "micro_batch": 2,
        "seed": 3,
        "device": "cpu",
        "output": str(folder / "run"),
        "model": model,
        "data": {"root": str(root), "crop_size": 32, "workers": 0},
        "text": {"embeddings": str(folder / "text.npy")},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_iterations": 2},
        "checkpoint": {"every": 2, "keep": 2},
        "log": {"every": 2, "tensorboard": False},
        **changes,
    }


def config(folder: Path, method: str = "zegclip", **changes: Any) -> TrainConfig:
    return from_dict(values(folder, method, **changes))


def command(processes: int, *arguments: str) -> list[str]:
    """The command line that trains in so many processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launch if processes > 1 else []), "-m", "zs3fast.train", *arguments]


def environment() -> dict[str, str]:
    """This process's, with as many threads: sums over another number of threads round differently."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_as(rank: int, world: int, port: int, threads: int, config: TrainConfig, resume: bool) -> None:
    """What torchrun's process `rank` does."""
    from zs3fast.training.loop import train

    torch.set_num_threads(threads)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    train(config, resume=resume)


def run(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(processes, *arguments), capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300
    )
