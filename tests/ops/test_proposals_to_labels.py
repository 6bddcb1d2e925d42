"""proposals_to_labels: every backend against the definition in float64, and the registration."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.ops import _dispatch, _extension, proposals_to_labels, use_backend
from zs3fast.ops.proposals_to_labels import reference, reference_scores

OP = "proposals_to_labels"
BACKENDS = [name for name in _dispatch.BACKENDS if name in _dispatch.registered(OP)]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Each backend in turn; the interpreter runs Triton in few, large blocks."""
    with use_backend(request.param):
        reasons = _dispatch.objections(OP, request.param, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1))
        if reasons:
            pytest.skip(f"{request.param}: {'; '.join(reasons)}")
        if request.param == "triton" and not torch.cuda.is_available():
            from zs3fast.kernels import proposals_to_labels as kernel

            monkeypatch.setattr(kernel, "BLOCK_P", 2048)
        yield request.param


def check(weights: Tensor, masks: Tensor, size, **kwargs) -> Tensor:
    """Labels equal wherever the oracle's margin is real, scores everywhere; the labels."""
    labels, best = proposals_to_labels(weights, masks, size, dtype=torch.int32, return_scores=True, **kwargs)
    scores = reference_scores(weights.double(), masks.double(), size, **kwargs)
    tie = rounding(weights.double().abs(), masks.double(), size, **kwargs)
    order = scores.sort(dim=1, descending=True, stable=True)
    clear = torch.ones_like(labels, dtype=torch.bool)
    if scores.shape[1] > 1:
        clear = ~(order.values[:, 0] - order.values[:, 1] <= tie)  # NaN above everything is clear
        clear &= ~order.values[:, 1].isnan()
    plain = proposals_to_labels(weights, masks, size, dtype=torch.int32, **kwargs)  # takes more shortcuts
    for got in (labels, plain):
        assert got.dtype == torch.int32 and got.shape == (weights.shape[0], *size)
        wrong = clear & (got != order.indices[:, 0])
        assert not wrong.any(), f"{wrong.sum()} of {clear.sum()} clear labels differ"
    assert best.dtype == torch.float32
    far = ((best.double() - order.values[:, 0]).abs() > tie + 1e-30) & ~(best.isnan() & order.values[:, 0].isnan())
    assert not far.any(), f"{far.sum()} winning scores are off"
    return labels


def rounding(weights: Tensor, masks: Tensor, size, **kwargs) -> Tensor:
    """[B, H, W] how far a score in float32 may be off: a few roundings of its terms, and of the logits behind them."""
    sums = reference_scores(weights, masks, size, **kwargs)
    off = 2e-6 * sums
    if kwargs["logits"] and masks.numel():
        shift = 1e-6 * masks.nan_to_num(0, 0, 0).abs().max()
        off += reference_scores(weights, masks + shift, size, **kwargs) - sums
    # bilinear weights are rounded too; those of torch come from coordinates that already were
    off += (2e-5 if _dispatch.requested_backend() == "reference" else 3e-7) * weights.sum(1)[:, :, None, None]
    return off.nan_to_num(0, 0, 0).amax(1)


def blobs(batch: int, proposals: int, h: int, w: int, softness: float = 1.0) -> Tensor:
    """Mask logits of round objects: far inside and far outside the sigmoid saturates, as a network's do."""
    y, x = torch.arange(h).view(h, 1) / h, torch.arange(w) / w
    centre = torch.rand(2, batch, proposals, 1, 1)
    radius = 0.05 + 0.3 * torch.rand(batch, proposals, 1, 1)
    distance = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2).sqrt()
    return ((radius - distance) * 80 / softness + 0.3 * torch.randn(batch, proposals, h, w)).clamp(-14, 14)


def peaked(batch: int, proposals: int, classes: int, sharpness: float = 4.0) -> Tensor:
    return (sharpness * torch.randn(batch, proposals, classes)).softmax(-1)


SHAPES = {  # B, Nq, C, h, w, padded, image, size
    "B2-Nq5-C1": (2, 5, 1, 3, 5, (12, 20), (11, 18), (13, 17)),
    "B1-Nq1-C2": (1, 1, 2, 4, 4, (16, 16), (16, 16), (9, 9)),
    "B1-Nq7-C20-h1-w1": (1, 7, 20, 1, 1, (5, 33), (5, 33), (5, 33)),
    "B1-Nq6-C3-same": (1, 6, 3, 6, 3, (6, 3), (6, 3), (6, 3)),
    "B1-Nq3-C7-down": (1, 3, 7, 9, 8, (36, 32), (33, 32), (5, 3)),
    "B1-Nq3-C7-up": (1, 3, 7, 3, 2, (12, 8), (10, 7), (40, 50)),
    "B0-Nq3-C4": (0, 3, 4, 3, 3, (12, 12), (12, 12), (8, 8)),
    "B2-Nq0-C4": (2, 0, 4, 3, 3, (12, 12), (12, 12), (8, 8)),
}
LARGE = {
    "B2-Nq100-C171-h24-w32": (2, 100, 171, 24, 32, (96, 128), (96, 121), (72, 91)),
    "B1-Nq33-C847-h16-w22": (1, 33, 847, 16, 22, (64, 88), (60, 88), (45, 66)),
    "B1-Nq300-C20-h10-w12": (1, 300, 20, 10, 12, (40, 48), (40, 48), (61, 77)),
    "B1-Nq9-C150-shrunk-5x": (1, 9, 150, 40, 30, (160, 120), (151, 120), (31, 24)),
}


@pytest.mark.parametrize("shape", (SHAPES | LARGE).values(), ids=(SHAPES | LARGE).keys())
@pytest.mark.parametrize("kind", ["random", "blobs"])
@pytest.mark.parametrize("logits", [True, False], ids=["logits", "soft"])
def test_agrees(backend, shape, kind, logits):
    batch, proposals, classes, h, w, padded, image, size = shape
    if backend == "triton" and (classes > 20 or proposals > 100):
        pytest.skip("the interpreter is slow: test_triton_walks_over_blocks takes a product of this size")
    torch.manual_seed(0)
    weights = torch.rand(batch, proposals, classes) if kind == "random" else peaked(batch, proposals, classes)
    if logits:
        masks = 3 * torch.randn(batch, proposals, h, w) if kind == "random" else blobs(batch, proposals, h, w)
        check(weights, masks, size, logits=True, padded_size=padded, image_size=image, align_corners=kind == "blobs")
    else:
        masks = (
            torch.rand(batch, proposals, *padded) if kind == "random" else blobs(batch, proposals, *padded).sigmoid()
        )
        check(weights, masks, size, logits=False, image_size=image)


def test_triton_walks_over_blocks():
    """More classes, proposals and pixels than a block holds, no multiple of it, and more blocks than programs."""
    torch.manual_seed(1)
    with use_backend("triton"):
        if reasons := _dispatch.objections(OP, "triton", torch.zeros(1), torch.zeros(1)):
            pytest.skip("; ".join(reasons))
        weights, masks = peaked(2, 37, 150), blobs(2, 37, 7, 9)
        check(weights, masks, (9, 11), logits=True, padded_size=(28, 36), image_size=(28, 33))


@pytest.mark.parametrize("sharpness", [0.0, 0.01, 1.0, 8.0])
@pytest.mark.parametrize("softness", [0.2, 1.0, 20.0])
def test_whatever_can_be_pruned(backend, sharpness, softness):
    """From classes that all tie nearly everywhere to one class a proposal; from steps to slopes."""
    if backend == "triton" and (sharpness, softness) != (1.0, 1.0):
        pytest.skip("Triton prunes nothing")
    torch.manual_seed(2)
    weights, masks = peaked(1, 30, 40, sharpness), blobs(1, 30, 24, 32, softness)
    check(weights, masks, (70, 90), logits=True, padded_size=(96, 128), image_size=(93, 120))


def test_negative_weights(backend):
    torch.manual_seed(3)
    masks = blobs(2, 12, 12, 16)
    check(torch.randn(2, 12, 9), masks, (40, 50), logits=True, padded_size=(48, 64))
    check(-torch.rand(2, 12, 9), masks, (40, 50), logits=True, padded_size=(48, 64))


@pytest.mark.parametrize("masks_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_are_widened(backend, masks_dtype, weights_dtype):
    torch.manual_seed(4)
    weights, logits = peaked(2, 6, 10).to(weights_dtype), blobs(2, 6, 6, 8).to(masks_dtype)
    check(weights, logits, (21, 30), logits=True, padded_size=(24, 32))
    check(weights, logits.float().sigmoid().to(masks_dtype), (21, 30), logits=False)


def test_strides(backend):
    torch.manual_seed(5)
    weights = torch.rand(3, 20, 2).permute(2, 1, 0)[:, ::4]  # [2, 5, 3]
    transposed = torch.randn(8, 6, 5, 2).permute(3, 2, 1, 0)  # [2, 5, 6, 8]
    sliced = torch.randn(4, 10, 12, 16)[::2, ::2, ::2, 1::2]
    broadcast = torch.randn(1, 5, 6, 8).expand(2, 5, 6, 8)
    for logits in (transposed, sliced, broadcast):
        assert logits.shape == (2, 5, 6, 8)
        check(weights, logits, (14, 19), logits=True, padded_size=(24, 32), image_size=(24, 30))
        check(weights, logits.sigmoid(), (14, 19), logits=False, image_size=(5, 7))
    check(torch.rand(1, 1, 3).expand(2, 5, 3), transposed, (14, 19), logits=True)


# Ties, and masks that leave nothing to decide


def test_equal_classes_go_to_the_lowest(backend):
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("NumPy's product, the interpreter's, rounds equal columns apart on some CPUs")
    torch.manual_seed(6)
    weights = torch.rand(1, 8, 1).expand(1, 8, 60)
    masks = blobs(1, 8, 12, 16)
    assert proposals_to_labels(weights, masks, (40, 50), logits=True, padded_size=(48, 64)).eq(0).all()
    lower = weights.clone()
    lower[:, :, [0, 1, 5]] *= 0.5
    assert proposals_to_labels(lower, masks, (40, 50), logits=True, padded_size=(48, 64)).eq(2).all()


def test_empty_masks_tie_at_zero(backend):
    weights = torch.rand(1, 4, 70)
    assert proposals_to_labels(weights, torch.zeros(1, 4, 32, 32), (40, 40), logits=False).eq(0).all()
    none = proposals_to_labels(
        torch.rand(1, 0, 70), torch.zeros(1, 0, 32, 32), (40, 40), logits=False, return_scores=True
    )
    assert none[0].eq(0).all() and none[1].eq(0).all()


def test_binary_masks(backend):
    """What SAM and annotations give: most proposals are constant on most tiles, and a pixel sums few of them."""
    torch.manual_seed(7)
    masks = (blobs(2, 20, 48, 64) > 0).float()
    check(peaked(2, 20, 30), masks, (48, 64), logits=False)
    check(peaked(2, 20, 30), masks, (37, 91), logits=False, image_size=(45, 64))


def test_proposals_that_are_the_same_for_all_classes(backend):
    """An invalid proposal's weights are 1 for every class: it may decide nothing."""
    torch.manual_seed(8)
    weights = peaked(1, 12, 25)
    weights[:, 3:] = 1.0
    labels = check(weights, blobs(1, 12, 12, 16), (40, 50), logits=True, padded_size=(48, 64))
    assert len(labels.unique()) > 1


def test_classes_a_hair_apart():
    """Differences from far below to far above float32's rounding: those that the oracle tells apart are told apart."""
    torch.manual_seed(9)
    masks = blobs(1, 10, 12, 16)
    base = torch.rand(1, 10, 1)
    for hair in (1e-8, 1e-7, 1e-6, 1e-5, 1e-3):
        for sign in (1, base.bernoulli(0.5) * 2 - 1):
            weights = base * sign * (1 + hair * torch.randn(1, 10, 50))
            check(weights, masks, (40, 50), logits=True, padded_size=(48, 64))


def test_one_pixel_of_a_tile_decides():
    """A proposal that exceeds the others in a single pixel of a large tile must not be missed."""
    for row, column in itertools.product((0, 13, 31), (0, 17, 31)):
        masks = torch.full((1, 2, 32, 32), 0.5)
        masks[0, 1, row, column] = 0.51
        labels = proposals_to_labels(torch.eye(2)[None], masks, (32, 32), logits=False)
        assert labels.sum() == 1 and labels[0, row, column] == 1


# NaN and infinity


def test_nan_masks(backend):
    torch.manual_seed(10)
    masks = blobs(2, 5, 12, 16)
    masks[0, 3, 4, 5] = torch.nan
    for kwargs in ({"logits": True, "padded_size": (48, 64)}, {"logits": False}):
        labels, scores = proposals_to_labels(torch.rand(2, 5, 7), masks, (20, 40), return_scores=True, **kwargs)
        expected = reference_scores(torch.rand(2, 5, 7), masks, (20, 40), **kwargs)[:, 0].isnan()
        assert torch.equal(scores.isnan(), expected) and expected[0].any() and not expected[1].any()
        assert labels[expected].eq(0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_weights(backend, value):
    """One class is NaN everywhere, or infinite where the mask is not zero, and wins there."""
    torch.manual_seed(11)
    weights = torch.rand(1, 5, 60)
    weights[0, 2, 4] = value
    labels, scores = proposals_to_labels(weights, blobs(1, 5, 12, 16), (40, 40), logits=True, return_scores=True)
    assert labels.eq(4).all() and not scores.isfinite().any()


def test_infinite_logits(backend):
    """-inf switches a pixel of a proposal off, +inf on; where a bilinear weight is 0 there is NaN, as in torch."""
    torch.manual_seed(12)
    masks = torch.randn(1, 4, 6, 8)
    masks[:, 2] = -torch.inf
    masks[:, 1, 2, 2] = torch.inf
    weights = peaked(1, 4, 5)
    check(weights, masks, (6, 8), logits=True)
    check(weights, masks, (9, 9), logits=True)
    check(weights, masks, (12, 10), logits=True, padded_size=(12, 16), image_size=(12, 10))


# The references themselves


def test_reference_is_the_formula_and_differentiable():
    torch.manual_seed(13)
    weights = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    masks = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)

    def scores(a, m):
        return reference_scores(a, m, (5, 6), logits=True, padded_size=(12, 8), image_size=(11, 7), align_corners=True)

    up = F.interpolate(masks, size=(12, 8), mode="bilinear", align_corners=True).sigmoid()[:, :, :11, :7]
    by_hand = torch.einsum("bqc,bqhw->bchw", weights, up)  # the published order: sum, then resize
    by_hand = F.interpolate(by_hand, size=(5, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores(weights, masks), by_hand, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(scores, (weights, masks))


def test_reference_scores_ignore_autocast():
    torch.manual_seed(14)
    weights, masks = torch.rand(1, 9, 5), torch.randn(1, 9, 4, 4)
    plain = reference_scores(weights, masks, (8, 8), logits=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference_scores(weights, masks, (8, 8), logits=True), plain)


def test_double_runs_on_the_reference():
    weights, masks = torch.rand(1, 3, 4).double(), torch.randn(1, 3, 5, 5)
    with use_backend("auto"):
        labels, scores = proposals_to_labels(weights, masks, (9, 9), logits=True, return_scores=True)
    assert scores.dtype == torch.float64
    assert torch.equal(labels, reference(weights, masks, (9, 9), logits=True))


def test_label_dtypes(backend):
    weights, masks = torch.rand(1, 4, 5), torch.randn(1, 4, 3, 3)
    expected = proposals_to_labels(weights, masks, (9, 9), logits=True)
    assert expected.dtype == torch.int64
    for dtype in (torch.int32, torch.int16, torch.uint8):
        labels = proposals_to_labels(weights, masks, (9, 9), logits=True, dtype=dtype)
        assert labels.dtype == dtype and torch.equal(labels.long(), expected)


# In processes of their own

ON_EACH_INSTRUCTION_SET = """
import sys, torch
from zs3fast.ops import _extension, proposals_to_labels, use_backend
use_backend("cpp")
cases = torch.load(sys.argv[1])
torch.save((_extension.info()["cpu_capability"], [proposals_to_labels(*a, **k) for a, k in cases]), sys.argv[1])
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability, tmp_path):
    """A child process on a lesser instruction set finds what the oracle finds."""
    info = _extension.info()
    if info["status"] != "loaded":
        pytest.skip(info["problem"])
    if info["cpu_capability"] in ("default", capability):
        pytest.skip(f"this processor has no instruction set above {capability}")
    torch.manual_seed(15)
    frame = {"logits": True, "padded_size": (48, 64), "image_size": (45, 61)}
    cases = [
        ((peaked(1, 30, 60), blobs(1, 30, 12, 16), size), frame | {"align_corners": aligned})
        for size, aligned in (((33, 47), True), ((90, 121), False), ((45, 61), False), ((7, 9), True))
    ]
    file = tmp_path / "exchange.pt"
    torch.save(cases, file)
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", ON_EACH_INSTRUCTION_SET, str(file)], env=environment, check=True)
    used, results = torch.load(file)
    assert used == capability
    for labels, (arguments, options) in zip(results, cases, strict=True):
        weights, masks, size = arguments
        scores = reference_scores(weights.double(), masks.double(), size, **options)
        regret = scores.amax(1) - scores.gather(1, labels[:, None])[:, 0]
        assert regret.max() < 2e-6


MEMORY = """
import torch
from bench import harness
from zs3fast.ops import proposals_to_labels, use_backend
use_backend("cpp")
def call(size):
    frame = {"logits": True, "padded_size": (640, 864)}
    return proposals_to_labels(weights, masks, size, **frame, dtype=torch.int16)
weights, masks = torch.rand(1, 100, 847), torch.randn(1, 100, 160, 216)
call((8, 8))
harness.reset_peak_resident()
before = harness.resident_bytes()
call((256, 512))
print(harness.peak_resident_bytes() - before)
"""


def test_memory():
    """Random masks, where nothing is pruned: the scores would be 444 MB, the upsampled masks 221 MB."""
    if _extension.info()["status"] != "loaded" or not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("needs the extension and Linux")
    child = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 8e6


# Registration


def op_arguments(logits=True, return_scores=True):
    torch.manual_seed(16)
    padded = [24, 32] if logits else [6, 8]
    return (
        torch.rand(2, 3, 5),
        torch.randn(2, 3, 6, 8),
        [11, 10],
        logits,
        padded,
        [padded[0] - 1, padded[1]],
        True,
        torch.int32,
        return_scores,
    )


@pytest.mark.parametrize(
    "arguments", [op_arguments(), op_arguments(False), op_arguments(True, False)], ids=["full", "soft", "plain"]
)
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.zs3fast.proposals_to_labels.default, arguments)


def pair(weights, masks):
    frame = {"logits": True, "padded_size": (24, 32), "image_size": (23, 30), "return_scores": True}
    return proposals_to_labels(weights, masks, (11, 10), **frame), proposals_to_labels(
        weights, masks, (9, 9), logits=False
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_full_graph(dynamic):
    arguments = op_arguments()[:2]
    got, expected = torch.compile(pair, fullgraph=True, dynamic=dynamic)(*arguments), pair(*arguments)
    assert torch.equal(got[0][0], expected[0][0]) and torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0][1], expected[0][1])


def test_export():
    class Module(torch.nn.Module):
        def forward(self, weights, masks):
            return pair(weights, masks)

    batch, proposals = torch.export.Dim("batch"), torch.export.Dim("proposals")
    shapes = ({0: batch, 1: proposals}, {0: batch, 1: proposals})
    exported = torch.export.export(Module(), op_arguments()[:2], dynamic_shapes=shapes)
    more = torch.rand(4, 7, 5), torch.randn(4, 7, 6, 8)
    got, expected = exported.module()(*more), pair(*more)
    assert torch.equal(got[0][0], expected[0][0]) and torch.equal(got[1], expected[1])


def test_gradients_stop_here():
    weights, masks = (x.requires_grad_() for x in op_arguments()[:2])
    _, scores = proposals_to_labels(weights, masks, (4, 4), logits=True, return_scores=True)
    assert not scores.requires_grad


# What is refused

GOOD = dict(class_weights=torch.zeros(2, 3, 5), masks=torch.zeros(2, 3, 6, 8), size=(8, 8), logits=True)
REFUSED = {
    "no-tensor": (dict(masks=[1.0]), TypeError, "masks: expected a tensor"),
    "integer": (
        dict(masks=torch.zeros(2, 3, 6, 8, dtype=torch.uint8)),
        TypeError,
        "masks: expected a floating-point tensor",
    ),
    "bool": (
        dict(masks=torch.zeros(2, 3, 6, 8, dtype=torch.bool)),
        TypeError,
        "masks: expected a floating-point tensor",
    ),
    "weights-2-d": (dict(class_weights=torch.zeros(3, 5)), ValueError, "class_weights: expected 3 dimensions"),
    "masks-3-d": (dict(masks=torch.zeros(3, 6, 8)), ValueError, "masks: expected 4 dimensions"),
    "no-class": (dict(class_weights=torch.zeros(2, 3, 0)), ValueError, "at least one class"),
    "no-pixel": (dict(masks=torch.zeros(2, 3, 0, 8)), ValueError, "at least one pixel"),
    "batch": (dict(class_weights=torch.zeros(1, 3, 5)), ValueError, r"expected 2 images, as masks .* got \[1, 3, 5\]"),
    "proposals": (
        dict(class_weights=torch.zeros(2, 4, 5)),
        ValueError,
        r"expected 3 proposals, as masks .* got \[2, 4, 5\]",
    ),
    "device": (dict(class_weights=torch.zeros(2, 3, 5, device="meta")), ValueError, "masks' device cpu, got meta"),
    "dtype-float": (dict(dtype=torch.float32), ValueError, "dtype: expected"),
    "dtype-small": (dict(class_weights=torch.zeros(2, 3, 300), dtype=torch.uint8), ValueError, "one that holds 300"),
    "logits": (dict(logits=1), TypeError, "logits: expected True or False"),
    "align-corners": (dict(align_corners=None), TypeError, "align_corners: expected True or False"),
    "size-int": (dict(size=8), TypeError, "size: expected two ints"),
    "size-float": (dict(size=(8.0, 8)), TypeError, "size: expected two ints"),
    "size-zero": (dict(size=(0, 8)), ValueError, "size: expected at least"),
    "padded-three": (dict(padded_size=(8, 8, 8)), TypeError, "padded_size: expected two ints"),
    "padded-soft": (
        dict(logits=False, padded_size=(24, 32)),
        ValueError,
        r"soft ones on the padded frame \[24, 32\], got \[6, 8\]",
    ),
    "image-large": (dict(padded_size=(24, 32), image_size=(24, 33)), ValueError, "at most the padded frame"),
    "image-zero": (dict(image_size=(0, 3)), ValueError, "image_size: expected at least"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(change, error, message):
    with pytest.raises(error, match=message):
        proposals_to_labels(**(GOOD | change))
