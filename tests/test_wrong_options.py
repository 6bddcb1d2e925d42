"""Every command with a wrong value for each of its options: one line that names the option, and an exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from zs3fast import cli

SCENE = ("-c", "red sand, star")
RIGHT = {  # command lines that work, or would
    "segment": ["x.png", "-w", "zs3fast-tiny", *SCENE],
    "eval": ["-w", "zs3fast-tiny", "--dataset", "world", "--limit", "1"],
    "train": ["zegclip_world"],
    "convert": ["official.pth", "out.safetensors"],
    "export": ["zs3fast-tiny", "out.pt2"],
    "figures": ["tagclip", "x.png"],
    "demo": [],
    "app": [],
    "data": ["check", "here"],
}
# Options that any text will do for, and those whose errors come with the images or from the network.
ANYTHING = {"classes", "background", "output", "result", "clip", "pretrained", "official", "inputs", "models", "root"}
NOT_ALONE = {
    "method",
    "attention",
    "protocol",
    "crops",
    "boxes",
    "trained_on",
    "memory",
    "most",
    "host",
    "limit",
    "seed",
}


def options(command: str) -> list[Any]:
    group = typer.main.get_command(cli.app)
    found = cli.load_command(command) if command in cli.ELSEWHERE else group.commands[command]  # type: ignore[attr-defined]
    return next(iter(found.commands.values())).params if hasattr(found, "commands") else found.params


WRONG = [
    (command, param)
    for command in RIGHT
    for param in options(command)
    if param.name not in ANYTHING | NOT_ALONE and not param.name == "help" and not getattr(param, "is_flag", False)
    if param.opts[0].startswith("-")
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 8)).save("x.png")
    torch.save({"weight": torch.zeros(1)}, "official.pth")
    (tmp_path / "here").mkdir()
    return tmp_path


def run(arguments: list[str]) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize(("command", "param"), WRONG, ids=[f"{command}-{param.name}" for command, param in WRONG])
def test_a_wrong_value_names_its_option(command: str, param: Any, place: Path) -> None:
    """Some named the argument of a function of ours ("dtype", "path", "dataset"), some nothing, some did as if."""
    kind = str(param.type_descriptor.annotation)
    wrong = "-1" if "int" in kind else "nan" if "float" in kind else "no/such"
    name = max(param.opts, key=len)
    right = [*RIGHT[command]]
    for option in param.opts:
        if option in right:
            del right[right.index(option) : right.index(option) + 2]
    if param.name in ("classes_file", "dataset") and "-c" in right:
        del right[right.index("-c") : right.index("-c") + 2]
    code, output = run([command, *right, name, wrong])
    assert code == 2, output
    lines = [line for line in output.splitlines() if "note" not in line]
    if "Usage: " in output:
        assert f"Invalid value for '{name}'" in output or f"'{name}'" in output
    else:
        assert (
            len(lines) == 1 and name in lines[0] and ("expected" in lines[0] or "no " in lines[0] or "cannot" in output)
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["segment", "x.png", "-w", "zs3fast-tiny", "--method", "sclip"], "expected --weights or --method, got both"),
        (["segment", "x.png", "-w", "zs3fast-tiny", "--clip", "ViT-B-16"], "expected --weights or --clip, got both"),
        (["segment", "x.png", "-w", "zs3fast-tiny", "--untrained"], "expected --weights or --untrained, got both"),
        (["segment", "x.png", "-w", "zs3fast-tiny", "--no-quick-gelu"], "expected --weights or --quick-gelu, got both"),
        (["segment", "", "-w", "zs3fast-tiny"], "INPUT: expected images, folders or globs, got an empty name"),
        (["segment", "x.png", "-w", "zs3fast-tiny", "-o", "x.png"], "--output: x.png is a file, expected a folder"),
        (["segment", "x.png", "-w", "zs3fast-tiny", "-o", "x.png/in"], "--output: x.png is a file, expected a folder"),
        (["segment", "x.png", "-w", "zs3fast-tiny", "--proposer", "files:no"], "--proposer: no file or folder no"),
        (["segment", "x.png", "-w", "official.pth", "--trained-on", "voc"], "--trained-on: expected one of voc20, "),
        (["segment", "x.png", "-w", "official.pth", "--trained-on", "ade150"], "--trained-on: expected one of voc20, "),
        (["segment", "x.png", "-w", "zs3fast-tiny", "--dtype", "fp8"], "float32, bfloat16, float16, auto, got 'fp8'"),
        (["eval", "-w", "zs3fast-tiny", "--dataset", "world", "-o", "x.png"], "--output: x.png is a file, expected"),
        (["eval", "-w", "zs3fast-tiny", "--dataset", "world", "--data", "here"], "--data, --fold: world has neither"),
        (["eval", "-w", "zs3fast-tiny", "--dataset", "world", "--clip", "ViT-B-16"], "--clip: is for CLIP's weights"),
        (["train", "zegclip_world", "-o", "x.png"], "--output: x.png is a file, expected a folder"),
        (["train", "--set", "data.name=mine.yaml"], "CONFIG: expected a setting or a YAML file"),
        (["train", "--data", "here"], "CONFIG: expected a setting or a YAML file"),
        (["train", "zegclip_voc20_inductive", "--set", "data.name=mine.yaml"], "--set: no file mine.yaml"),
        (["segment", "x.png", "-w", "zs3fast-tiny", "--device", "meta"], "--device: 'meta' cannot be used here"),
        (["figures", "tagclip", "x.png", "--device", "meta"], "--device: 'meta' cannot be used here"),
        (["export", "zs3fast-tiny", "x.pt2", "--height", "63", "--width", "64"], "--height: expected multiples of the"),
        (["train", "--show"], "CONFIG: expected a setting or a YAML file"),
        (["demo", "-o", "x.png"], "--output: x.png is a file, expected a folder"),
        (["figures", "tagclip", "x.png", "-o", "x.png"], "--output: x.png is a file, expected a folder"),
        (["figures", "tagclip", "x.png", "--trained-on", "voc20"], "--trained-on: expected an official checkpoint"),
        (["convert", "official.pth", "x.safetensors", "--trained-on", "voc"], "--trained-on: expected one of voc20"),
        (["convert", "official.pth", "x.safetensors", "--seen-offset", "nan"], "--seen-offset: expected a finite num"),
        (["export", "zs3fast-tiny", "model.txt"], "OUT: expected a name that ends in .pt2"),
        (["export", "zs3fast-tiny", "x.pt2", "--output", "masks"], "--output: expected one of labels, mask_logits"),
        (["export", "zs3fast-tiny", "x.pt2", "--image", "none.png"], "--image: no file none.png"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], said: str) -> None:
    if arguments[0] == "segment" and "--trained-on" not in arguments:
        arguments = [*arguments, *SCENE]
    code, output = run(arguments)
    assert code == 2 and said in output, output
    assert len([line for line in output.splitlines() if "note" not in line]) == 1


def test_no_arguments_at_all() -> None:
    """The first thing that a newcomer types; it was a traceback."""
    code, output = run([])
    assert code in (0, 2) and "Usage" in output and "segment" in output
    for command in ("segment", "eval", "convert", "export", "figures", "bulk"):
        code, output = run([command])
        assert "Usage" in output and "Example" in output
