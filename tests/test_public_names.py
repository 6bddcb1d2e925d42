"""What a user's code, scripts, settings and weight files rely on by name: a name of tests/public_names.txt stays.

`python -m tests.test_public_names` writes the list anew, with what has come since; a line that goes is a decision.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer

import zs3fast
from tests.tiny import tiny_model
from zs3fast.cli import ELSEWHERE, app, load_command
from zs3fast.inference.options import SegmenterOptions
from zs3fast.models.registry import model_class
from zs3fast.training.config import TrainConfig, from_dict

LIST = Path(__file__).with_name("public_names.txt")
ROOMS = ("data", "evaluation", "ops", "proposals", "text", "training", "weights")
ADDRESSES = (
    "bench.baselines.OfficialZegCLIP",
    "tests.tiny.tiny_model",
    "zs3fast.compiled.CompiledModel",
    "zs3fast.data.layouts.read_ids",
    "zs3fast.data.world.WorldDataset",
    "zs3fast.encoders.quantize.quantize_encoder",
    "zs3fast.inference.compiled.CompiledModel",
    "zs3fast.inference.options.SegmenterOptions",
    "zs3fast.inference.segmenter.Segmenter",
    "zs3fast.segmenter.Segmenter",
    "zs3fast.segmenter.find_weights",
    "zs3fast.segmenter.is_converted",
    "zs3fast.segmenter.read_official",
    "zs3fast.training.steps.OneStageStep",
    "zs3fast.types.Proposals",
    "zs3fast.types.Segmentation",
)


def _parameters(what: Any) -> set[str]:
    """Names that a call may give; where `keywords` stand for options, these."""
    names = [name for name, one in inspect.signature(what).parameters.items() if one.kind is not one.VAR_POSITIONAL]
    if "keywords" in names:
        names += [field.name for field in dataclasses.fields(SegmenterOptions)]
    return {name for name in names if name not in ("self", "keywords", "options", "kwargs")}


def _attributes() -> Iterator[tuple[str, Any]]:
    """Every public name and what it names."""
    for name in zs3fast.__all__:
        yield f"zs3fast.{name}", getattr(zs3fast, name)
    for room in ROOMS:
        module = importlib.import_module(f"zs3fast.{room}")
        for name in module.__all__:
            yield f"zs3fast.{room}.{name}", getattr(module, name)
    for address in ADDRESSES:
        module_name, _, name = address.rpartition(".")
        yield address, getattr(importlib.import_module(module_name), name)


def names_and_keywords() -> Iterator[str]:
    told = set()
    for name, what in _attributes():
        yield f"name {name}"
        if id(what) in told or not (inspect.isfunction(what) or inspect.isclass(what)):
            continue
        told.add(id(what))
        if inspect.isfunction(what) or not issubclass(what, Exception):
            yield from (f"keyword {name}({parameter})" for parameter in _parameters(what))
        for member in vars(what) if inspect.isclass(what) else ():
            if not member.startswith("_") or member == "__call__":
                yield f"name {name}.{member}"
                if callable(call := getattr(what, member)):
                    yield from (f"keyword {name}.{member}({parameter})" for parameter in _parameters(call))
    for method in zs3fast.list_models():
        for kind in model_class(method).__mro__:
            if kind.__module__.startswith("zs3fast."):
                yield from (f"keyword create_model({method}, {parameter})" for parameter in _parameters(kind))


def schemas() -> Iterator[str]:
    importlib.import_module("zs3fast.ops")
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("zs3fast::"):
            yield f"schema {schema}"


def flags() -> Iterator[str]:
    commands = {**typer.main.get_command(app).commands, **{name: load_command(name) for name in ELSEWHERE}}

    def of(command: Any, path: str) -> Iterator[str]:
        for option in command.params:
            yield from (f"flag {path} {flag}" for flag in (*option.opts, *option.secondary_opts))
        for name, one in getattr(command, "commands", {}).items():
            yield from of(one, f"{path} {name}")

    for name, command in commands.items():
        yield from of(command, f"zs3fast {name}")


def settings() -> Iterator[str]:
    def of(config: Any, prefix: str) -> Iterator[str]:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                yield from of(value, f"{prefix}{field.name}.")
            else:
                yield f"yaml {prefix}{field.name}"

    config: TrainConfig = from_dict({"iterations": 1})
    yield from of(config, "")


def weights() -> Iterator[str]:
    """Tensors of a weight file, layers as N, and the keys of the configuration inside it."""
    for method in zs3fast.list_models():
        model = tiny_model(method)
        yield from (f"tensor {method} {re.sub(r'[.][0-9]+[.]', '.N.', key)}" for key in model.state_dict())
        yield from (f"config {method} {key}" for key in model.config)


def public_names() -> set[str]:
    return {line for kind in (names_and_keywords, schemas, flags, settings, weights) for line in kind()}


def test_no_public_name_goes() -> None:
    listed = LIST.read_text().splitlines()
    kinds = {line.split()[0] for line in listed}
    assert kinds == {"name", "keyword", "schema", "flag", "yaml", "tensor", "config"}
    assert sorted(set(listed) - public_names()) == []


if __name__ == "__main__":
    LIST.write_text("".join(f"{line}\n" for line in sorted(public_names())))
