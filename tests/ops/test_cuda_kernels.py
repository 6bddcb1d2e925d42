"""The CUDA C++ kernels without a GPU: their very bodies (csrc/<op>/cuda_kernel.h), run on the CPU block by block.

They take the place of backend "cuda", and the tests that every other backend passes run on them.
Launches, registers and speed are not seen this way: tests/ops/test_cuda_build.py looks at the compiled code, tests/gpu
at a GPU's results.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops import test_masks_to_labels as labels
from tests.ops.cxx import shared_library
from zs3fast.ops import _dispatch, masks_to_labels, use_backend

ROOT = Path(__file__).parents[2]
ELEMENTS = (torch.float32, torch.float16, torch.bfloat16)
Long4 = ctypes.c_int64 * 4


class View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", Long4), ("stride", Long4))


def view(x: Tensor) -> View:
    rest = (0,) * (4 - x.ndim)
    return View(x.data_ptr(), Long4(*x.shape, *rest), Long4(*x.stride(), *rest))


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr() if x.numel() else None)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = Path(__file__).with_name("cuda_on_cpu.cpp")
    output = tmp_path_factory.mktemp("kernels") / "cuda_on_cpu.so"
    return shared_library(output, [source], "-O1", f"-I{ROOT / 'csrc'}")


class OnCpu:
    """The arguments of torch.ops.zs3fast.<op>, given to the kernels' bodies."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.no_shared = False  # masks_to_labels without shared memory
        self.spans: list[int] = []  # what its last calls had there

    def masks_to_labels(
        self, masks, trusty, seen, offset, weighting, size, _crop, _canvas, _windows, _top_k, dtype, return_details
    ):
        found = torch.full((masks.shape[0], *size), 99, dtype=dtype)
        scores = torch.full(found.shape if return_details else (0,), torch.nan)
        nan_count = torch.zeros(masks.shape[0] if return_details else 0, dtype=torch.int64)
        flags = torch.zeros(masks.shape[1], dtype=torch.uint8)
        flags[list(seen)] = 1
        weigh = (trusty is not None and weighting in ("both", name) for name in ("seen", "unseen"))
        if found.numel():
            span = self.library.run_masks_to_labels(
                view(masks),
                ctypes.byref(view(trusty)) if trusty is not None else None,
                ELEMENTS.index(masks.dtype),
                pointer(flags),
                ctypes.c_float(offset),
                *map(ctypes.c_bool, weigh),
                *map(ctypes.c_int64, size),
                ctypes.c_bool(self.no_shared),
                found.element_size(),
                *map(pointer, (found, scores, nan_count)),
            )
            self.spans.append(span)
        return found, scores, nan_count


@pytest.fixture(autouse=True)
def kernels(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> OnCpu:
    """Backend "cuda" is the kernels' bodies on the CPU; what only a GPU tensor can have is no objection to them."""
    on_cpu = OnCpu(library)
    monkeypatch.setattr(_dispatch, "cuda_objections", lambda op, tensor, dtypes: [])
    real = _dispatch.registered("masks_to_labels")["cuda"]
    stand_in = _dispatch.Implementation(on_cpu.masks_to_labels, real.objections)
    monkeypatch.setitem(_dispatch._implementations["masks_to_labels"], "cuda", stand_in)
    return on_cpu


@pytest.fixture(params=["shared", "memory"])
def patches(request: pytest.FixtureRequest, kernels: OnCpu) -> str:
    """masks_to_labels with the patches in shared memory, and with those that do not fit read where they lie."""
    kernels.no_shared = request.param == "memory"
    with use_backend("cuda"):
        yield request.param


both_paths = pytest.mark.usefixtures("patches")


# masks_to_labels -----------------------------------------------------------------------------------------------------

LABEL_SHAPES = labels.SHAPES | labels.LARGE | {"B2-C20-h5-w9-wide": (2, 20, 5, 9, (37, 290))}


@both_paths
@pytest.mark.parametrize("shape", LABEL_SHAPES.values(), ids=LABEL_SHAPES.keys())
@pytest.mark.parametrize("spread", [1, 6])
def test_labels_of_one_window(shape, spread):
    labels.test_one_window("cuda", shape, spread)


@both_paths
@pytest.mark.parametrize("weighting", ["both", "seen", "unseen", "off"])
@pytest.mark.parametrize("seen", [None, [4, 0, 2], range(6)], ids=["none", "some", "all"])
def test_labels_weighted(weighting, seen):
    labels.test_trusty_weighting("cuda", weighting, seen)


@both_paths
@pytest.mark.parametrize(
    "test",
    [
        labels.test_trusty_map_on_another_grid,
        labels.test_tiny_sigmoids_tie_under_the_offset,
        labels.test_sigmoids_that_underflow_tie,
        labels.test_infinite_logits,
        labels.test_label_dtypes,
    ],
    ids=lambda f: f.__name__,
)
def test_labels_as_elsewhere(test):
    test("cuda")


@both_paths
@pytest.mark.parametrize(
    "test",
    [labels.test_steps_within_rounding_of_the_pruning_bounds, labels.test_large_cancelling_corners],
    ids=lambda f: f.__name__,
)
def test_labels_where_rounding_decides(test):
    test()


@both_paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_labels_of_half_types(dtype):
    labels.test_half_inputs_are_widened("cuda", dtype)


@both_paths
@pytest.mark.parametrize("seen", [None, range(5), [0, 1, 2]], ids=["none", "all", "some"])
def test_labels_of_saturated_sigmoids(seen):
    labels.test_saturated_sigmoids_tie("cuda", seen)


@both_paths
@pytest.mark.parametrize("seen", [range(4), [1, 3], []], ids=["all", "some", "none"])
@pytest.mark.parametrize("trusty", [40.0, -200.0], ids=["unseen-for-sure", "seen-for-sure"])
def test_labels_with_a_weight_of_zero(seen, trusty):
    labels.test_a_weight_of_zero_makes_a_group_equal("cuda", seen, trusty)


@both_paths
@pytest.mark.parametrize("weighting", ["both", "seen", "unseen"])
def test_labels_of_a_nan_trusty(weighting):
    labels.test_nan_trusty("cuda", weighting)


@both_paths
def test_labels_of_nan_logits():
    torch.manual_seed(12)
    logits = torch.randn(2, 5, 4, 4)
    logits[0, 3, 1, 1] = logits[0, 4, 1, 1] = logits[1, 0, 2, 3] = torch.nan
    assert (labels.check(logits, (16, 16), [0, 1], 0.1).nan_count > 0).all()


@both_paths
def test_labels_of_equal_logits():
    logits = torch.randn(1, 1, 3, 4).expand(1, 6, 3, 4)
    assert masks_to_labels(logits, (18, 20)).eq(0).all()
    assert masks_to_labels(logits, (18, 20), [0, 2], 0.1).eq(1).all()


@both_paths
def test_labels_of_strided_maps():
    torch.manual_seed(8)
    transposed = torch.randn(4, 3, 5, 2).permute(3, 2, 1, 0)
    sliced = torch.randn(4, 10, 6, 8)[::2, ::2, ::2, 1::2]
    trusty = torch.randn(2, 3, 4, 1).permute(0, 3, 1, 2)
    for logits in (transposed, sliced, torch.randn(1, 5, 3, 4).expand(2, 5, 3, 4)):
        labels.check(logits, (14, 19), [0, 1], 0.1, trusty_logits=trusty)


def test_labels_when_shared_memory_does_not_hold_all_classes(kernels: OnCpu):
    torch.manual_seed(20)
    with use_backend("cuda"):
        labels.check(torch.randn(1, 847, 2, 130) * 3, (2, 130), range(500), 0.1)
        labels.check(torch.randn(1, 847, 2, 9) * 3, (9, 144), range(500), 0.1)
    assert set(kernels.spans[:2]) == {0} and kernels.spans[2] > 0


def test_labels_beyond_one_window_are_refused_in_words():
    logits = torch.zeros(2, 5, 3, 4)
    with use_backend("cuda"):
        with pytest.raises(RuntimeError, match="takes one window of the size of the labels alone"):
            masks_to_labels(logits, (8, 12), crop_size=(8, 8), canvas_size=(8, 12), windows=[(0, 0), (0, 4)])
        with pytest.raises(RuntimeError, match="takes top_k = 1 alone"):
            masks_to_labels(logits, (8, 12), top_k=2)
        with pytest.raises(RuntimeError, match="takes 8192 classes at most"):
            masks_to_labels(torch.zeros(1, 8193, 1, 1), (2, 2))


# What kernels share ---------------------------------------------------------------------------------------------------


def test_conversions_are_torchs(library: ctypes.CDLL):
    """All 65,536 half-precision numbers."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    found = [torch.empty(65536), torch.empty(65536)]
    library.run_conversions(pointer(halves), ctypes.c_int64(65536), *map(pointer, found))
    for got, dtype in zip(found, (torch.float16, torch.bfloat16), strict=True):
        torch.testing.assert_close(got, halves.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
