"""region_bridge_attention: every backend against dense attention under the mask, and the mask against its table."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from bench.harness import peak_resident_bytes, reset_peak_resident, resident_bytes
from tests.ops.budget import assert_within_budget
from zs3fast.kernels import region_bridge_attention as triton_kernels
from zs3fast.ops import _dispatch, _extension, region_bridge_attention, use_backend
from zs3fast.ops.encoder_attention import kernels
from zs3fast.ops.region_bridge_attention import _reference_run, reference, region_bridge_mask, region_of_patch

op = torch.ops.zs3fast.region_bridge_attention
op_backward = torch.ops.zs3fast.region_bridge_attention_backward

needs_cpp = pytest.mark.skipif(bool(_extension.objections()), reason="; ".join(_extension.objections()))
CPP = pytest.param("cpp", marks=needs_cpp)
BACKENDS = ["reference", CPP, "triton"]
SMALL = [  # B, heads, dh, num_prefix, grid, regions
    (2, 2, 8, 4, (3, 5), (1, 2)),  # a margin column
    (1, 1, 12, 1, (4, 3), (4, 3)),  # M = N, the global token alone
    (1, 2, 64, 11, (6, 4), (1, 1)),  # M = 1
    (1, 3, 8, 3, (7, 5), (3, 2)),  # margins on both sides
    (1, 1, 16, 2, (5, 9), (2, 5)),  # windows of 2 x 1, regions of 8 columns off the grid's end
    (1, 1, 1, 1, (1, 1), (1, 1)),
    (0, 2, 8, 4, (3, 5), (1, 2)),
]
LARGE = [
    (1, 2, 64, 11, (32, 32), (4, 4)),
    (1, 2, 64, 11, (32, 32), (32, 32)),
    (2, 3, 64, 101, (20, 31), (3, 8)),
    (1, 2, 12, 11, (32, 32), (10, 10)),
    (2, 1, 128, 4, (24, 16), (5, 16)),
    (1, 2, 200, 4, (8, 8), (2, 2)),
]
CASES = [(b, s) for b in ("reference", "triton") for s in SMALL]
CASES = [*CASES, *(pytest.param("cpp", s, marks=needs_cpp) for s in SMALL + LARGE)]
ANY = SMALL[3]


def ids(value):
    if not isinstance(value, tuple):
        return None
    B, heads, dh, num_prefix, (h, w), (rh, rw) = value
    return f"B{B}-heads{heads}-dh{dh}-P{num_prefix}-h{h}-w{w}-rh{rh}-rw{rw}"


def device_of(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make(shape, dtype=torch.float32, device="cpu", skip=False, seed=0):
    """q, k, v as views of one packed projection [B, E, 3, heads, dh], a gradient, and the keywords of the call."""
    B, heads, dh, num_prefix, grid, regions = shape
    E = num_prefix + grid[0] * grid[1] + regions[0] * regions[1]
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(B, E, 3, heads, dh, generator=generator).to(device, dtype)
    q, k, v = (x.transpose(1, 2) for x in (2 * packed).unbind(2))
    q = q[:, :, num_prefix - 1 :] if skip else q
    grad = torch.randn(q.shape, generator=generator).to(device, dtype)
    return (q, k, v), grad, dict(num_prefix=num_prefix, grid=grid, regions=regions, skip_prompts=skip)


def gradients_of(function, layout):
    """(grad, q, k, v) -> (dq, dk, dv), by autograd through `function`."""

    def gradients(grad, *tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        return torch.autograd.grad(function(*tensors, **layout), tensors, grad)

    return gradients


def check(backend, tensors, grad, layout):
    with use_backend(backend):
        output = region_bridge_attention(*tensors, **layout)
        got = gradients_of(region_bridge_attention, layout)(grad, *tensors)
    assert output.dtype == grad.dtype
    assert_within_budget("output", output, reference, *tensors, **layout)
    assert_within_budget("(dq, dk, dv)", got, gradients_of(reference, layout), grad, *tensors)
    return output


# The op against the definition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "shape"), CASES, ids=ids)
def test_output_and_gradients(backend, shape):
    for skip in (False, True):
        output = check(backend, *make(shape, device=device_of(backend), skip=skip))
        assert output.transpose(1, 2).is_contiguous()  # joining the heads is a view


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types(backend, dtype):
    tensors, grad, layout = make((2, 2, 64, 4, (7, 5), (3, 2)), dtype, device_of(backend), skip=True)
    with use_backend(backend):
        reasons = _dispatch.objections("region_bridge_attention", backend, *tensors)
    if backend == "triton" and reasons:
        assert device_of(backend) == "cpu" and dtype == torch.bfloat16, reasons
        pytest.skip("; ".join(reasons))
    check(backend, tensors, grad, layout)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [SMALL[0], SMALL[3], LARGE[2], LARGE[5]], ids=ids)
def test_every_kernel_of_the_block(shape, dtype):
    """Prefix and patches by each kernel of encoder_attention: outputs, and the log-sum-exp the regions are added to."""
    (q, k, v), _, layout = make(shape, dtype, skip=True)
    places = (layout["num_prefix"], layout["grid"], layout["regions"], -0.7 * q.shape[-1] ** -0.5)
    for name in kernels(dtype):
        output, lse = torch.ops.zs3fast_cpp.region_bridge_attention_by(q, k, v, *places, name)
        steps = partial(reference, num_prefix=places[0], grid=places[1], regions=places[2], scale=places[3])
        assert_within_budget(name, output, partial(steps, skip_prompts=True), q, k, v)
        with use_backend("reference"):
            wide = op(q.double(), k.double(), v.double(), *places)[1]
        torch.testing.assert_close(lse.double(), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [s for s in SMALL if s[0]], ids=ids)
def test_flash_attention_and_merged_regions(shape, dtype):
    """What a GPU runs forward for half types; without matrices in the merge, the interpreter takes them all."""
    for skip in (False, True):
        tensors, _, layout = make(shape, dtype, device_of("triton"), skip=skip)
        where = (*(layout[n] for n in ("num_prefix", "grid", "regions")), shape[2] ** -0.5)
        _, want = _reference_run(*(x.double() for x in tensors), *where)
        with use_backend("triton"):
            if reasons := _dispatch.objections("region_bridge_attention", "triton", tensors[0].float()):
                pytest.skip("; ".join(reasons))
        output, lse = triton_kernels._empty_heads(tensors[0]), torch.empty_like(want, dtype=torch.float32)
        triton_kernels._split(*tensors, output, lse, *where)
        assert_within_budget("output", output, reference, *tensors, **layout)
        torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=2e-5)


def test_flash_attention_reads_whole_rows():
    x = torch.empty(2, 50, 3, 2, 64, dtype=torch.float16)
    q, k, _ = (t.transpose(1, 2) for t in x.unbind(2))
    assert (
        triton_kernels._aligned(q)
        and triton_kernels._aligned(k[:, :, 1:])
        and triton_kernels._aligned(k[:, :1].expand_as(k))
    )
    assert (
        not triton_kernels._aligned(q.mT)
        and not triton_kernels._aligned(q[..., 4:])
        and not triton_kernels._aligned(q[..., ::2])
    )
    assert not triton_kernels._aligned(torch.empty(2, 2, 50, 20)[..., :16])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["contiguous", "columns", "broadcast", "tokens"])
def test_strides(backend, how):
    (q, k, v), grad, layout = make((2, 2, 8, 3, (5, 4), (2, 2)), device=device_of(backend))
    if how == "contiguous":
        q, k, v, grad = (x.contiguous() for x in (q, k, v, grad))
    elif how == "columns":  # neighbouring columns far apart
        q, k, v, grad = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v, grad))
    elif how == "broadcast":  # one head's values for all, and the gradient of a sum
        k, v = k[:, :1].expand_as(k), v[:1].expand_as(v)
        grad = torch.ones(1, device=q.device).expand(q.shape)
    else:  # every second token of a longer sequence, heads and columns cut out of wider ones
        wide = torch.randn(2, 3, 2 * q.shape[2], 11, device=q.device)
        q, k, v = (wide[:, 1:, ::2, i : i + 8] for i in (0, 1, 3))
    check(backend, (q, k, v), grad, layout)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    tensors, grad, layout = make(ANY, device=device_of(backend))
    for scale in (0.0, 0.05, 1, -0.5):
        check(backend, tensors, grad, layout | {"scale": scale})


@pytest.mark.parametrize("factor", [100.0, 1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend, factor):
    """Softmax of scores in the thousands is one-hot: only the differences to the largest may be exponentiated."""
    tensors, grad, layout = make(ANY, device=device_of(backend))
    q, k, v = tensors[0] * factor, tensors[1], tensors[2]
    with use_backend(backend):
        output = region_bridge_attention(q, k, v, **layout)
        got = gradients_of(region_bridge_attention, layout)(grad, q, k, v)
    assert_within_budget("output", output, reference, q, k, v, fp32=1e-4, **layout)
    assert all(torch.isfinite(g).all() for g in got)


@pytest.mark.parametrize("backend", [CPP, "triton"])
def test_nan_stays_where_it_is_seen(backend):
    """A NaN value of one region reaches its window and itself, no other row; dense code spreads it further."""
    (q, k, v), _, layout = make((1, 2, 8, 3, (4, 6), (2, 3)), device=device_of(backend))
    v = v.clone()
    v[:, :, 3 + 24 + 4] = float("nan")
    with use_backend(backend):
        output = region_bridge_attention(q, k, v, **layout)
    sees = region_bridge_mask(3, (4, 6), (2, 3))[:, 3 + 24 + 4].to(output.device)
    assert sees.sum() == 5
    assert torch.equal(output.isnan().all(-1), sees.expand(1, 2, -1)) and not output[:, :, ~sees].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 2, 8, 4, (6, 4), (3, 2)), (1, 2, 8, 4, (5, 5), (2, 2))], ids=ids)
def test_skipping_prompts_changes_no_other_row(backend, shape):
    (q, k, v), grad, layout = make(shape, device=device_of(backend))
    num_prefix = layout["num_prefix"]
    live = torch.tensor([0, *range(num_prefix, q.shape[2])], device=q.device)
    with use_backend(backend):
        every = region_bridge_attention(q, k, v, **layout)
        few = region_bridge_attention(q[:, :, live], k, v, **(layout | {"skip_prompts": True}))
    torch.testing.assert_close(few, every[:, :, live], rtol=1e-5, atol=1e-6)


@needs_cpp
@pytest.mark.parametrize("shape", LARGE[:3], ids=ids)
def test_torch_backward_takes_the_final_output_and_log_sum(shape):
    """What the C++ backward stands on: rows of a block whose log-sum-exp and output know of keys outside of it."""
    (q, k, v), grad, layout = make(shape, torch.float64)
    n = layout["num_prefix"] + layout["grid"][0] * layout["grid"][1]
    expected = gradients_of(reference, layout)(grad, q, k, v)[0][:, :, :n]
    with use_backend("reference"):
        output, lse = op(q, k, v, layout["num_prefix"], layout["grid"], layout["regions"], q.shape[-1] ** -0.5)
    block = [x[:, :, :n] for x in (grad, q, k, v, output, lse)]
    dq = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*block, 0.0, False)[0]
    owner = region_of_patch(layout["grid"], layout["regions"])
    margin = torch.cat([torch.arange(layout["num_prefix"]), layout["num_prefix"] + (owner < 0).nonzero().flatten()])
    torch.testing.assert_close(dq[:, :, margin], expected[:, :, margin], rtol=1e-10, atol=1e-12)
    rows = layout["num_prefix"] + (owner >= 0).nonzero().flatten()
    token = n + owner[owner >= 0]
    p = ((q[:, :, rows] * k[:, :, token]).sum(-1) * q.shape[-1] ** -0.5 - lse[:, :, rows]).exp()
    delta = (grad * output)[:, :, rows].sum(-1)
    ds = p * ((grad[:, :, rows] * v[:, :, token]).sum(-1) - delta) * q.shape[-1] ** -0.5
    torch.testing.assert_close(dq[:, :, rows] + ds.unsqueeze(-1) * k[:, :, token], expected[:, :, rows])


@needs_cpp
def test_threads_do_not_change_a_bit():
    (q, k, v), grad, layout = make((2, 3, 64, 4, (9, 8), (2, 3)))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with use_backend("cpp"):
                output = region_bridge_attention(q, k, v, **layout)
                results.append((output, *gradients_of(region_bridge_attention, layout)(grad, q, k, v)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not reset_peak_resident() and not peak_resident_bytes(), reason="peak memory cannot be read here")
@needs_cpp
def test_no_score_matrix():
    """Forward and backward at M = 1024 stay under half of one [heads, E, E] matrix."""
    (q, k, v), grad, layout = make((1, 12, 64, 11, (32, 32), (32, 32)))
    with use_backend("cpp"):
        gradients_of(region_bridge_attention, layout)(grad, q, k, v)
        reset_peak_resident()
        before = resident_bytes()
        gradients_of(region_bridge_attention, layout)(grad, q, k, v)
    assert peak_resident_bytes() - before < 12 * 2059 * 2059 * 4 / 2


# The definition ------------------------------------------------------------------------------------------------------


def test_mask_of_a_known_grid():
    """2 prefix tokens, 3 x 5 patches, 1 x 2 regions: windows of 3 x 2, the last column in no region."""
    assert region_of_patch((3, 5), (1, 2)).view(3, 5).tolist() == [[0, 0, 1, 1, -1]] * 3
    mask = region_bridge_mask(2, (3, 5), (1, 2))
    patches = range(2, 17)
    rows = [{j for j in range(19) if mask[i, j]} for i in range(19)]
    assert rows[0] == rows[1] == {0, 1, *patches}
    assert rows[2] == rows[3] == rows[12] == {0, 1, *patches, 17}
    assert rows[4] == rows[15] == {0, 1, *patches, 18}
    assert rows[6] == rows[11] == rows[16] == {0, 1, *patches}
    assert rows[17] == {2, 3, 7, 8, 12, 13, 17}
    assert rows[18] == {4, 5, 9, 10, 14, 15, 18}


@pytest.mark.parametrize("side", [1, 2, 3, 4, 8, 16, 32])
def test_mask_of_the_published_sizes(side):
    """32 x 32 patches: the mask is symmetric and has the pairs the method's table counts."""
    window = 32 // side
    mask = region_bridge_mask(11, (32, 32), (side, side))
    covered = (side * window) ** 2
    assert torch.equal(mask, mask.T)
    assert mask.sum() == 1035**2 + 2 * covered + side**2
    assert (mask[-(side**2) :].sum(1) == window**2 + 1).all()
    assert (region_of_patch((32, 32), (side, side)) < 0).sum() == {3: 124}.get(side, 0)


@pytest.mark.parametrize("shape", [(1, 1, 2, 2, (3, 3), (2, 1)), (1, 2, 1, 1, (2, 5), (1, 2))], ids=ids)
def test_gradcheck_of_the_definition(shape):
    tensors, _, layout = make(shape, torch.float64, skip=True)
    tensors = [x.detach().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *t: reference(*t, **layout), tensors)
    assert torch.autograd.gradcheck(lambda *t: region_bridge_attention(*t, **layout), tensors)


def test_default_scale_and_float64():
    tensors, _, layout = make(ANY, torch.float64)
    output = region_bridge_attention(*tensors, **layout)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, reference(*tensors, **layout, scale=8**-0.5), rtol=1e-12, atol=1e-12)


# Registration --------------------------------------------------------------------------------------------------------


def positional(shape, **kwargs):
    (q, k, v), grad, layout = make(shape, **kwargs)
    return q, k, v, grad, (layout["num_prefix"], layout["grid"], layout["regions"], q.shape[-1] ** -0.5)


@pytest.mark.parametrize("backend", ["reference", CPP])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph(backend, dynamic):
    (q, k, v), grad, layout = make(ANY, skip=True)

    def call(q, k, v):
        return region_bridge_attention(q, k, v, **layout) * 2

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend(backend):
        torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
        expected, got = (gradients_of(f, {})(grad, q, k, v) for f in (call, compiled))
    for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_export_with_any_batch():
    (q, k, v), _, layout = make(ANY)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return region_bridge_attention(q, k, v, **layout)

    batch = torch.export.Dim("batch", min=1, max=8)
    two = [x.expand(2, -1, -1, -1) for x in (q, k, v)]
    program = torch.export.export(Attention(), tuple(two), dynamic_shapes=({0: batch},) * 3)
    assert "zs3fast.region_bridge_attention" in str(program.graph)
    five = [x.expand(5, -1, -1, -1) for x in (q, k, v)]
    torch.testing.assert_close(program.module()(*five), region_bridge_attention(*five, **layout))


@pytest.mark.parametrize("backend", ["reference", CPP])
def test_autocast(backend):
    (q, k, v), _, layout = make(ANY)
    q = q.detach().requires_grad_()
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        output = region_bridge_attention(q, k.half(), v, **layout)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert q.grad.dtype == torch.float32 and torch.isfinite(q.grad).all()


def test_only_tensors_that_want_gradients_get_them():
    (q, k, v), grad, layout = make(ANY)
    k = k.detach().requires_grad_()
    region_bridge_attention(q, k, v, **layout).backward(grad)
    expected = gradients_of(reference, layout)(grad, q, k.detach(), v)[1]
    torch.testing.assert_close(k.grad, expected, rtol=1e-4, atol=1e-5)


def test_backends_say_why_not():
    (q, k, v), _, layout = make((1, 1, 136, 1, (2, 2), (1, 1)))
    with use_backend("triton"), pytest.raises(RuntimeError, match="dh = 136, at most 128"):
        region_bridge_attention(q, k, v, **layout)
    if not _extension.objections():
        with use_backend("cpp"), pytest.raises(RuntimeError, match=r"float64 not built \(float32, float16, bfloat16\)"):
            region_bridge_attention(q.double(), k.double(), v.double(), **layout)


# Mistakes ------------------------------------------------------------------------------------------------------------

GOOD = dict(num_prefix=3, grid=(4, 5), regions=(2, 2))  # E = 27
X = torch.zeros(2, 2, 27, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "changed", "error", "message"),
    [
        (None, X, X, {}, TypeError, "q: expected a tensor, got NoneType"),
        (X, X.long(), X, {}, TypeError, "k: expected a floating-point tensor, got torch.int64"),
        (X[0], X, X, {}, ValueError, "q: expected [B, heads, tokens, dh], got shape [2, 27, 8]"),
        (X, X, X.double(), {}, TypeError, "v: expected q's dtype torch.float32, got torch.float64"),
        (X, X.to("meta"), X, {}, ValueError, "k: expected q's device cpu, got meta"),
        (X, X, X, {"num_prefix": 0}, ValueError, "num_prefix: expected at least 1 (the global token), got 0"),
        (X, X, X, {"num_prefix": 3.0}, TypeError, "num_prefix: expected an int, got float"),
        (X, X, X, {"grid": 20}, TypeError, "grid: expected two ints (height, width), got 20"),
        (X, X, X, {"grid": (4, 5, 1)}, TypeError, "grid: expected two ints (height, width), got (4, 5, 1)"),
        (X, X, X, {"regions": (True, 2)}, TypeError, "regions: expected two ints (height, width), got (True, 2)"),
        (X, X, X, {"regions": (0, 4)}, ValueError, "regions: expected at least (1, 1), got (0, 4)"),
        (X, X, X, {"regions": (5, 1)}, ValueError, "regions: expected at most one a patch of the grid (4, 5), got"),
        (X, X, X, {"regions": (1, 6)}, ValueError, "regions: expected at most one a patch of the grid (4, 5), got"),
        (X, X, X, {"scale": "1"}, TypeError, "scale: expected a number or None, got str"),
        (X[:, :0], X, X, {}, ValueError, "q: expected at least one head of at least one column, got shape [2, 0, 27,"),
        (
            X[:, :, :26], X, X, {}, ValueError,
            "q: expected [2, 2, 27, 8], 27 = 3 prefix + 20 patches + 4 regions, got [2, 2, 26, 8]",
        ),
        (
            X, X, X, {"skip_prompts": True}, ValueError,
            "q: expected [2, 2, 25, 8], 25 = 1 global + 20 patches + 4 regions (skip_prompts), got [2, 2, 27, 8]",
        ),
        (
            X, X[:, :, :25], X, {}, ValueError,
            "k: expected [2, 2, 27, 8], 27 = 3 prefix + 20 patches + 4 regions, got [2, 2, 25, 8]",
        ),
        (X, X[:, :1], X, {}, ValueError, "k: expected [2, 2, 27, 8]"),
        (X, X, X[..., :4], {}, ValueError, "v: expected k's shape [2, 2, 27, 8], got [2, 2, 27, 4]"),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_mistakes(q, k, v, changed, error, message):
    with pytest.raises(error, match="^region_bridge_attention: " + re.escape(message)):
        region_bridge_attention(q, k, v, **(GOOD | changed))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_nan_in_a_query_reaches_its_row(backend: str) -> None:
    """torch's own kernel, which does the dense part, makes a row of zeros of it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 3 + 4 + 1, 16, generator=generator).unbind(0)
    for row in (0, 2, 4, 7):  # class token, prompt, patch, region
        poisoned = q.clone()
        poisoned[1, 2, row, 3] = float("nan")
        with use_backend(backend):
            out = region_bridge_attention(poisoned, k, v, num_prefix=3, grid=(2, 2), regions=(1, 1), scale=0.25)
        expected = torch.zeros(2, 3, 8, 16, dtype=torch.bool)
        expected[1, 2, row] = True
        assert torch.equal(out.isnan(), expected), row
