"""Images are drawn from the results of one device, and nothing is drawn that was not measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import harness, plots
from bench.floors import ATTENTION
from bench.harness import Timing

pytest.importorskip("matplotlib", reason="bench/plots.py draws with matplotlib")
HERE = {"device": "Some CPU", "versions": {"torch": "2.10"}, "commit": "0123", "threads": 2}


def model_row(name: str, backend: str, classes: int, seconds: float, **extra: object) -> dict:
    extra = {"classes": classes, "batch": 1, "floor": "encoder", "images_per_second": 1 / seconds, **extra}
    return harness.row(name, backend, f"c{classes}", Timing([seconds]), pass_="inference", described=HERE, **extra)


def op_rows(op: str, shapes: dict[str, float]) -> list[dict]:
    return [
        harness.row(op, backend, shape, Timing([seconds * factor]), described=HERE)
        for shape, seconds in shapes.items()
        for backend, factor in (("zs3fast (auto)", 1), ("sdpa bias", 2))
    ]


def write(folder: Path) -> None:
    rows = [
        model_row(name, backend, classes, seconds, call_mib=seconds * classes)
        for name in ("zegclip", "maft")
        for backend, seconds in (("official eager", 2.0), ("official compiled", 1.5), ("zs3fast", 1.0))
        for classes in (20, 171)
    ]
    rows.append(model_row("encoder", ATTENTION, 20, 0.9))
    harness.write_results(folder / "models.json", rows)
    regions = {f"voc-M{m}": 1e-3 * m for m in (1, 16, 64)}
    harness.write_results(folder / "region_bridge_attention.json", op_rows("region_bridge_attention", regions))
    proposals = {f"nq{n}": 1e-3 * n for n in (10, 100, 1000)}
    harness.write_results(folder / "proposal_attention.json", op_rows("proposal_attention", proposals))


def texts(figure: object) -> set[str]:
    return {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}


def test_every_picture_says_what_on_which_device(tmp_path: Path) -> None:
    write(tmp_path)
    assert plots.draw(tmp_path) == [tmp_path / f"{name}.png" for name in plots.PICTURES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    assert len(list(tmp_path.iterdir())) == 3 + len(plots.PICTURES)  # no temporary file left
    for plot in plots.PICTURES.values():
        assert any(text.startswith("Some CPU, 2 threads, float32, torch 2.10") for text in texts(plot(tmp_path)))


def test_bars_and_lines_are_the_measured_numbers(tmp_path: Path) -> None:
    write(tmp_path)
    first, second = plots.plot_fps(tmp_path).axes
    assert sorted(round(bar.get_height(), 3) for bar in first.patches) == [0.5, 0.5, 0.667, 0.667, 1.0, 1.0]
    assert first.get_title() == "C = 20, batch 1, float32" and second.get_title() == "C = 171, batch 1, float32"
    assert "the encoder's products alone" in texts(plots.plot_fps(tmp_path))
    (memory,) = plots.plot_memory(tmp_path).axes
    found = {tuple(line.get_ydata()) for line in memory.lines if len(line.get_xdata()) == 2}
    assert found == {(40.0, 342.0), (20.0, 171.0)}
    (regions,) = plots.plot_regions(tmp_path).axes
    assert {tuple(line.get_ydata()) for line in regions.lines} == {(1.0, 16.0, 64.0), (2.0, 32.0, 128.0)}


def test_what_was_not_measured_is_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness.write_results(tmp_path / "region_bridge_attention.json", op_rows("x", {"voc-M1": 1.0, "voc-M16": 2.0}))
    assert plots.draw(tmp_path) == []
    out = capsys.readouterr().out
    assert "fps.png: not drawn, nothing measured: python bench/run.py" in out and out.count("not drawn") == 4


def test_devices_are_never_mixed(tmp_path: Path) -> None:
    write(tmp_path)
    harness.write_results(tmp_path / "data.json", [{"device": "another machine"}])
    with pytest.raises(ValueError, match="expected results of one device, got Some CPU, another machine"):
        plots.draw(tmp_path)
