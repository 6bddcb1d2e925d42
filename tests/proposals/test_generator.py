"""Files of mask generators: what they hold is compared before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

pytest.importorskip("transformers", reason="the proposals extra is not installed")
pytest.importorskip("scipy", reason="the proposals extra is not installed")

from tests.proposals.tiny_generators import OPTIONS
from zs3fast.proposals.generator import METADATA_KEY, ProposalGenerator, load_generator, save_generator
from zs3fast.utils.errors import CheckpointError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = ProposalGenerator(method="mask2former", image_size=64, options=OPTIONS["mask2former"])
    save_generator(model, tmp_path / "generator.safetensors")
    return tmp_path / "generator.safetensors"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with safetensors.safe_open(path, "pt") as opened:
        tensors, header = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()
    config = json.loads(header[METADATA_KEY])
    config = change(config) or config
    safetensors.torch.save_file(tensors, path, metadata={METADATA_KEY: json.dumps(config)})


def test_a_file_gives_its_generator_back(file: Path) -> None:
    model = load_generator(file)
    torch.manual_seed(0)
    same = ProposalGenerator(method="mask2former", image_size=64, options=OPTIONS["mask2former"]).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    assert not model.training and model.image_size == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["options"].update(hidden_dim=200_000),
        lambda config: config["options"].update(feature_size=10**6),
        lambda config: config["options"].update(decoder_layers=10**5),
        lambda config: config["options"].update(num_queries=10**9),
        lambda config: config.update(method="yolo"),
        lambda config: config.update(colour="red"),
        lambda config: ["mask2former"],
        lambda config: {"options": 3},
    ],
    ids=["wide", "features", "deep", "queries", "method", "key", "list", "options"],
)
def test_a_header_of_something_else_is_one_error_and_takes_no_memory(file: Path, change: Any) -> None:
    edit(file, change)
    with pytest.raises(CheckpointError, match=file.name):
        load_generator(file)


def test_a_header_fetches_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zs3fast.proposals._library.load_backbone", lambda name: pytest.fail(f"asked for {name}"))
    edit(file, lambda config: config.update(pretrained="microsoft/resnet-50"))
    assert load_generator(file).config["pretrained"] is None
