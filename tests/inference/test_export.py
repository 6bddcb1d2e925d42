"""Exported files say what the model says; a file that does not is not left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_inputs, tiny_model
from zs3fast.inference import export
from zs3fast.inference.export import ExportError, export_model

METHODS = ("clip_rc", "clsclip", "maft", "maskclip", "tagclip", "zegclip")


def text(classes: int = 7) -> torch.Tensor:
    return tiny_inputs(classes=classes)[1]


@pytest.mark.parametrize(
    ("method", "classes"), [*((method, "baked") for method in METHODS), ("tagclip", "input"), ("maskclip", "input")]
)
def test_torch_export(method: str, classes: str, tmp_path: Path) -> None:
    report = export_model(tiny_model(method), text(), tmp_path / f"{method}.pt2", classes=classes)
    assert report.difference < 1e-5 and report.agreement in (1.0, None)
    further = ["proposal_masks"] * (method == "maft") + ["text_embeddings"] * (classes == "input")
    assert report.inputs == ("images", *further)
    program = torch.export.load(report.path)
    ours = {str(node.target) for node in program.graph.nodes if "zs3fast" in str(node.target)}
    assert not ours, "a runtime without zs3fast cannot run these"
    if classes == "input" and method != "maft":  # another number of classes and of images than it was traced with
        images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
        side = tiny_model(method).image_size
        images = torch.nn.functional.interpolate(images.float(), (side, side)).to(torch.uint8)
        labels, scores = program.module()(images, text(11))
        assert labels.shape == scores.shape == (3, side, side) and labels.max() < 11


@pytest.mark.parametrize("classes", ["baked", "input"])
def test_ten_thousand_names(classes: str, tmp_path: Path) -> None:
    report = export_model(tiny_model("zegclip"), text(10_000), tmp_path / "m.pt2", classes=classes, size=(32, 48))
    assert report.difference < 1e-5 and report.agreement is not None and report.agreement > 0.999


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "ending"),
    [("maskclip", ".onnx")]
    + [pytest.param(method, ending, marks=SLOW) for method in METHODS for ending in (".onnx", ".xml")],
)
def test_other_runtimes(method: str, ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip({".onnx": "onnxruntime", ".xml": "openvino"}[ending], reason="the extra [export] is absent")
    pytest.importorskip("onnxscript", reason="the extra [export] is absent")
    report = export_model(tiny_model(method), text(), tmp_path / f"model{ending}")
    assert report.difference < 1e-4 and report.agreement in (1.0, None)
    assert not [record for record in caplog.records if record.name.startswith("onnx")], "nothing a user could act on"
    expected = {report.path.name} | ({"model.bin"} if ending == ".xml" else set())
    assert {path.name for path in tmp_path.iterdir()} == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "ending"), [(method, ".onnx") for method in METHODS] + [("zegclip", ".xml"), ("naclip", ".onnx")]
)
def test_images_of_any_size(method: str, ending: str, tmp_path: Path) -> None:
    """Those it was traced with, its own, which the model takes another way, and others."""
    pytest.importorskip({".onnx": "onnxruntime", ".xml": "openvino"}[ending], reason="the extra [export] is absent")
    pytest.importorskip("onnxscript", reason="the extra [export] is absent")
    report = export_model(tiny_model(method), text(5), tmp_path / f"model{ending}", any_size=True)
    assert report.difference < 1e-4 and report.agreement in (None, pytest.approx(1, abs=1e-3))


def test_proposals_over_more_patches_than_a_words_bits(tmp_path: Path) -> None:
    """ONNX divides in float32: masks of 32 patches and more, packed into words with a sign, came out wrong."""
    pytest.importorskip("onnxruntime", reason="the extra [export] is absent")
    pytest.importorskip("onnxscript", reason="the extra [export] is absent")
    assert export_model(tiny_model("maft"), text(3), tmp_path / "m.onnx", size=(96, 128)).difference < 1e-5


def test_any_number_of_proposals_and_one_class_as_an_input(tmp_path: Path) -> None:
    model = tiny_model("maft")
    report = export_model(model, text(1), tmp_path / "m.pt2", classes="input")
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    masks = torch.rand(3, 9, 64, 64)
    program = torch.export.load(report.path).module()
    for classes in (1, 4):
        assert program(images, masks, text(classes))[0].shape == (3, 9, classes)


@pytest.mark.slow
def test_aot_inductor_with_proposals(tmp_path: Path) -> None:
    """Its powers of integers are others than torch's, which put masks into other bits."""
    report = export_model(tiny_model("maft"), text(), tmp_path / "m.aoti.pt2", dynamic_batch=False)
    assert report.difference < 1e-5


@pytest.mark.slow
def test_aot_inductor_from_cpp(tmp_path: Path) -> None:
    """A package runs from C++ alone: docs/export/main.cpp, built here."""
    report = export_model(tiny_model("zegclip"), text(), tmp_path / "model.aoti.pt2", dynamic_batch=False)
    assert report.agreement == 1.0
    source = Path(__file__).parents[2] / "docs" / "export" / "main.cpp"
    folder = Path(torch.__file__).parent
    flags = [f"-I{folder}/include", f"-I{folder}/include/torch/csrc/api/include", f"-L{folder}/lib"]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder}/lib", "-Wl,--no-as-needed"]
    program = tmp_path / "run"
    subprocess.run(["g++", "-std=c++20", str(source), *flags, *libraries, "-o", str(program)], check=True)
    said = subprocess.run([program, report.path], capture_output=True, text=True, check=True).stdout
    assert "labels [1, 64, 64]" in said


@pytest.mark.parametrize("method", ["maskclip", "clsclip"])
@pytest.mark.parametrize("size", [(64, 112), (128, 64)])
def test_positions_of_another_size_in_openvino(size: tuple[int, int], method: str, tmp_path: Path) -> None:
    """Its own bicubic steps gave logits that were off by a percent."""
    pytest.importorskip("openvino", reason="the extra [export] is absent")
    report = export_model(tiny_model(method), text(), tmp_path / "model.xml", size=size, output="mask_logits")
    assert report.difference < 2e-5


def test_mask_logits_of_another_size(tmp_path: Path) -> None:
    report = export_model(tiny_model("zegclip"), text(), tmp_path / "m.pt2", output="mask_logits", size=(48, 80))
    assert report.outputs == ("mask_logits",) and report.agreement is None
    assert [*torch.export.load(report.path).module()(torch.zeros(1, 3, 48, 80, dtype=torch.uint8))[0].shape] == [
        1,
        7,
        3,
        5,
    ]


def test_a_file_that_disagrees_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(program, path, inputs, outputs):
        run = export._write_pt2(program, path, inputs, outputs)
        return lambda *given: tuple(value + 1 for value in run(*given))

    monkeypatch.setitem(export._WRITERS, "pt2", wrong)
    with pytest.raises(ExportError, match=r"m\.pt2: expected a difference below 0\.0001 and 99\.9 % of labels, got"):
        export_model(tiny_model("maskclip"), text(), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model = tiny_model("zegclip")
    with pytest.raises(ValueError, match="path: expected a name that ends in .* got model.bin"):
        export_model(model, text(), tmp_path / "model.bin")
    with pytest.raises(ValueError, match="format: expected one of pt2, aoti, onnx, openvino, got 'coreml'"):
        export_model(model, text(), tmp_path / "model.onnx", format="coreml")
    with pytest.raises(ValueError, match="size: expected multiples of the patch size 16, got 64 x 60"):
        export_model(model, text(), tmp_path / "model.pt2", size=(64, 60))
    with pytest.raises(ValueError, match="any_size: expected ONNX or OpenVINO"):
        export_model(model, text(), tmp_path / "model.pt2", any_size=True)
    with pytest.raises(ValueError, match="classes: expected one of baked, input, got 'both'"):
        export_model(model, text(), tmp_path / "model.pt2", classes="both")


def test_what_is_on_disk_is_kept(tmp_path: Path) -> None:
    """An IR's weights lie beside it, in a name that somebody's own weights may have."""
    (tmp_path / "model.bin").write_text("mine")
    with pytest.raises(ValueError, match=r"path: expected no .*model\.bin, where the weights of model\.xml go"):
        export_model(tiny_model("maskclip"), text(), tmp_path / "model.xml")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ValueError, match=r"path: expected a file, got the folder .*folder\.onnx"):
        export_model(tiny_model("maskclip"), text(), tmp_path / "folder.onnx")
    with pytest.raises(ValueError, match=r"path: .*model\.bin is a file, expected a folder"):
        export_model(tiny_model("maskclip"), text(), tmp_path / "model.bin" / "m.pt2")
    assert (tmp_path / "model.bin").read_text() == "mine" and not list((tmp_path / "folder.onnx").iterdir())


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'onnx is not installed; pip install "zs3fast\[export\]"'):
        export._package("onnx")


def test_weights_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="the extra [export] is absent")
    monkeypatch.setattr(export, "_ONE_FILE", 1000)
    with pytest.raises(ValueError, match=r"path: an ONNX file holds weights below 2 GiB, got 0\.0 GiB"):
        export_model(tiny_model("zegclip"), text(), tmp_path / "m.onnx")


def test_nothing_is_left_of_an_ir_that_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights lie in a second file."""
    pytest.importorskip("openvino", reason="the extra [export] is absent")

    def wrong(program, path, inputs, outputs):
        path.write_text("graph")
        path.with_suffix(".bin").write_text("weights")
        raise ExportError("it cannot take this graph")

    monkeypatch.setitem(export._WRITERS, "openvino", wrong)
    with pytest.raises(ExportError):
        export_model(tiny_model("maskclip"), text(), tmp_path / "m.xml")
    assert not list(tmp_path.iterdir())
