"""masks_to_labels: every backend against the definition in float64, and the registration."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from zs3fast.ops import _dispatch, _extension, use_backend
from zs3fast.ops.masks_to_labels import LabelMap, masks_to_labels, reference, reference_scores

OP = "masks_to_labels"
BACKENDS = [name for name in _dispatch.BACKENDS if name in _dispatch.registered(OP)]
MARGIN = 1e-6  # scores nearer than this are a tie in float32


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Each backend in turn; the interpreter runs Triton in few, large blocks."""
    with use_backend(request.param):
        reasons = _dispatch.objections(OP, request.param, torch.zeros(1, 1, 1, 1))
        if reasons:
            pytest.skip(f"{request.param}: {'; '.join(reasons)}")
        if request.param == "triton":
            from zs3fast.kernels import masks_to_labels as kernel

            monkeypatch.setattr(kernel, "BLOCK_PIXELS", 4096)
        yield request.param


def check(logits: Tensor, size, *args, trusty_logits: Tensor | None = None, top_k: int = 1, **kwargs) -> LabelMap:
    """Labels equal wherever the oracle's margin is real, scores and NaN counts everywhere."""
    got = masks_to_labels(
        logits, size, *args, trusty_logits=trusty_logits, top_k=top_k, return_details=True, dtype=torch.int32, **kwargs
    )
    wide = None if trusty_logits is None else trusty_logits.double()
    scores = reference_scores(logits.double(), size, *args, trusty_logits=wide, **kwargs)
    order = scores.sort(dim=1, descending=True, stable=True)
    clear = torch.ones_like(order.values[:, :top_k], dtype=torch.bool)
    gaps = order.values[:, :-1] - order.values[:, 1:] > MARGIN
    clear[:, : gaps.shape[1]] &= gaps[:, :top_k]
    clear[:, 1:] &= gaps[:, : top_k - 1]
    labels, best = (x if top_k > 1 else x.unsqueeze(1) for x in (got.labels, got.scores))
    assert labels.dtype == torch.int32 and labels.shape == clear.shape
    wrong = clear & (labels != order.indices[:, :top_k])
    assert not wrong.any(), f"{wrong.sum()} of {clear.sum()} clear labels differ"
    torch.testing.assert_close(best.double(), order.values[:, :top_k], rtol=0, atol=3e-6, equal_nan=True)
    assert got.nan_count.tolist() == order.values[:, 0].isnan().sum((1, 2)).tolist()
    plain = masks_to_labels(logits, size, *args, trusty_logits=trusty_logits, top_k=top_k, dtype=torch.int32, **kwargs)
    assert torch.equal(plain, got.labels), "labels depend on return_details"
    return got


def some_seen(classes: int) -> list[int]:
    return [c for c in range(classes) if c % 3]


SHAPES = {
    "B2-C1-h3-w5": (2, 1, 3, 5, (20, 31)),
    "B1-C2-h4-w4": (1, 2, 4, 4, (9, 9)),
    "B1-C20-h1-w1": (1, 20, 1, 1, (5, 33)),
    "B1-C7-h6-w3-same": (1, 7, 6, 3, (6, 3)),
    "B1-C7-h9-w8-down": (1, 7, 9, 8, (5, 3)),
    "B0-C4": (0, 4, 3, 3, (8, 8)),
}
LARGE = {
    "B2-C171-h9-w7": (2, 171, 9, 7, (100, 61)),
    "B1-C171-h32-w32": (1, 171, 32, 32, (128, 128)),
    "B1-C847-h4-w6": (1, 847, 4, 6, (64, 96)),
    "B1-C3-h2-w40": (1, 3, 2, 40, (90, 640)),
}


@pytest.mark.parametrize("shape", (SHAPES | LARGE).values(), ids=(SHAPES | LARGE).keys())
@pytest.mark.parametrize("spread", [1, 6])
def test_one_window(backend, shape, spread):
    batch, classes, h, w, size = shape
    if backend == "triton" and classes > 20:
        pytest.skip("the interpreter needs minutes for this many classes")
    torch.manual_seed(0)
    check(torch.randn(batch, classes, h, w) * spread, size, some_seen(classes), 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_are_widened(backend, dtype):
    torch.manual_seed(1)
    logits = (torch.randn(2, 6, 4, 5) * 4).to(dtype)
    check(logits, (21, 30), [1, 2], 0.1, trusty_logits=torch.randn(2, 1, 4, 5).to(dtype))


@pytest.mark.parametrize("weighting", ["both", "seen", "unseen", "off"])
@pytest.mark.parametrize("seen", [None, [], [4, 0, 2], range(6)], ids=["none", "empty", "some", "all"])
def test_trusty_weighting(backend, weighting, seen):
    torch.manual_seed(2)
    logits, trusty = torch.randn(2, 6, 4, 3) * 3, torch.randn(2, 1, 4, 3) * 4
    check(logits, (17, 22), seen, 0.1, trusty_logits=trusty, trusty_weighting=weighting)


def test_trusty_map_on_another_grid(backend):
    torch.manual_seed(3)
    check(torch.randn(1, 5, 4, 3), (16, 20), [0, 1], 0.1, trusty_logits=torch.randn(1, 1, 7, 2))


WINDOWS = {
    "one": ((16, 16), (16, 16), [(0, 0)]),
    "overlap": ((16, 16), (16, 27), [(0, 0), (0, 11)]),
    "grid": ((16, 12), (25, 20), [(0, 0), (0, 8), (9, 0), (9, 8)]),
    "twice-the-same": ((10, 10), (10, 10), [(0, 0), (0, 0), (0, 0)]),
}


@pytest.mark.parametrize("geometry", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("size", ["canvas", (13, 31), (40, 9), (2, 2)], ids=str)
@pytest.mark.parametrize("trusty", [False, True], ids=["plain", "trusty"])
def test_windows(backend, geometry, size, trusty):
    crop, canvas, windows = geometry
    if backend == "triton" and (size == (40, 9) or len(windows) != 2 + 2 * trusty):
        pytest.skip("the interpreter is slow: the pair and, weighted, the grid of windows stand for the others")
    torch.manual_seed(4)
    rows = 2 * len(windows)
    check(
        torch.randn(rows, 6, 4, 3) * 3,
        canvas if size == "canvas" else size,
        [0, 3],
        0.1,
        trusty_logits=torch.randn(rows, 1, 4, 3) * 3 if trusty else None,
        crop_size=crop,
        canvas_size=canvas,
        windows=windows,
    )


def test_official_sliding_window():
    """Crop 512, stride 426 on a 512 x 683 canvas, back to 375 x 500: averaging comes after sigmoid and offset."""
    torch.manual_seed(5)
    with use_backend("auto"):
        smooth = torch.nn.functional.interpolate(torch.randn(2, 20, 6, 6) * 6, size=(32, 32), mode="bicubic")
        windows = [(0, 0), (0, 171)]
        check(smooth, (375, 500), range(15), 0.1, crop_size=(512, 512), canvas_size=(512, 683), windows=windows)


@pytest.mark.parametrize("top_k", [2, 5, 6])
@pytest.mark.parametrize("windows", [None, [(0, 0), (0, 5)]], ids=["one", "two"])
def test_top_k(backend, top_k, windows):
    torch.manual_seed(6)
    geometry = {} if windows is None else {"crop_size": (12, 12), "canvas_size": (12, 17), "windows": windows}
    logits = torch.randn(2, 6, 3, 4) * 2
    got = check(logits, (11, 17), [1, 2], 0.1, top_k=top_k, **geometry)
    ranked = got.labels.sort(dim=1).values
    assert (ranked[:, 1:] != ranked[:, :-1]).all(), "a class twice at one pixel"


def test_top_k_without_pruning():
    torch.manual_seed(7)
    check(torch.randn(1, 40, 3, 4) * 2, (11, 17), range(20), 0.1, top_k=40)


def test_strides(backend):
    torch.manual_seed(8)
    transposed = torch.randn(4, 3, 5, 2).permute(3, 2, 1, 0)  # [2, 5, 3, 4]
    sliced = torch.randn(4, 10, 6, 8)[::2, ::2, ::2, 1::2]
    broadcast = torch.randn(1, 5, 3, 4).expand(2, 5, 3, 4)
    trusty = torch.randn(2, 3, 4, 1).permute(0, 3, 1, 2)
    for logits in (transposed, sliced, broadcast):
        assert logits.shape == (2, 5, 3, 4)
        check(logits, (14, 19), [0, 1], 0.1, trusty_logits=trusty)
        check(logits, (14, 19), [0, 1], 0.1, trusty_logits=trusty, crop_size=(8, 8))


# Ties: what argmax of the scores gives, though a kernel that compares logits would choose another class.


def test_equal_logits_go_to_the_lowest_class(backend):
    # torch's sigmoid rounds differently in the last few elements of an array: only 0 is safe for the reference
    logits = torch.randn(1, 1, 3, 4).mul(backend != "reference").expand(1, 6, 3, 4)
    assert masks_to_labels(logits, (18, 20)).eq(0).all()
    assert masks_to_labels(logits, (18, 20), [0, 2], 0.1).eq(1).all()
    assert masks_to_labels(logits, (18, 20), [1, 2], 0.1).eq(0).all()
    ranks = masks_to_labels(logits, (18, 20), [0, 2], 0.1, top_k=6)
    assert ranks.eq(torch.tensor([1, 3, 4, 5, 0, 2])[None, :, None, None]).all()


@pytest.mark.parametrize("seen", [None, range(5), [0, 1, 2]], ids=["none", "all", "some"])
def test_saturated_sigmoids_tie(backend, seen):
    """sigmoid(20) and sigmoid(40) are both 1.0f: class 1 must win over class 3, and unseen 4 beats all seen ones."""
    logits = torch.full((1, 5, 4, 4), -3.0)
    logits[:, 1], logits[:, 3], logits[:, 4] = 20.0, 40.0, 30.0
    expected = reference(logits, (24, 24), seen, 0.1)
    assert torch.equal(masks_to_labels(logits, (24, 24), seen, 0.1), expected)
    assert expected.eq(3 if seen == [0, 1, 2] else 1).all()


def test_tiny_sigmoids_tie_under_the_offset(backend):
    """sigmoid(-30) - 0.1 and sigmoid(-20) - 0.1 are the same float: with every class seen, the lowest index wins."""
    logits = torch.tensor([-30.0, -20.0, -25.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    seen = range(3)
    assert reference(logits, (24, 24), seen, 0.1).eq(0).all()
    assert masks_to_labels(logits, (24, 24), seen, 0.1).eq(0).all()
    # without the offset they are three different floats
    assert masks_to_labels(logits, (24, 24)).eq(1).all()


def test_sigmoids_that_underflow_tie(backend):
    logits = torch.tensor([-200.0, -150.0, -300.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert masks_to_labels(logits, (24, 24)).eq(0).all()


@pytest.mark.parametrize("seen", [range(4), [1, 3], []], ids=["all", "some", "none"])
@pytest.mark.parametrize("trusty", [40.0, -200.0], ids=["unseen-for-sure", "seen-for-sure"])
def test_a_weight_of_zero_makes_a_group_equal(backend, seen, trusty):
    """1 - sigmoid(40) and sigmoid(-200) are 0: every score of that group is 0, and its lowest class stands for it."""
    torch.manual_seed(9)
    logits = torch.randn(1, 4, 3, 3) * 4
    weights = torch.full((1, 1, 3, 3), trusty)
    weights[..., 0] = 0.0  # and a side where it is not
    for offset in (0.0, 0.1):
        expected = reference(logits, (24, 24), seen, offset, weights)
        got = masks_to_labels(logits, (24, 24), seen, offset, weights)
        clear = _clear(reference_scores(logits.double(), (24, 24), seen, offset, weights.double()))
        zero = reference_scores(logits, (24, 24), seen, offset, weights).eq(0).all(1)
        assert torch.equal(got[clear | zero], expected[clear | zero])


def _clear(scores: Tensor) -> Tensor:
    best = scores.topk(2, dim=1).values
    return best[:, 0] - best[:, 1] > MARGIN


def test_steps_within_rounding_of_the_pruning_bounds():
    """Classes a hair apart, at every height of the sigmoid: those that the oracle tells apart are told apart."""
    torch.manual_seed(10)
    level = torch.linspace(-12, 12, 64).repeat_interleave(4).view(1, 1, 1, 256).expand(1, 8, 2, 256)
    for hair in (1e-7, 1e-5, 1e-4, 1e-3, 1e-2):
        logits = level + torch.randn(1, 8, 2, 256) * hair * level.abs().clamp_min(1)
        for seen, offset in ((None, 0.0), (range(8), 0.1), ([0, 3, 5], 0.1)):
            check(logits, (10, 2048), seen, offset)


def test_large_cancelling_corners():
    """Values of 1e4 of either sign meet near 0, where their rounding decides what a bound may leave out."""
    torch.manual_seed(11)
    logits = torch.randn(1, 6, 8, 8).sign() * 1e4 + torch.randn(1, 6, 8, 8)
    got = masks_to_labels(logits, (64, 64), [0, 1], 0.1, return_details=True)
    scores = reference_scores(logits.double(), (64, 64), [0, 1], 0.1)
    # an error of 1e-3 in a logit of 1e4 is float32's own
    regret = scores.max(1).values - scores.gather(1, got.labels[:, None])[:, 0]
    assert regret.max() < 1e-3


# NaN and infinity


@pytest.mark.parametrize("geometry", [{}, {"crop_size": (16, 16), "canvas_size": (16, 24)}], ids=["one", "two"])
def test_nan_is_the_largest_and_counted(backend, geometry):
    torch.manual_seed(12)
    windows = {"windows": [(0, 0), (0, 8)]} if geometry else {}
    logits = torch.randn(4, 5, 4, 4)
    logits[0, 3, 1, 1] = logits[0, 4, 1, 1] = torch.nan
    logits[3, 0, 2, 3] = torch.nan
    size = (16, 24) if geometry else (16, 16)
    got = check(logits, size, [0, 1], 0.1, **geometry, **windows)
    assert got.nan_count[0] > 0 and (got.scores[0].isnan() == (got.labels[0] == 3) * got.scores[0].isnan()).all()
    assert got.scores[0].isnan().any()
    check(logits, size, [0, 1], 0.1, top_k=3, **geometry, **windows)


@pytest.mark.parametrize("weighting", ["both", "seen", "unseen"])
def test_nan_trusty(backend, weighting):
    torch.manual_seed(13)
    trusty = torch.randn(1, 1, 4, 4)
    trusty[0, 0, 2, 2] = torch.nan
    logits = torch.randn(1, 5, 4, 4)
    got = check(logits, (16, 16), [1, 2], 0.1, trusty_logits=trusty, trusty_weighting=weighting)
    nan_label = {"both": 0, "seen": 1, "unseen": 0}[weighting]
    assert got.labels[got.scores.isnan()].eq(nan_label).all() and got.nan_count.item() > 0


def test_infinite_logits(backend):
    """-inf switches a class off, its score is 0; but where a bilinear weight is 0 the product is NaN, as in torch."""
    logits = torch.randn(1, 4, 6, 5)
    logits[:, 2] = -torch.inf
    logits[:, 1, 2, 2] = torch.inf
    check(logits, (6, 5), [0], 0.1)  # at the patch grid's own size nothing is mixed
    check(logits, (12, 10), [0], 0.1)


# The references themselves


def test_reference_scores_is_the_formula_and_differentiable():
    torch.manual_seed(14)
    logits = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    trusty = torch.randn(2, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    up = torch.nn.functional.interpolate(logits, size=(7, 6), mode="bilinear", align_corners=False)
    unseen = torch.nn.functional.interpolate(trusty, size=(7, 6), mode="bilinear", align_corners=False).sigmoid()
    by_hand = torch.stack(
        [
            (up[:, c].sigmoid() - 0.1) * (1 - unseen[:, 0]) if c in (1, 3) else up[:, c].sigmoid() * unseen[:, 0]
            for c in range(4)
        ],
        dim=1,
    )
    torch.testing.assert_close(reference_scores(logits, (7, 6), [1, 3], 0.1, trusty), by_hand, rtol=1e-13, atol=0)

    def scores(a, b):
        geometry = {"crop_size": (6, 6), "canvas_size": (6, 8), "windows": [(0, 0), (0, 2)]}
        return reference_scores(a, (5, 5), [1, 3], 0.1, b, **geometry)

    torch.autograd.gradcheck(scores, (logits, trusty))


def test_reference_scores_averages_windows():
    """Two constant windows, overlapping by one column: their mean there, each alone elsewhere."""
    logits = torch.stack([torch.full((1, 2, 2), 0.0), torch.full((1, 2, 2), 50.0)])
    geometry = {"crop_size": (2, 2), "canvas_size": (2, 3), "windows": [(0, 0), (0, 1)]}
    scores = reference_scores(logits, (2, 3), **geometry)
    assert scores[0, 0, 0].tolist() == [0.5, 0.75, 1.0]


def test_label_dtypes(backend):
    logits = torch.randn(1, 5, 3, 3)
    expected = masks_to_labels(logits, (9, 9))
    assert expected.dtype == torch.int64
    for dtype in (torch.int32, torch.int16, torch.uint8):
        labels = masks_to_labels(logits, (9, 9), dtype=dtype)
        assert labels.dtype == dtype and torch.equal(labels.long(), expected)


ON_EACH_INSTRUCTION_SET = """
import sys, torch
from zs3fast.ops import _extension, use_backend
from zs3fast.ops.masks_to_labels import masks_to_labels
use_backend("cpp")
logits, trusty, geometry = torch.load(sys.argv[1])
one = masks_to_labels(logits, (50, 60), range(9), 0.1, trusty)
two = masks_to_labels(logits, (50, 60), range(9), 0.1, trusty, **geometry)
torch.save((_extension.info()["cpu_capability"], one, two), sys.argv[1])
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability, tmp_path):
    """A child process on a lesser instruction set finds what this process finds."""
    info = _extension.info()
    if info["status"] != "loaded":
        pytest.skip(info["problem"])
    if info["cpu_capability"] in ("default", capability):
        pytest.skip(f"this processor has no instruction set above {capability}")
    torch.manual_seed(15)
    logits, trusty = torch.randn(2, 30, 7, 5) * 3, torch.randn(2, 1, 7, 5)
    geometry = {"crop_size": (40, 40), "canvas_size": (40, 50), "windows": [(0, 0), (0, 10)]}
    file = tmp_path / "exchange.pt"
    torch.save((logits, trusty, geometry), file)
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", ON_EACH_INSTRUCTION_SET, str(file)], env=environment, check=True)
    used, one, two = torch.load(file)
    assert used == capability
    with use_backend("cpp"):
        assert torch.equal(masks_to_labels(logits, (50, 60), range(9), 0.1, trusty), one)
        assert torch.equal(masks_to_labels(logits, (50, 60), range(9), 0.1, trusty, **geometry), two)


# Registration


def op_arguments(top_k=1, return_details=True, trusty=True):
    torch.manual_seed(16)
    return (
        torch.randn(4, 5, 3, 4),
        torch.randn(4, 1, 3, 4) if trusty else None,
        [0, 2],
        0.1,
        "both",
        [11, 10],
        [8, 8],
        [8, 12],
        [0, 0, 0, 4],
        top_k,
        torch.int32,
        return_details,
    )


@pytest.mark.parametrize(
    "arguments", [op_arguments(), op_arguments(3), op_arguments(1, False, False)], ids=["full", "top3", "plain"]
)
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.zs3fast.masks_to_labels.default, arguments)


def pair(logits, trusty):
    one = masks_to_labels(logits, (11, 10), [0, 2], 0.1, trusty)
    geometry = {"crop_size": (8, 8), "canvas_size": (8, 12), "windows": [(0, 0), (0, 4)]}
    return one, masks_to_labels(logits, (20, 21), [0, 2], 0.1, trusty, **geometry, top_k=2, return_details=True)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_full_graph(dynamic):
    arguments = op_arguments()[:2]
    compiled = torch.compile(pair, fullgraph=True, dynamic=dynamic)
    for got, expected in zip(compiled(*arguments)[1], pair(*arguments)[1], strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.equal(compiled(*arguments)[0], pair(*arguments)[0])


def test_export():
    class Module(torch.nn.Module):
        def forward(self, logits, trusty):
            return pair(logits, trusty)

    batch = torch.export.Dim("batch")
    logits, trusty = op_arguments()[:2]
    exported = torch.export.export(Module(), (logits, trusty), dynamic_shapes=({0: 2 * batch}, {0: 2 * batch}))
    more = torch.randn(6, 5, 3, 4), torch.randn(6, 1, 3, 4)
    got, expected = exported.module()(*more), pair(*more)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1].labels, expected[1].labels)


def test_gradients_stop_here():
    labels = masks_to_labels(torch.randn(1, 3, 2, 2, requires_grad=True), (4, 4), return_details=True)
    assert not labels.scores.requires_grad


# What is refused


GOOD = dict(mask_logits=torch.zeros(2, 5, 3, 4), size=(8, 8))
WINDOWED = dict(crop_size=(8, 8), canvas_size=(8, 12), windows=[(0, 0), (0, 4)])
REFUSED = {
    "no-tensor": (dict(mask_logits=[1.0]), TypeError, "mask_logits: expected a tensor"),
    "integer": (dict(mask_logits=torch.zeros(1, 5, 3, 4, dtype=torch.int64)), TypeError, "floating-point"),
    "3-d": (dict(mask_logits=torch.zeros(5, 3, 4)), ValueError, "4 dimensions"),
    "no-class": (dict(mask_logits=torch.zeros(1, 0, 3, 4)), ValueError, "at least one class"),
    "no-patch": (dict(mask_logits=torch.zeros(1, 2, 0, 4)), ValueError, "one patch"),
    "size-int": (dict(size=8), TypeError, "size: expected two ints"),
    "size-float": (dict(size=(8.0, 8)), TypeError, "size: expected two ints"),
    "size-zero": (dict(size=(0, 8)), ValueError, "size: expected at least"),
    "seen-range": (dict(seen=[5]), ValueError, r"0\.\.4"),
    "seen-negative": (dict(seen=[-1]), ValueError, r"0\.\.4"),
    "seen-twice": (dict(seen=[1, 1]), ValueError, r"different class indices, got \[1, 1\]"),
    "seen-tensor": (dict(seen=torch.tensor([1])), TypeError, "tolist"),
    "offset-nan": (dict(seen_offset=float("nan")), ValueError, "seen_offset"),
    "offset-string": (dict(seen_offset="0.1"), TypeError, "seen_offset"),
    "trusty-rows": (dict(trusty_logits=torch.zeros(1, 1, 3, 4)), ValueError, "trusty_logits: expected"),
    "trusty-channels": (dict(trusty_logits=torch.zeros(2, 2, 3, 4)), ValueError, "trusty_logits: expected"),
    "trusty-dtype": (dict(trusty_logits=torch.zeros(2, 1, 3, 4).half()), ValueError, "dtype of mask_logits"),
    "trusty-device": (dict(trusty_logits=torch.zeros(2, 1, 3, 4, device="meta")), ValueError, "device of mask_logits"),
    "weighting": (dict(trusty_weighting="true"), ValueError, "both, seen, unseen, off"),
    "top-k-zero": (dict(top_k=0), ValueError, "top_k"),
    "top-k-large": (dict(top_k=6), ValueError, "top_k"),
    "dtype-float": (dict(dtype=torch.float32), ValueError, "dtype: expected"),
    "dtype-small": (dict(mask_logits=torch.zeros(1, 300, 1, 1), dtype=torch.uint8), ValueError, "one that holds 300"),
    "windows-alone": (dict(windows=[(0, 0)]), ValueError, "crop_size: expected"),
    "windows-empty": (WINDOWED | dict(windows=[]), ValueError, "at least one, got none"),
    "windows-ints": (WINDOWED | dict(windows=[0, 4]), TypeError, "pairs of ints"),
    "windows-outside": (WINDOWED | dict(windows=[(0, 0), (0, 5)]), ValueError, r"within the canvas .* got \(0, 5\)"),
    "windows-hole": (WINDOWED | dict(canvas_size=(8, 20), windows=[(0, 0), (0, 12)]), ValueError, r"pixel \(0, 8\)"),
    "windows-low-hole": (
        dict(crop_size=(8, 8), canvas_size=(12, 8), windows=[(0, 0), (1, 0)]),
        ValueError,
        r"pixel \(9, 0\)",
    ),
    "windows-rows": (
        WINDOWED | dict(mask_logits=torch.zeros(3, 5, 3, 4)),
        ValueError,
        "a multiple of 2 windows as rows, got 3",
    ),
    "canvas-alone": (dict(canvas_size=(9, 8)), ValueError, "windows: expected to cover"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(change, error, message):
    with pytest.raises(error, match=message):
        masks_to_labels(**(GOOD | change))
