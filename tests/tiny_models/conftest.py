"""A CLIP of the world and a run on it, both hardly trained, for all tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tools.world.build import trained_model
from tools.world.contrastive import load_contrastive_config
from tools.world.contrastive.run import build_clip, export_clip


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's CLIP with random weights, as its training exports it."""
    config = replace(load_contrastive_config(), output=str(tmp_path_factory.mktemp("clip")))
    return export_clip(build_clip(config)[0], config)


@pytest.fixture(scope="session")
def run(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations of TagCLIP on it."""
    short = ("iterations=2", "batch_size=2", "data.workers=0", "device=cpu", "schedule.warmup_iterations=1")
    return trained_model("tagclip", tmp_path_factory.mktemp("runs"), clip, overrides=short)
