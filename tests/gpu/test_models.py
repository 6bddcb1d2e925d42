"""Whole methods on a GPU: the goldens of the official implementations, and half precision against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.goldens_data import Golden
from tests.gpu.device import DEVICE, ON_GPU, skip_without_gpu
from tests.models import test_goldens, test_maft
from tests.tiny import ONE_STAGE, tiny_inputs, tiny_model
from zs3fast.ops import use_backend

skip_without_gpu()

BACKENDS = ("auto", "reference")


class GoldenHere(Golden):
    """A golden file whose tensors are on the device."""

    def __getitem__(self, key: str) -> Tensor:
        return super().__getitem__(key).to(DEVICE)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def goldens_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bodies of tests/models run here as they stand, on models and goldens that were moved."""
    for module in (test_goldens, test_maft):
        load = module.load
        monkeypatch.setattr(module, "load", lambda golden, load=load: load(golden).to(DEVICE))
        monkeypatch.setattr(module, "Golden", GoldenHere)


one_stage = pytest.mark.parametrize(
    ("method", "path"), test_goldens.FILES, ids=[path.stem for _, path in test_goldens.FILES]
)
maft = pytest.mark.parametrize("path", test_maft.FILES, ids=[path.stem for path in test_maft.FILES])


@one_stage
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_one_stage_outputs(method: str, path: Path, grad: bool) -> None:
    test_goldens.test_eval_outputs(method, path, grad)


@one_stage
def test_one_stage_losses_and_gradients(method: str, path: Path) -> None:
    test_goldens.test_losses_and_gradients(method, path)


@maft
def test_maft_outputs(path: Path) -> None:
    test_maft.test_outputs_are_the_official_ones(path)


@maft
def test_maft_losses_and_gradients(path: Path) -> None:
    test_maft.test_losses_and_gradients_are_the_official_ones(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("method", [*ONE_STAGE, "clsclip"])
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    """Mask logits err at most twice as much as with the definitions in the same type, plus a rounding a layer."""
    if not ON_GPU and dtype == torch.float16:
        pytest.skip("torch's CPU products of float16 are not what this is about")
    model = tiny_model(method)
    images, text = tiny_inputs()
    with torch.no_grad(), use_backend("reference"):
        wide = model.double()(images.double(), text.double()).mask_logits
    half = model.to(DEVICE, dtype)
    inputs = images.to(DEVICE, dtype), text.to(DEVICE, dtype)
    with torch.no_grad():
        got = half(*inputs).mask_logits.double().cpu()
        with use_backend("reference"):
            plain = half(*inputs).mask_logits.double().cpu()
    allowed = 2 * (plain - wide).norm() + 8 * torch.finfo(dtype).eps * wide.norm()
    assert got.isfinite().all() and (got - wide).norm() <= allowed
