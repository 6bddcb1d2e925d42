"""The search for the largest batch: sizes in the right order, real steps in processes of their own, clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from tests.training import tiny_run
from zs3fast.training import batch_size, command, setup
from zs3fast.training.batch_size import BatchSizes, Classes, Trial, find_batch_size, largest_batch, micro_batch
from zs3fast.utils.distributed import DistEnv

GIB = 2**30
CLASSES = Classes([f"class {i}" for i in range(20)], list(range(15)), 255)


def run_command(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command.train)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def config_file(folder: Path, **changes: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run.values(folder, **changes)))
    return path


def fake(limit: int) -> Callable[..., Trial]:
    """Trials of 1 GiB and 100 MiB an image that fit up to a limit."""

    def run(config: object, vocabulary: object, batch: int, budget: int | None) -> Trial:
        return Trial(batch, GIB + batch * 100 * 2**20, 0.5) if batch <= limit else Trial(batch, None, None)

    return run


def test_largest_batch_is_found_by_doubling_and_halving() -> None:
    for limit in (0, 1, 2, 5, 13, 64, 100):
        tried: list[int] = []

        def fits(batch: int, limit: int = limit, tried: list[int] = tried) -> int | None:
            tried.append(batch)
            return 1000 * batch if batch <= limit else None

        batch, peak = largest_batch(fits, most=64)
        assert batch == min(limit, 64) and peak == (1000 * batch or None)
        assert len(tried) <= 14 and max(tried) <= 64


def test_micro_batch_divides_the_iteration() -> None:
    assert [micro_batch(16, largest) for largest in (1, 3, 7, 8, 15, 16, 40)] == [1, 2, 4, 8, 8, 16, 16]


def test_bytes_an_image_are_the_slope() -> None:
    trials = (Trial(1, 1000, 0.1), Trial(2, 1300, 0.1), Trial(4, None, None), Trial(3, 1610, 0.1))
    found = BatchSizes(trials, 3, None, True)
    assert [found.bytes_an_image(trial) for trial in trials] == [None, 300, None, 305]


def test_real_steps_run_in_processes_of_their_own(tmp_path: Path) -> None:
    lines: list[Trial] = []
    found = find_batch_size(tiny_run.config(tmp_path), memory_gib=3, most=2, progress=lines.append)
    assert [trial.batch for trial in found.trials] == [1, 2] and list(found.trials) == lines
    assert (found.largest, found.budget, found.complete) == (2, 3 * GIB, False)
    assert all(2**26 < trial.peak_bytes < 3 * GIB and trial.seconds > 0 for trial in found.trials)


def test_what_does_not_fit_is_no_failure(tmp_path: Path) -> None:
    code, text = run_command(config_file(tmp_path), "--find-batch-size", "--memory", 0.1)
    assert code == 1 and "1 does not fit" in text and "not one image fits in 0.10 GiB" in text


def test_the_table_and_what_it_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "_in_fresh_process", fake(3))
    code, text = run_command(config_file(tmp_path), "--find-batch-size", "--memory", 2)
    assert code == 0
    assert "1 1124 2.00 2 1224 100.0 4.00 3 1324 100.0 6.00 4 does not fit" in text
    assert "largest: 3 images a forward and backward pass in 2.00 GiB" in text
    assert "batch_size 4, on one process, fits with --set micro_batch=2" in text
    code, text = run_command(config_file(tmp_path), "--find-batch-size", "--memory", 2, "--most", 2)
    assert code == 0 and "2.00 GiB, the largest size tried" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--find-batch-size", "--memory", "0"], "memory: expected a number of GiB above 0, got 0"),
        (["--find-batch-size", "--memory", "-3"], "memory: expected a number of GiB above 0, got -3"),
        (["--find-batch-size", "--memory", "nan"], "memory: expected a number of GiB above 0, got nan"),
        (["--find-batch-size", "--memory", "1e9"], "GiB, which are free, got 1e+09"),
        (["--find-batch-size", "--most", "0"], "most: expected at least 1, got 0"),
        (
            ["--find-batch-size", "--resume"],
            "--resume: expected none with --find-batch-size, which trains nothing that could go on",
        ),
        (["--memory", "8"], "--memory, --most: expected with --find-batch-size alone"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, text = run_command(config_file(tmp_path), *arguments)
    assert code == 2 and message in text
    assert not (tmp_path / "run").exists()


def test_one_process_alone_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE: the search is for one process"):
        find_batch_size(tiny_run.config(tmp_path))


def test_errors_of_the_configuration_are_told(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    with pytest.raises(ValueError, match="unknown key 'model.num_prompt'; did you mean num_prompts"):
        find_batch_size(replace(config, model={**config.model, "num_prompt": 3}), memory_gib=3)


@pytest.mark.parametrize("method", ["zegclip", "tagclip", "clip_rc", "clsclip", "maft"])
def test_every_method_has_a_step(tmp_path: Path, method: str) -> None:
    config = tiny_run.config(tmp_path, method)
    size = config.data.crop_size
    if method in ("clsclip", "maft"):
        options = {"nav_layers": [1, 2]} if method == "clsclip" else {"start_layer": 1}
        config = replace(config, model={"clip": config.model["clip"], **options})
    batch = setup.synthetic_batch(config, CLASSES, 3)
    assert batch["images"].shape == (3, 3, size, size) and batch["labels"].shape == (3, size, size)
    assert set(CLASSES.seen) & set(batch["labels"][2].unique().tolist()) and batch["labels"].max() < 20
    runs = list(batch_size._iterations(config, CLASSES, 2, DistEnv(0, 1, torch.device("cpu"))))
    assert len(runs) == 1 + batch_size.TIMED
