"""attention_to_mask: every backend against the reference, with dropout; gradients by name; registration; GPU code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.budget import assert_within_budget
from zs3fast.ops import _dispatch, _extension, attention_to_mask, use_backend
from zs3fast.ops.attention_to_mask import _torch_attention, dropout_keep, philox4x32, reference
from zs3fast.ops.encoder_attention import kernels

SHAPES = [  # B, heads, C, N, dh
    (1, 8, 1, 900, 64),
    (2, 4, 2, 63, 12),
    (1, 4, 171, 260, 64),
    (2, 1, 847, 30, 8),
    (3, 2, 129, 257, 17),
    (1, 2, 20, 5, 96),
]
SMALL = [(1, 2, 1, 63, 16), (2, 3, 37, 70, 12), (1, 1, 2, 5, 8)]  # Triton's interpreter takes a second for each
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = 0x1234_5678_9ABC_DEF0


def _id(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(f"{letter}{n}" for letter, n in zip(("B", "heads", "C", "N", "dh"), value, strict=True))
    return str(value).removeprefix("torch.")


CASES = [(b, s, d) for b in ("reference", "cpp") for s in SHAPES for d in DTYPES]
CASES += [("triton", s, d) for s in SMALL for d in DTYPES]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    B, heads, C, N, dh = shape
    torch.manual_seed(seed)
    return tuple(torch.randn(B, heads, n, dh).to(dtype) for n in (C, N, N))


def _skip_unless_possible(backend: str, q: Tensor) -> None:
    with use_backend(backend):
        reasons = _dispatch.objections("attention_to_mask", backend, q)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def _gradients(q, k, v, grad_output, grad_masks, *, call=reference, **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    results = call(q, k, v, q.shape[-1] ** -0.5, **options)
    pairs = [(r, g) for r, g in zip(results, (grad_output, grad_masks), strict=True) if r is not None]
    return torch.autograd.grad([r for r, _ in pairs], [q, k, v], [g for _, g in pairs])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("backend", "shape", "dtype"), CASES, ids=_id)
def test_agrees_with_reference(backend, shape, dtype, dropout_p):
    q, k, v = _inputs(shape, dtype)
    _skip_unless_possible(backend, q)
    options = {"dropout_p": dropout_p, "seed": SEED}
    with use_backend(backend):
        got = attention_to_mask(q, k, v, shape[-1] ** -0.5, **options)
        assert_within_budget("output, mask_logits", got, reference, q, k, v, shape[-1] ** -0.5, **options)
        grad_output, grad_masks = torch.randn_like(got[0]), torch.randn_like(got[1])
        grads = _gradients(q, k, v, grad_output, grad_masks, call=attention_to_mask, **options)
        wide = _gradients(*(x.double() for x in (q, k, v, grad_output, grad_masks)), **options)
        plain = _gradients(q, k, v, grad_output, grad_masks, **options)
    for name, got_i, wide_i, plain_i in zip(("dq", "dk", "dv"), grads, wide, plain, strict=True):
        # the floor is for dq at N of a few keys, where gradients cancel to almost nothing
        size = wide_i.norm().clamp_min(1e-3 * grad_output.double().norm())
        budget = 1e-5
        if dtype != torch.float32:
            budget = 2 * ((plain_i.double() - wide_i).norm() / size).item() + 2 * torch.finfo(dtype).eps
        error = ((got_i.double() - wide_i).norm() / size).item()
        assert torch.isfinite(got_i).all(), f"{name}: non-finite"
        assert error <= budget, f"{name}: error {error:.2e} over budget {budget:.2e}"


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_output_alone_and_one_gradient_alone(backend):
    q, k, v = _inputs((2, 2, 9, 21, 8))
    _skip_unless_possible(backend, q)
    with use_backend(backend):
        output, masks = attention_to_mask(q, k, v, 0.3, need_masks=False)
        assert masks is None
        assert_within_budget("output", output, lambda *a: reference(*a)[0], q, k, v, 0.3)
        assert output.transpose(1, 2).is_contiguous()  # joining the heads is free
        for i, name in enumerate(("output", "mask_logits")):
            leaves, wide = (
                [x.detach().to(dtype).requires_grad_() for x in (q, k, v)] for dtype in (q.dtype, torch.float64)
            )
            got = torch.autograd.grad(attention_to_mask(*leaves, 0.3)[i].square().sum(), leaves)
            want = torch.autograd.grad(reference(*wide, 0.3)[i].square().sum(), wide, allow_unused=True)
            for label, g, w in zip(("dq", "dk", "dv"), got, want, strict=True):
                w = torch.zeros_like(g, dtype=torch.float64) if w is None else w
                torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5, msg=f"{label} of {name}")


@pytest.mark.skipif(bool(_extension.objections()), reason="; ".join(_extension.objections()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
@pytest.mark.parametrize("shape", SHAPES, ids=_id)
def test_output_alone_by_every_kernel(shape, dtype):
    """Without masks and dropout it is plain attention, by encoder_attention's kernels, with their log-sum-exp."""
    q, k, v = _inputs(shape, dtype)
    for name in kernels(dtype):
        output, lse = torch.ops.zs3fast_cpp.attention_to_mask_by(q, k, v, -0.3, name)
        assert_within_budget(name, output, lambda *a: reference(*a, -0.3, need_masks=False)[0], q, k, v)
        wide = (-0.3 * q.double() @ k.double().mT).logsumexp(-1)
        torch.testing.assert_close(lse.double(), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
@pytest.mark.parametrize("classes", [1, 63, 64, 200])
def test_output_and_gradients_without_masks(classes, dtype):
    """On both sides of where the CPU changes kernels."""
    q, k, v = _inputs((2, 2, classes, 70, 16), dtype)
    options = {"dropout_p": 0.0, "need_masks": False}
    grad = torch.randn_like(q)

    def run(call, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = call(*leaves, 0.25, **options)[0]
        return output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))

    assert_within_budget(
        "output, dq, dk, dv", run(attention_to_mask, q, k, v), lambda *a: run(reference, *a), q, k, v, roundings=2
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("shape", SHAPES, ids=_id)
def test_masks_alone_are_one_full_width_product(shape, dtype):
    q, k, v = _inputs(shape, dtype)
    scale = shape[-1] ** -0.5
    output, masks = attention_to_mask(q, k, None, scale)
    assert output is None
    assert_within_budget("mask_logits", masks, lambda *a: reference(*a)[1], q, k, v, scale)
    wide = [x.double().requires_grad_() for x in (q, k)]
    assert torch.autograd.gradcheck(lambda q, k: attention_to_mask(q, k, None, scale)[1], wide, fast_mode=True)


LAYOUTS = {
    "split-heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns-outermost": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "every-second-row-and-column": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2],
    "one-image-for-all": lambda x: x[:1].expand_as(x),
    "one-head-for-all": lambda x: x[:, :1].expand_as(x),
    "inside-a-larger-matrix": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[:, :, 1:-4, 3:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_any_layout(backend, layout):
    q, k, v = (LAYOUTS[layout](x) for x in _inputs((2, 2, 18, 37, 8)))
    _skip_unless_possible(backend, q)
    with use_backend(backend):
        got = attention_to_mask(q, k, v, 0.4, dropout_p=0.2, seed=3)
        assert_within_budget(layout, got, reference, q, k, v, 0.4, dropout_p=0.2, seed=3)
        grads = [LAYOUTS[layout](torch.randn(2, 2, 18, 8)), torch.randn(2, 37, 18).transpose(1, 2)]
        got = _gradients(q, k, v, *grads, call=attention_to_mask)
        want = _gradients(*(x.double() for x in (q, k, v, *grads)))
    for name, g, w in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert (g.double() - w).norm() <= 1e-5 * w.norm(), name


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize(("B", "C"), [(0, 3), (2, 0)])
def test_nothing_in_nothing_out(backend, B, C):
    q, k, v = (x.requires_grad_() for x in _inputs((B, 2, C, 7, 8)))
    _skip_unless_possible(backend, q)
    with use_backend(backend):
        output, masks = attention_to_mask(q, k, v, 0.4, dropout_p=0.1)
        assert output.shape == (B, 2, C, 8) and masks.shape == (B, C, 7)
        grads = torch.autograd.grad(output.sum() + masks.sum(), (q, k, v))
    for x, grad in zip((q, k, v), grads, strict=True):
        assert grad.shape == x.shape and (grad == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_nan_stays_in_its_class(backend):
    q, k, v = _inputs((1, 2, 5, 9, 8))
    q[0, 0, 2, 3] = float("nan")
    _skip_unless_possible(backend, q)
    with use_backend(backend):
        output, masks = attention_to_mask(q, k, v, 0.4)
    assert output[0, 0, 2].isnan().all() and masks[0, 2].isnan().all()
    assert output[0, 1].isfinite().all()
    others = [0, 1, 3, 4]
    assert output[0, 0, others].isfinite().all() and masks[0, others].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_large_scores_do_not_overflow(backend):
    """Scores of -1e4: exp without its running maximum underflows, and a masked tail of zeros beats that maximum."""
    q, k, v = _inputs((1, 1, 3, 70, 8))
    q, k = q.abs() * 100, -k.abs() * 100
    _skip_unless_possible(backend, q)
    with use_backend(backend):
        got = attention_to_mask(q, k, v, 1.0)
        assert_within_budget("large", got, reference, q, k, v, 1.0, fp32=1e-3)  # fp32 scores of 1e4 have 3 decimals
        grads = _gradients(q, k, v, torch.ones_like(v[:, :, :3]), torch.zeros(1, 3, 70), call=attention_to_mask)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_cpp_with_any_number_of_threads(threads):
    """Few classes on many threads make the masks by a separate product: both ways, and uneven shares, must agree."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for shape in [(1, 4, 1, 40, 8), (1, 4, 130, 40, 8), (2, 4, 33, 300, 8)]:
            q, k, v = _inputs(shape)
            _skip_unless_possible("cpp", q)
            with use_backend("cpp"):
                got = attention_to_mask(q, k, v, 0.3, dropout_p=0.1, seed=5)
            assert_within_budget(_id(shape), got, reference, q, k, v, 0.3, dropout_p=0.1, seed=5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_cpp_on_every_instruction_set(capability):
    """torch fixes the instruction set when it starts, hence a process each; one this CPU lacks falls back."""
    _skip_unless_possible("cpp", torch.zeros(1, 1, 1, 1))
    program = """
import torch
from tests.ops.test_attention_to_mask import SEED, _gradients, _inputs
from zs3fast.ops import attention_to_mask, use_backend
from zs3fast.ops.attention_to_mask import reference
use_backend("cpp")
q, k, v = _inputs((2, 2, 150, 70, 20))
for p in (0.0, 0.3):
    got = attention_to_mask(q, k, v, 20**-0.5, dropout_p=p, seed=SEED)
    want = reference(q.double(), k.double(), v.double(), 20**-0.5, dropout_p=p, seed=SEED)
    grads = [torch.randn_like(x) for x in got]
    got += _gradients(q, k, v, *grads, call=attention_to_mask, dropout_p=p, seed=SEED)
    want += _gradients(*(x.double() for x in (q, k, v, *grads)), dropout_p=p, seed=SEED)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= 1e-5 * w.norm()
print("agrees")
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "agrees\n", done.stderr


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of Random123, the authors' own implementation
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    seed = key[0] | key[1] << 32
    seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    assert [int(w) for w in philox4x32(tuple(torch.tensor(c) for c in counter), seed)] == words


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_statistics(p):
    keep = dropout_keep((4, 8, 100, 203), p, torch.tensor(SEED)).double()
    count, sigma = keep.numel(), (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * sigma / count**0.5
    for dims in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):  # no image, head, class or patch is special
        rates = keep.mean(dims)
        assert (rates - (1 - p)).abs().max() < 6 * sigma / (count / rates.numel()) ** 0.5
    centred = (keep - (1 - p)) / sigma
    for neighbour in (centred[..., 1:] * centred[..., :-1], centred[:, :, 1:] * centred[:, :, :-1]):
        assert abs(neighbour.mean()) < 5 / neighbour.numel() ** 0.5


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_dropout_keeps_the_mean_and_drops_what_the_formula_says(backend):
    """v = 1 makes an output the kept probability, v = identity the dropped probabilities themselves."""
    heads, C, N, p = 2, 20, 24, 0.25
    q, k, _ = _inputs((1, heads, C, N, N))
    _skip_unless_possible(backend, q)
    identity = torch.eye(N).expand(1, heads, N, N)
    with use_backend(backend):
        dropped, masks = attention_to_mask(q, k, identity, 0.2, dropout_p=p, seed=11)
    keep = dropout_keep((1, heads, C, N), p, torch.tensor(11))
    assert torch.equal(dropped != 0, keep)
    probabilities = (q @ k.mT * 0.2).softmax(-1)
    torch.testing.assert_close(dropped[keep], probabilities[keep] / (1 - p))
    torch.testing.assert_close(masks, (q @ k.mT * 0.2).mean(1))  # masks know no dropout

    repeats = 1 if backend == "triton" else 40
    with use_backend(backend):
        ones = torch.ones(1, heads, N, N)
        sums = [attention_to_mask(q, k, ones, 0.2, dropout_p=p, seed=s)[0] for s in range(repeats)]
    sums = torch.stack(sums)[..., 0]
    spread = (probabilities.square().sum(-1) * p / (1 - p)).sqrt().mean() / sums.numel() ** 0.5
    assert abs(sums.mean() - 1) < 5 * spread


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_seeds(backend):
    q, k, v = _inputs((1, 2, 6, 30, 8))
    _skip_unless_possible(backend, q)

    def run(**options):
        with use_backend(backend):
            return attention_to_mask(q, k, v, 0.3, dropout_p=0.5, need_masks=False, **options)[0]

    assert torch.equal(run(seed=1), run(seed=1))
    assert not torch.equal(run(seed=1), run(seed=2))
    assert not torch.equal(run(seed=1), run(seed=1 + 2**32))  # both words of the seed count
    torch.manual_seed(4)
    first, second = run(), run()
    torch.manual_seed(4)
    assert torch.equal(run(), first) and torch.equal(run(), second) and not torch.equal(first, second)


# --- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("need_masks", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_opcheck(backend, need_masks, dropout_p):
    q, k, v = (x.requires_grad_() for x in _inputs((2, 2, 5, 9, 8)))
    _skip_unless_possible(backend, q)
    seed = torch.tensor(9) if dropout_p else None
    with use_backend(backend):
        torch.library.opcheck(torch.ops.zs3fast.attention_to_mask, (q, k, v, 0.3, dropout_p, seed, need_masks))
        output, masks, lse = torch.ops.zs3fast.attention_to_mask(q, k, v, 0.3, dropout_p, seed, need_masks)
        grads = torch.randn_like(output), torch.randn_like(masks) if need_masks else None
        args = (*grads, q, k, v, output, lse, 0.3, dropout_p, seed)
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        torch.library.opcheck(torch.ops.zs3fast.attention_to_mask_backward, args)


def test_gradcheck_of_reference_and_of_the_explicit_backward():
    q, k, v = (x.double().requires_grad_() for x in _inputs((2, 2, 3, 5, 4)))
    for call in (reference, attention_to_mask):  # float64 runs on the reference backend, with its explicit backward
        for p in (0.0, 0.4):
            inputs = (q, k, v)
            assert torch.autograd.gradcheck(lambda *x: call(*x, 0.7, dropout_p=p, seed=2), inputs, fast_mode=True)  # noqa: B023


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_and_draws_seeds(compiler):
    q, k, v = (x.requires_grad_() for x in _inputs((1, 2, 6, 20, 8)))

    def step(q, k, v, p, seed):
        output, masks = attention_to_mask(q, k, v, 0.3, dropout_p=p, seed=seed)
        alone = attention_to_mask(q, k, None, 0.3)[1]
        return output.transpose(1, 2).flatten(2).sin().sum() + (masks * alone).sum()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for p, seed in ((0.0, None), (0.2, 7)):
        want, got = step(q, k, v, p, seed), compiled(q, k, v, p, seed)
        torch.testing.assert_close(got, want)
        for g, w in zip(torch.autograd.grad(got, (q, k, v)), torch.autograd.grad(want, (q, k, v)), strict=True):
            torch.testing.assert_close(g, w)
    torch.manual_seed(1)
    first, second = compiled(q, k, v, 0.2, None), compiled(q, k, v, 0.2, None)
    torch.manual_seed(1)
    assert torch.equal(compiled(q, k, v, 0.2, None), first) and not torch.equal(first, second)


def test_exports_with_any_number_of_classes():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention_to_mask(q, k, v, 0.3)

    q, k, v = _inputs((2, 2, 6, 20, 8))
    shapes = {"q": {2: torch.export.Dim.DYNAMIC}, "k": None, "v": None}
    program = torch.export.export(Module(), (q, k, v), dynamic_shapes=shapes)
    assert "zs3fast.attention_to_mask" in str(program.graph)
    more = torch.randn(2, 2, 11, 8)
    for got, want in zip(program.module()(more, k, v), attention_to_mask(more, k, v, 0.3), strict=True):
        torch.testing.assert_close(got, want)


def test_autocast_casts_and_keeps_gradients_in_fp32():
    q, k, v = (x.requires_grad_() for x in _inputs((1, 2, 6, 20, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, masks = attention_to_mask(q, k.double().float(), v.bfloat16(), 0.3)
        alone = attention_to_mask(q, k, None, 0.3)[1]
    assert output.dtype == masks.dtype == alone.dtype == torch.bfloat16
    (output.float().sum() + masks.float().sum()).backward()
    assert q.grad.dtype == torch.float32 and q.grad.norm() > 0


# --- errors ----------------------------------------------------------------------------------------------------------


def _ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


GOOD = {"q": _ones(2, 3, 4, 8), "k": _ones(2, 3, 5, 8), "v": _ones(2, 3, 5, 8), "scale": 1.0}


@pytest.mark.parametrize(
    ("wrong", "error", "named"),
    [
        ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
        ({"k": None}, TypeError, "k: expected a tensor, got NoneType"),
        (
            {"q": _ones(2, 3, 4, 8, dtype=torch.int64)},
            TypeError,
            "q: expected a floating-point tensor, got torch.int64",
        ),
        ({"q": _ones(3, 4, 8)}, ValueError, r"q: expected \[B, heads, tokens, dh\], got shape \[3, 4, 8\]"),
        ({"v": _ones(3, 5, 8)}, ValueError, r"v: expected \[B, heads, tokens, dh\]"),
        (
            {"k": _ones(2, 3, 5, 8, dtype=torch.float64)},
            TypeError,
            "k: expected q's dtype torch.float32, got torch.float64",
        ),
        ({"k": _ones(2, 3, 5, 8).to("meta")}, ValueError, "k: expected q's device cpu, got meta"),
        ({"q": _ones(2, 0, 4, 8)}, ValueError, "q: expected at least one head"),
        ({"q": _ones(2, 3, 4, 0)}, ValueError, "q: expected at least one head of at least one column"),
        ({"k": _ones(1, 3, 5, 8)}, ValueError, r"k: expected \[2, 3, N >= 1, 8\] to fit q, got shape \[1, 3, 5, 8\]"),
        ({"k": _ones(2, 1, 5, 8)}, ValueError, "k: expected"),
        ({"k": _ones(2, 3, 5, 7)}, ValueError, "k: expected"),
        ({"k": _ones(2, 3, 0, 8)}, ValueError, "k: expected"),
        ({"v": _ones(2, 3, 6, 8)}, ValueError, r"v: expected k's shape \[2, 3, 5, 8\], got \[2, 3, 6, 8\]"),
        ({"v": None, "need_masks": False}, ValueError, "nothing to compute"),
        ({"scale": "1"}, TypeError, "scale: expected a number, got str"),
        ({"dropout_p": None}, TypeError, "dropout_p: expected a number, got NoneType"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a number in"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p: expected a number in"),
        ({"seed": 1.0}, TypeError, "seed: expected an int or None, got float"),
        ({"seed": -1}, ValueError, "seed: expected a number in"),
        ({"seed": 2**63}, ValueError, "seed: expected a number in"),
    ],
)
def test_errors_name_the_argument(wrong, error, named):
    with pytest.raises(error, match=f"attention_to_mask: .*{named}"):
        attention_to_mask(**{**GOOD, **wrong})


def test_a_backend_that_cannot_says_why():
    q, k, v = (x.double() for x in _inputs((1, 1, 2, 3, 4)))
    for backend in ("cpp", "triton"):
        with use_backend(backend), pytest.raises(RuntimeError, match=f"backend '{backend}' cannot take this request"):
            attention_to_mask(q, k, v, 1.0)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_nan_that_dropout_drops_stays(backend: str) -> None:
    """A NaN in a query makes its row NaN, whichever of its probabilities are dropped."""
    q, k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    q[0, 1, 2, 5] = float("nan")
    for seed in range(8):  # of the one probability of the row, some seeds drop it
        with use_backend(backend):
            out, _ = attention_to_mask(q, k, v, 0.3, dropout_p=0.5, seed=seed)
        assert out[0, 1, 2].isnan().all() and int(out.isnan().sum()) == 8


@pytest.mark.parametrize("need_masks", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_what_a_gpu_runs_without_dropout(dtype, need_masks):
    q, k, v = _inputs((2, 3, 37, 70, 16), dtype)
    got = _torch_attention(q, k, v, 0.25, need_masks)
    assert_within_budget(
        "output, mask_logits", tuple(x for x in got if x is not None),
        lambda *args: tuple(x for x in reference(*args, 0.25, need_masks=need_masks) if x is not None), q, k, v,
    )  # fmt: skip
    q[0, 1, 3, 2] = float("nan")
    output, masks = _torch_attention(q, k, v, 0.25, need_masks)
    assert output.isnan().any(-1).nonzero().tolist() == [[0, 1, 3]]
    assert masks is None or masks.isnan().any(-1).nonzero().tolist() == [[0, 3]]


def _on_a_gpu(dtype: torch.dtype, **options: object) -> tuple[bool, bool]:
    """Whether a call on GPU tensors (without memory) asks torch for attention, and whether it asks our op."""
    ours, torchs = [], []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ours.append(func.name().startswith("zs3fast::"))
            return func(*args, **(kwargs or {}))

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            torchs.append(func is torch.nn.functional.scaled_dot_product_attention)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(2, 3, n, 64, dtype=dtype, device="cuda") for n in (37, 70, 70))
        with Operators(), Functions():
            output, masks = attention_to_mask(q, k, v, 0.125, **options)
    assert output.shape == q.shape and output.device.type == "cuda"
    assert (masks is None) == (not options.get("need_masks", True))
    return any(torchs), any(ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_a_gpu_runs_the_kernels_for_dropout_alone(dtype):
    assert _on_a_gpu(dtype, dropout_p=0.1, need_masks=False) == (False, True)
    assert _on_a_gpu(dtype, need_masks=False) == (True, False)
    assert _on_a_gpu(dtype) == (True, False)
    with use_backend("triton"):
        assert _on_a_gpu(dtype) == (False, True)
