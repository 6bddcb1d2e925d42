"""`zs3fast export` and the text rows it bakes in."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from zs3fast.cli import app
from zs3fast.inference import export
from zs3fast.inference.segmenter import Segmenter


def test_a_model_becomes_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out.pt2"
    result = CliRunner().invoke(app, ["export", "zs3fast-tiny", str(out), "--classes", "red sand, star"])
    assert result.exit_code == 0, result.output
    assert "100.000 % of labels agree" in result.output
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    segmenter = Segmenter.from_pretrained("zs3fast-tiny", device="cpu", dtype="float32")
    side = segmenter.model.image_size
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, _ = torch.export.load(out).module()(images)
    expected = segmenter(images[0], "red sand, star").labels
    assert (labels[0].numpy() == expected).mean() > 0.99  # ties up to rounding


def test_maft_needs_no_proposer(tmp_path: Path) -> None:
    """Proposals are an input of its graph; the command once asked for what finds them, and has no such option."""
    result = CliRunner().invoke(app, ["export", "zs3fast-tiny-maft", str(tmp_path / "m.pt2"), "--classes", "star, sky"])
    assert result.exit_code == 0 and "images, proposal_masks -> proposal_logits" in result.output, result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-model", "x.pt2"], "no-such-model"),
        (["zs3fast-tiny", "x.pt2", "--height", "64"], "--height and --width"),
        (["zs3fast-tiny", "x.pt2", "--classes-as", "data"], "baked or input"),
    ],
)
def test_arguments_that_are_no_good(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["export", *arguments])
    assert result.exit_code == 2 and said in result.output and len(result.output.splitlines()) == 1


def test_a_file_that_disagrees_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It once ended with 2, as if the options were wrong."""
    monkeypatch.setattr(export, "MOST_DIFFERENT", -1.0)
    result = CliRunner().invoke(app, ["export", "zs3fast-tiny-maskclip", str(tmp_path / "m.pt2"), "--classes", "a, b"])
    assert result.exit_code == 1 and "expected a difference below -1" in result.output, result.output
    assert len(result.output.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_help_without_the_extra() -> None:
    """And running names it, before any work is done."""
    absent = "import sys; sys.modules |= dict.fromkeys(('onnx', 'onnxscript', 'onnxruntime', 'openvino')); "
    run = [sys.executable, "-c", absent + "from zs3fast.__main__ import main; main()", "export"]
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0 and "--any-size" in shown.stdout, shown.stderr
    for name in ("m.onnx", "m.xml"):
        failed = subprocess.run([*run, "zs3fast-tiny", name], capture_output=True, text=True, timeout=300)
        assert failed.returncode == 2 and "zs3fast[export]" in failed.stderr and len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["m.onnx", "m.xml", "m.pt2"])
def test_a_graph_is_no_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    result = CliRunner().invoke(app, ["export", str(tmp_path / name), str(tmp_path / "out.pt2")])
    assert result.exit_code == 2 and "a graph for another runtime" in result.output
    assert len(result.output.splitlines()) == 1


def test_embed() -> None:
    """A row a class, in order, and the caller's own: what it does to them changes no later call."""
    segmenter = Segmenter.from_pretrained("zs3fast-tiny", device="cpu", dtype="float32")
    rows = segmenter.embed("red sand, star, grass")
    assert rows.shape == (3, segmenter.embed("star").shape[1]) and not rows.requires_grad
    assert torch.allclose(segmenter.embed("star")[0], rows[1], atol=1e-6)
    rows.zero_()
    assert segmenter.embed("red sand, star, grass").abs().sum() > 0
    assert segmenter.classes is not None and len(segmenter.embed()) == len(segmenter.classes)
