"""encoder_attention: every kernel of every instruction set against attention with all scores stored, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import software_tiles
from tests.ops.budget import assert_within_budget
from zs3fast.ops import _dispatch, _extension, encoder_attention, use_backend
from zs3fast.ops.encoder_attention import OP, kernels, reference

op = torch.ops.zs3fast.encoder_attention
needs_cpp = pytest.mark.skipif(bool(_extension.objections()), reason="; ".join(_extension.objections()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = [
    *((name, dtype) for name in ("avx512", "avx2", "default") for dtype in DTYPES),
    *((name, torch.bfloat16) for name in ("amx", "amx_emulated", "avx512_bf16")),
]
SMALL = [  # B, T, S, K, heads, dh
    (1, 1, 1, 0, 1, 1),
    (2, 67, 67, 10, 2, 64),
    (1, 64, 256, 0, 3, 64),  # whole blocks
    (2, 65, 257, 1, 1, 33),  # one more than whole blocks, dh odd
    (1, 5, 33, 300, 2, 80),  # a context of more than a block
    (3, 130, 31, 2, 2, 32),
    (1, 3, 2, 5, 1, 200),
    (0, 7, 7, 3, 2, 64),
    (2, 0, 4, 3, 2, 64),
    (1, 9, 9, 0, 2, 128),
]


def ids(value: object) -> str | None:
    if isinstance(value, tuple):
        return "B{}-T{}-S{}-K{}-heads{}-dh{}".format(*value)
    return str(value).removeprefix("torch.")


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, tuple | None]:
    """q, k, v and the context; where queries and keys are of one number, views of one packed projection."""
    B, T, S, K, heads, dh = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if T == S:
        q, k, v = draw(B, T, 3, heads, dh).unbind(2)
        q = q * 2
    else:
        q, (k, v) = 2 * draw(B, T, heads, dh), draw(B, S, 2, heads, dh).unbind(2)
    return q, k, v, (draw(1, K, heads, dh), draw(1, K, heads, dh)) if K else None


def names(dtype: torch.dtype) -> list[str]:
    """The kernels that run here: the extension's, and AMX's loops on tiles in software where the rest of them runs."""
    return kernels(dtype) + [software_tiles.NAME] * ("avx512_bf16" in kernels(dtype))


def run_by(kernel: str, q: Tensor, k: Tensor, v: Tensor, context: tuple | None, scale: float) -> Tensor:
    if kernel == software_tiles.NAME:
        return software_tiles.encoder_attention(q, k, v, *(context or (None, None)), scale)
    return torch.ops.zs3fast_cpp.encoder_attention_by(q, k, v, *(context or (None, None)), scale, kernel)


@needs_cpp
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS, ids=ids)
@pytest.mark.parametrize("shape", SMALL, ids=ids)
def test_every_kernel(shape: tuple[int, ...], dtype: torch.dtype, kernel: str) -> None:
    if kernel not in names(dtype):
        pytest.skip(f"{kernel} does not run {dtype} on this machine, which has {', '.join(kernels(dtype))}")
    q, k, v, context = make(shape, dtype)
    got = run_by(kernel, q, k, v, context, q.shape[-1] ** -0.5)
    assert got.dtype == dtype and got.is_contiguous()
    assert_within_budget(kernel, got, reference, q, k, v, context)


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SMALL, ids=ids)
def test_backends(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    inputs = make(shape, dtype)
    with use_backend(backend):
        got = encoder_attention(*inputs)
    assert_within_budget(backend, got, reference, *inputs)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_scale(scale: float, dtype: torch.dtype) -> None:
    q, k, v, context = make((1, 66, 300, 4, 2, 64), dtype)
    got = encoder_attention(q, k, v, context, scale)
    assert_within_budget("scale", got, lambda *a: reference(*a[:3], (a[3], a[4]), scale), q, k, v, *context)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("last", [0.0, 60.0])
def test_maximum_moves_between_blocks(dtype: torch.dtype, last: float) -> None:
    """Scores of hundreds, the largest in the first or in the last block: nothing overflows, nothing is forgotten."""
    q, k, v, _ = make((1, 64, 700, 0, 1, 64), dtype)
    k = k.clone()
    k[:, 690 if last else 5] += q[:, :1].mean(1) * 60
    for name in names(dtype):
        got = run_by(name, q, k, v, None, 1.0)
        assert_within_budget(name, got, lambda *a: reference(*a, scale=1.0), q, k, v)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("size", [1e4, 1e8, 1e15])
def test_scores_of_any_size(dtype: torch.dtype, size: float) -> None:
    """Scores of 1e9 to 1e31, whose roundings are larger than any exponent: the largest one wins."""
    q, k, v, _ = make((1, 40, 600, 0, 1, 64), dtype)
    q, k = q * size, k * size
    scores = q[0, :, 0].double() @ k[0, :, 0].double().mT
    (first, second), winner = scores.topk(2, -1).values.unbind(-1), scores.argmax(-1)
    clear = first - second > 1e-4 * scores.abs().amax(-1)
    assert clear.sum() > 20
    for name in names(dtype):
        got = run_by(name, q, k, v, None, 1.0)[0, :, 0]
        assert torch.equal(got[clear], v[0, winner, 0][clear]), name


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("start", [0, 256])
def test_scores_of_minus_infinity_count_for_nothing(dtype: torch.dtype, start: int) -> None:
    """Even where a whole block of keys, or of the context, has no other; where no key has, there is no answer."""
    q, k, v, context = make((1, 40, 600, 3, 1, 64), dtype)
    q, k = q.clone(), k.clone()
    q[..., 0] = q[..., 0].abs() + 0.1
    k[:, start : start + 256, :, 0] = context[0][..., 0] = -torch.inf
    seen = [i for i in range(600) if not start <= i < start + 256]
    for name in names(dtype):
        got = run_by(name, q, k, v, context, 0.125)
        assert_within_budget(name, got, lambda *a: reference(*a, scale=0.125), q, k[:, seen], v[:, seen])
        assert run_by(name, q, k[:, start : start + 256], v[:, :256], context, 0.125).isnan().all(), name


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_nan_stays_where_it_was_seen(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, context = make((1, 70, 70, 3, 2, 64), dtype)
        q, v = q.clone(), v.clone()
        q[0, 66, 1] = float("nan")
        v[0, 20, 0, 5] = float("nan")
        with use_backend(backend):
            bad = encoder_attention(q, k, v, context).isnan()
        expected = torch.zeros_like(bad)
        expected[0, 66, 1] = True
        expected[0, :, 0, 5] = True
        assert torch.equal(bad, expected)
        k = k.clone()
        k[0, 3, 0, 0] = float("nan")
        with use_backend(backend):
            bad = encoder_attention(q, k, v, context).isnan()
        assert bad[0, :, 0].all() and torch.equal(bad[0, :, 1], expected[0, :, 1])


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns apart": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    q, k, v, context = make((2, 67, 35, 6, 3, 20), dtype)
    expected = encoder_attention(q.contiguous(), k.contiguous(), v.contiguous(), context)
    laid = LAYOUTS[layout]
    got = encoder_attention(laid(q), laid(k), laid(v), tuple(map(laid, context)))
    assert torch.equal(got, expected)
    for x in (q, k, v):
        one_for_all = x[:1].expand_as(x)
        assert_within_budget("broadcast", encoder_attention(one_for_all, k, v), reference, one_for_all, k, v)


def test_context_of_its_own_for_each_image() -> None:
    q, k, v, _ = make((3, 40, 40, 0, 2, 32), torch.float32)
    context = torch.randn(2, 3, 4, 2, 32).unbind(0)
    assert_within_budget("context", encoder_attention(q, k, v, context), reference, q, k, v, context)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients(shared: bool) -> None:
    shape = (2, 5, 6, 3, 2, 4)
    q, k, v, context = make(shape, torch.float64)
    context = context if shared else tuple(x.expand(2, -1, -1, -1).clone() for x in context)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *context)]
    with use_backend("reference"):
        torch.autograd.gradcheck(lambda q, k, v, a, b: op(q, k, v, a, b, -0.7), leaves)
    public = encoder_attention(*leaves[:3], tuple(leaves[3:]), -0.7)
    through_op = op(*leaves, -0.7)
    grad = torch.randn_like(public)
    for name, a, b in zip(
        ("dq", "dk", "dv", "dcontext_k", "dcontext_v"),
        torch.autograd.grad(public, leaves, grad),
        torch.autograd.grad(through_op, leaves, grad),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12), name


def test_compiles_as_one_graph() -> None:
    inputs = make((1, 20, 20, 3, 2, 16), torch.float32)
    compiled = torch.compile(encoder_attention, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(*inputs), encoder_attention(*inputs))


@needs_cpp
def test_threads_agree_bit_for_bit() -> None:
    q, k, v, context = make((2, 200, 300, 3, 3, 64), torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(encoder_attention(q, k, v, context))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_autocast() -> None:
    inputs = make((1, 9, 9, 2, 2, 16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder_attention(*inputs).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ValueError, r"q: expected \[B, tokens, heads, dh\], got \[2, 3, 4\]"),
        ({"k": torch.zeros(2, 0, 2, 8)}, ValueError, "k: expected at least one key"),
        ({"v": torch.zeros(2, 5, 2, 8)}, ValueError, r"v: expected \[2, 6, 2, 8\], got \[2, 5, 2, 8\]"),
        ({"k": torch.zeros(2, 6, 2, 8, dtype=torch.float64)}, TypeError, "k: expected q's dtype"),
        ({"q": torch.zeros(2, 5, 2, 8, dtype=torch.int32)}, TypeError, "q: expected a floating-point tensor"),
        ({"context": torch.zeros(1)}, TypeError, "context: expected keys and values, got Tensor"),
        ({"context": (torch.zeros(3, 1, 2, 8),) * 2}, ValueError, r"context\[0\]: expected \[2, 1, 2, 8\] or \[1, 1"),
        ({"context": (torch.zeros(1, 2, 2, 8), torch.zeros(1, 1, 2, 8))}, ValueError, r"context\[1\]: expected"),
        ({"scale": True}, TypeError, "scale: expected a number or None, got bool"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"q": torch.zeros(2, 5, 2, 8), "k": torch.zeros(2, 6, 2, 8), "v": torch.zeros(2, 6, 2, 8)}
    with pytest.raises(error, match=message):
        encoder_attention(**(arguments | change))


@needs_cpp
def test_below_the_public_function_shapes_are_checked_too() -> None:
    q, k, v, context = make((2, 5, 6, 3, 2, 8), torch.float32)
    run = torch.ops.zs3fast_cpp.encoder_attention
    for wrong in ((q, k[:1], v), (q, k, v[:, :3]), (q, k, v.bfloat16()), (q[..., :4], k, v), (q, k[:, :0], v[:, :0])):
        with pytest.raises(RuntimeError, match="encoder_attention"):
            run(*wrong, None, None, 1.0)
    with pytest.raises(RuntimeError, match="both or neither"):
        run(q, k, v, context[0], None, 1.0)
    with pytest.raises(RuntimeError, match="kernel: expected one of"):
        torch.ops.zs3fast_cpp.encoder_attention_by(q, k, v, None, None, 1.0, "neon")


@needs_cpp
def test_auto_takes_the_kernel_only_where_no_gradient_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    call = _dispatch.call
    monkeypatch.setattr(_dispatch, "call", lambda *a: seen.append(_dispatch.choose(*a)) or call(*a))
    q, k, v, context = make((1, 9, 9, 2, 2, 16), torch.float32)
    encoder_attention(q, k, v, context)
    assert seen == ["cpp"]
    encoder_attention(q.requires_grad_(), k, v, context).sum().backward()
    assert seen == ["cpp"] and q.grad is not None
    with torch.no_grad():
        encoder_attention(q, k, v, context)
    assert seen == ["cpp", "cpp"] and OP in _dispatch.registered()
