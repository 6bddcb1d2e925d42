"""bench/training.py on a toy network: every part runs."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from bench import training
from zs3fast.training.steps import OneStageStep


def test_every_part_runs() -> None:
    options = ["--tiny", "--models", "tagclip", "--classes", "20", "--batch", "2", "--rounds", "1"]
    options += ["--most", "1", "--processes", "2"]
    rows = training.main(["largest", "step", "scaling", "activations", *options, "--memory-gib", "4", "--compile"])
    found = {row["backend"]: row["largest_batch"] for row in rows if row["pass"] == "largest batch"}
    assert found == {"official": 1, "zs3fast": 1, "zs3fast recompute": 1}
    steps = [row["backend"] for row in rows if row["pass"] == "step"]
    assert steps == [f"zs3fast{way}, 1 process" for way in ("", " recompute", " compiled")]
    scaling = [row for row in rows if row["pass"] == "scaling"]
    assert [row["processes"] for row in scaling] == [2]
    timed = [row for row in rows if row["pass"] in ("step", "scaling")]
    assert all(row["images_per_second"] > 0 and row["peak_mib"] > 0 for row in timed)
    kept = {row["backend"]: row["peak_mib"] for row in rows if row["pass"] == "activations"}
    assert kept.keys() == {"official", "zs3fast"} and 0 < kept["zs3fast"] < kept["official"]


def test_the_compiled_step_is_the_one_that_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # which the step's process sets, and this one shall lose again
    compiled = []
    monkeypatch.setattr(OneStageStep, "compile", lambda step: compiled.append(step))
    args = training.parse_arguments(["--tiny", "--rounds", "1"])
    for way, expected in (("", 0), (" compiled", 1)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        setting = training.make_setting(args, "tagclip", 20, 2)
        training.train_steps(0, 1, port, setting, "fp32", way, vars(args), str(tmp_path / "result.json"))
        assert len(compiled) == expected
