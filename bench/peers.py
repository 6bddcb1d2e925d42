"""What a user gets by putting the plain official structure through another runtime: image to labels, on the CPU.

    openvino       its exported program by ov.convert_model, in the setting's precision (an inference hint: the runtime
                   keeps some operations in float32)
    onnxruntime    by torch.onnx.export; float32 alone: its CPU provider has no bfloat16 products
    frozen         torch.compile with inductor's freezing: weights are constants and packed once

Each is checked as the official structure is. int8 is left out: its labels do not meet the budget of a comparison.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.setting import ONE_STAGE, Setting, make_inputs

NAMES = ("openvino", "onnxruntime", "frozen")
INSTALL = "pip install 'zs3fast[bench]'"
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class PeerRefused(Exception):
    """This peer does not run here; the message says why."""


class LogitsAndLabels(nn.Module):
    """The official structure as one graph: images, text -> mask logits and labels."""

    def __init__(self, baseline: nn.Module):
        super().__init__()
        self.baseline = baseline

    def forward(self, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.baseline(images, text)
        return logits, self.baseline.class_scores(logits).argmax(dim=1)


class Peer:
    """A runtime in the place of the official structure: called it gives logits, `predict_labels` gives labels."""

    def __init__(self, baseline: nn.Module, run: Run):
        self.class_scores, self._run = baseline.class_scores, run

    def __call__(self, images: Tensor, text: Tensor) -> Tensor:
        return self._run(images, text)[0]

    def predict_labels(self, images: Tensor, text: Tensor) -> Tensor:
        return self._run(images, text)[1]


def make_peer(name: str, baseline: nn.Module, setting: Setting, threads: int) -> Peer:
    """The peer of this name with the baseline's weights.

    Raises:
        PeerRefused: it is not installed, or does not take this setting.
    """
    if setting.method not in ONE_STAGE:
        raise PeerRefused(f"{name}: {setting.method} is not one graph from image and text to labels")
    if name != "frozen" and importlib.util.find_spec(name) is None:
        raise PeerRefused(f"{name}: not installed ({INSTALL})")
    make = {"openvino": _openvino, "onnxruntime": _onnxruntime, "frozen": _frozen}[name]
    return Peer(baseline, make(baseline, setting, threads))


def _openvino(baseline: nn.Module, setting: Setting, threads: int) -> Run:
    import openvino

    if setting.dtype == "float16":
        raise PeerRefused("openvino: its CPU plugin takes float32 and bfloat16")
    inputs = tuple(x.float() for x in make_inputs(setting))
    with torch.no_grad():
        program = torch.export.export(LogitsAndLabels(copy.deepcopy(baseline).float()), inputs)
    hint = {"float32": "f32", "bfloat16": "bf16"}[setting.dtype]
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(openvino.convert_model(program), "CPU", options)

    def run(images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        out = compiled([images.float().numpy(), text.float().numpy()])
        return torch.from_numpy(out[0]).to(setting.torch_dtype), torch.from_numpy(out[1])

    return run


def _onnxruntime(baseline: nn.Module, setting: Setting, threads: int) -> Run:
    import onnxruntime

    if setting.dtype != "float32":
        raise PeerRefused("onnxruntime: its CPU provider multiplies no half types")
    if importlib.util.find_spec("onnxscript") is None:
        raise PeerRefused(f"onnxruntime: torch.onnx.export needs onnxscript ({INSTALL})")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with torch.no_grad():
            torch.onnx.export(LogitsAndLabels(baseline), tuple(make_inputs(setting)), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = session.run(None, dict(zip(names, (images.numpy(), text.numpy()), strict=True)))
        return torch.from_numpy(logits), torch.from_numpy(labels)

    return run


def _frozen(baseline: nn.Module, setting: Setting, threads: int) -> Run:
    import torch._inductor.config

    compiled: Any = torch.compile(LogitsAndLabels(baseline))

    def run(images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):  # read where a call compiles
            logits, labels = compiled(images, text)
        return logits, labels

    return run
