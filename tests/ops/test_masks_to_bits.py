"""masks_to_bits: every backend against the two resizes one after the other, bit for bit but at 0.5."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from bench.harness import peak_resident_bytes, reset_peak_resident, resident_bytes
from zs3fast.ops import _dispatch, _extension, masks_to_bits, unpack_bits, use_backend
from zs3fast.ops.masks_to_bits import reference

op = torch.ops.zs3fast.masks_to_bits

needs_cpp = pytest.mark.skipif(bool(_extension.objections()), reason="; ".join(_extension.objections()))
CPP = pytest.param("cpp", marks=needs_cpp)
BACKENDS = ["reference", CPP, "triton"]
CASES = [  # B, Nq, maps, padded_size, grid
    (1, 3, (40, 54), (160, 216), (30, 30)),
    (2, 2, (7, 9), (28, 36), (4, 4)),  # half a word
    (1, 2, (16, 16), (64, 64), (8, 8)),  # an even ratio: two of four taps weigh nothing
    (1, 2, (12, 10), (12, 10), (5, 7)),  # logits at the padded size already
    (1, 2, (30, 20), (10, 11), (10, 11)),  # downsampled first, and a grid of the padded size
    (2, 1, (3, 4), (6, 8), (13, 17)),  # patches smaller than pixels
    (1, 2, (1, 1), (5, 5), (2, 3)),
    (1, 1, (9, 9), (1, 7), (1, 1)),
    (0, 3, (4, 4), (8, 8), (2, 2)),
    (2, 0, (4, 4), (8, 8), (2, 2)),
]
ANY = CASES[1]


def ids(value):
    if not isinstance(value, tuple):
        return None
    B, Nq, maps, padded, grid = value
    return f"B{B}-Nq{Nq}-" + "-".join(f"{h}x{w}" for h, w in (maps, padded, grid))


def device_of(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make(case, device="cpu", dtype=torch.float32, seed=0):
    """Mask logits: smooth blobs with values on both sides of 0, some of them far from it."""
    B, Nq, (h, w), _, _ = case
    generator = torch.Generator().manual_seed(seed)
    coarse = 8 * torch.randn(max(B, 1), max(Nq, 1), h // 3 + 1, w // 3 + 1, generator=generator)
    smooth = F.interpolate(coarse, size=(h, w), mode="bicubic")[:B, :Nq]
    return (smooth + torch.randn(B, Nq, h, w, generator=generator)).to(device, dtype)


def soft_at_grid(masks, grid):
    """m [B, Nq, h, w] in float32, from soft masks at the padded size."""
    if masks.shape[0] * masks.shape[1] == 0:
        return masks.new_zeros(*masks.shape[:2], *grid)
    return F.interpolate(masks.float(), size=grid, mode="bilinear", align_corners=False, antialias=False)


def check(bits, m):
    """Every bit is m >= 0.5 where m is further than 1e-6 from 0.5, and the bits behind the last patch are 0."""
    N = m.shape[-1] * m.shape[-2]
    assert bits.dtype == torch.int32 and bits.shape == (*m.shape[:2], (N + 31) // 32)
    if N % 32:
        assert (bits[..., -1] >> N % 32 == 0).all()
    wrong = unpack_bits(bits, N) != (m.flatten(2) >= 0.5)
    assert not (wrong & ((m.flatten(2) - 0.5).abs() >= 1e-6)).any(), f"{int(wrong.sum())} of {wrong.numel()} bits wrong"


# The op against the definition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_logits(backend, case, align_corners):
    _, _, _, padded, grid = case
    logits = make(case, device_of(backend))
    with use_backend(backend):
        bits = masks_to_bits(logits, grid, padded_size=padded, align_corners=align_corners, logits=True)
    soft = logits.new_zeros(*logits.shape[:2], *padded)
    if logits.numel() > 0:
        soft = F.interpolate(logits, size=padded, mode="bilinear", align_corners=align_corners).sigmoid()
    check(bits, soft_at_grid(soft, grid))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_soft_masks(backend, case):
    masks = make(case, device_of(backend)).sigmoid()
    with use_backend(backend):
        check(masks_to_bits(masks, case[4]), soft_at_grid(masks, case[4]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(640, 864), (333, 500), (668, 788)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_hard_edges(backend, size):
    """Masks of 0 and 1: a mean changes by as much as a coordinate is off, so these must be torch's in fp32."""
    h, w = size
    y, x = torch.arange(h).view(-1, 1), torch.arange(w)
    masks = torch.stack([(y // s + x // s) % 2 for s in (1, 3, 10)]).unsqueeze(0).float().to(device_of(backend))
    with use_backend(backend):
        check(masks_to_bits(masks, (30, 30)), soft_at_grid(masks, (30, 30)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_itself_is_kept(backend):
    masks = torch.tensor([0.5, 0.5 - 1e-6, 0.5 + 1e-6, float("nan")]).view(1, 4, 1, 1).expand(1, 4, 6, 6)
    with use_backend(backend):
        bits = masks_to_bits(masks.to(device_of(backend)), (3, 3))
        logits = masks_to_bits(torch.zeros(1, 1, 4, 4, device=bits.device), (3, 3), padded_size=(16, 16), logits=True)
    assert bits.flatten().tolist() == [511, 0, 511, 0]
    assert logits.item() == 511


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend):
    """Far from 0 the sigmoid is 0 or 1, whichever exponential overflows on the way."""
    logits = torch.tensor([-1e4, 1e4, -200.0, 200.0]).view(1, 4, 1, 1).expand(1, 4, 3, 3).to(device_of(backend))
    with use_backend(backend):
        bits = masks_to_bits(logits, (2, 2), padded_size=(12, 12), logits=True)
    assert bits.flatten().tolist() == [0, 15, 0, 15]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_are_widened(backend, dtype):
    logits = make(ANY, device_of(backend), dtype)
    with use_backend(backend):
        bits = masks_to_bits(logits, (4, 4), padded_size=(28, 36), align_corners=True, logits=True)
        wide = masks_to_bits(logits.float(), (4, 4), padded_size=(28, 36), align_corners=True, logits=True)
    assert torch.equal(bits, wide)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logits", [False, True])
def test_strides(backend, logits):
    """Transposed, sliced and expanded maps are read where they lie."""
    wide = make((2, 4, (18, 24), (), ()), device_of(backend))
    kwargs = {"padded_size": (40, 30), "logits": True} if logits else {}
    wide = wide if logits else wide.sigmoid()
    for view in (wide.transpose(2, 3), wide[:, 1::2, 2:, ::3], wide[:1].expand(2, -1, -1, -1), wide.transpose(0, 1)):
        with use_backend(backend):
            expected = masks_to_bits(view.contiguous(), (5, 7), **kwargs)
            assert torch.equal(masks_to_bits(view, (5, 7), **kwargs), expected)


@pytest.mark.skipif(not reset_peak_resident() and not peak_resident_bytes(), reason="peak memory cannot be read here")
@needs_cpp
def test_nothing_of_the_padded_size():
    """100 masks of 640 x 864 would be 221 MB."""
    logits = torch.randn(1, 100, 160, 216)
    with use_backend("cpp"):
        masks_to_bits(logits, (30, 30), padded_size=(640, 864), align_corners=True, logits=True)
        reset_peak_resident()
        before = resident_bytes()
        masks_to_bits(logits, (30, 30), padded_size=(640, 864), align_corners=True, logits=True)
    assert peak_resident_bytes() - before < 8 * 2**20


@needs_cpp
def test_threads_do_not_change_a_bit():
    logits = make((2, 5, (20, 30), (), ()))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with use_backend("cpp"):
                results.append(masks_to_bits(logits, (9, 9), padded_size=(80, 120), logits=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# The definition ------------------------------------------------------------------------------------------------------


def test_known_bits():
    """A 2 x 40 grid of a mask at the grid's own size: patches row by row, the lowest bit first."""
    masks = torch.zeros(1, 1, 2, 40)
    masks[0, 0, 0, [0, 5, 31, 32]] = 1.0
    masks[0, 0, 1, 39] = 1.0
    words = masks_to_bits(masks, (2, 40))[0, 0].tolist()
    assert [w & 0xFFFFFFFF for w in words] == [1 << 0 | 1 << 5 | 1 << 31, 1 << 0, 1 << 79 - 64]
    assert unpack_bits(masks_to_bits(masks, (2, 40)), 80).view(2, 40).equal(masks[0, 0] > 0)


def test_no_antialiasing():
    """An object between the four pixels that a patch reads vanishes."""
    masks = torch.zeros(1, 1, 64, 64)
    masks[0, 0, 8:14, 8:14] = 1.0  # a patch of 16 pixels reads its pixels 7 and 8
    assert masks_to_bits(masks, (4, 4)).item() == 0
    masks[0, 0, 7:9, 7:9] = 1.0
    assert masks_to_bits(masks, (4, 4)).item() == 1


def test_padded_size_defaults_to_the_logits_own():
    logits = make(ANY)
    assert torch.equal(masks_to_bits(logits, (4, 4), logits=True), masks_to_bits(logits.sigmoid(), (4, 4)))


def test_float64_runs_on_the_reference():
    logits = make(ANY, dtype=torch.float64)
    kwargs = {"padded_size": (28, 36), "align_corners": True, "logits": True}
    assert torch.equal(masks_to_bits(logits, (4, 4), **kwargs), reference(logits, (4, 4), **kwargs))


# Registration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", CPP])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph(backend, dynamic):
    logits = make(ANY).requires_grad_()

    def call(logits):
        return masks_to_bits(logits, (4, 4), padded_size=(28, 36), logits=True) + 0

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend(backend):
        got = compiled(logits)
    assert torch.equal(got, call(logits)) and not got.requires_grad


def test_export_with_any_batch():
    class Pack(torch.nn.Module):
        def forward(self, logits):
            return masks_to_bits(logits, (4, 4), padded_size=(28, 36), logits=True)

    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(Pack(), (make(ANY),), dynamic_shapes=({0: batch},))
    assert "zs3fast.masks_to_bits" in str(program.graph)
    five = make((5, *ANY[1:]))
    assert torch.equal(program.module()(five), Pack()(five))


def test_backends_say_why_not():
    if not _extension.objections():
        with use_backend("cpp"), pytest.raises(RuntimeError, match=r"float64 not built \(float32, float16, bfloat16\)"):
            masks_to_bits(make(ANY, dtype=torch.float64), (4, 4))
    assert _dispatch.objections("masks_to_bits", "cuda", make(ANY)) == ["not written for this op"]


# Mistakes ------------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("masks", "grid", "kwargs", "error", "message"),
    [
        ([1.0], (4, 4), {}, TypeError, "masks: expected a tensor, got list"),
        (X.bool(), (4, 4), {}, TypeError, "masks: expected a floating-point tensor, got torch.bool"),
        (X[0], (4, 4), {}, ValueError, "masks: expected [B, Nq, height, width], got shape [3, 8, 8]"),
        (X[:, :, :0], (4, 4), {}, ValueError, "masks: expected at least one pixel, got shape [2, 3, 0, 8]"),
        (X, 16, {}, TypeError, "grid: expected two ints (height, width), got 16"),
        (X, (4, 4.0), {}, TypeError, "grid: expected two ints (height, width), got (4, 4.0)"),
        (X, (0, 4), {}, ValueError, "grid: expected at least (1, 1), got (0, 4)"),
        (
            X,
            (4, 4),
            {"padded_size": (0, 8), "logits": True},
            ValueError,
            "padded_size: expected at least (1, 1), got (0",
        ),
        (X, (4, 4), {"padded_size": (8, 8)}, ValueError, "padded_size: expected with logits=True alone"),
        (X, (4, 4), {"align_corners": True}, ValueError, "align_corners: expected with logits=True alone"),
        (X, (4, 4), {"logits": 1}, TypeError, "logits: expected True or False, got 1"),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)
def test_mistakes(masks, grid, kwargs, error, message):
    with pytest.raises(error, match="^masks_to_bits: " + re.escape(message)):
        masks_to_bits(masks, grid, **kwargs)
