"""add_layer_norm: the kernel against float64, when `auto` leaves it to torch, and the encoder's block on it."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ops.budget import assert_within_budget
from zs3fast.encoders.clip_vit import Attention, Block
from zs3fast.encoders.config import ClipVisionConfig
from zs3fast.ops import _dispatch, add_layer_norm, use_backend
from zs3fast.ops.add_layer_norm import MANY, runs_kernel
from zs3fast.utils.recording import is_recording, recording

SHAPES = [(1, 768), (5, 3, 32), (2, 1), (7, 129), (0, 4, 16), (33,), (2, 1025)]
SMALL = ClipVisionConfig(width=32, layers=1, heads=2, patch_size=8, image_size=16, embed_dim=16, mlp_width=64)


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, offset: float = 0.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, *shape, generator=generator)
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    return x.to(dtype), (residual + offset).to(dtype), weight.to(dtype), bias.to(dtype)


def wide_steps(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """In float64 from the sum as it is stored."""
    total = (residual + x).double()
    return total, F.layer_norm(total, weight.shape, weight.double(), None if bias is None else bias.double(), eps)


@pytest.mark.parametrize("backend", ["reference", "triton", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    x, residual, weight, bias = make(shape, dtype)
    for given in (bias, None):
        with use_backend(backend):
            got = add_layer_norm(x, residual, weight, given, 1e-5)
        if backend == "triton" and dtype == torch.bfloat16:  # its interpreter cuts digits off
            assert_within_budget("sum", got[0], torch.add, x, residual)
        else:
            assert torch.equal(got[0], residual + x)
        assert got[1].dtype == dtype and got[1].is_contiguous()
        total, rows = got[0], x.shape[-1:]
        assert_within_budget("normed", got[1], F.layer_norm, total, rows, weight, given, 1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_mean_far_from_zero(backend: str) -> None:
    """The variance is of what is left of the mean, not a difference of squares."""
    x, residual, weight, bias = make((4, 768), offset=1000.0)
    with use_backend(backend):
        _, normed = add_layer_norm(x, residual, weight, bias)
    want = wide_steps(x, residual, weight, bias, 1e-5)[1]
    assert (normed.double() - want).norm() / want.norm() < 1e-4  # the mean itself is rounded, to 6e-5


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_gradients_are_torch_s(backend: str) -> None:
    """Whatever backend is asked for, a recorded call is differentiable."""
    leaves = [t.double().requires_grad_() for t in make((3, 8))]
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *t: add_layer_norm(*t), leaves)


def test_what_is_refused() -> None:
    x, residual, weight, bias = make((3, 8))
    for arguments, message in [
        ((x, residual[:2], weight, bias), r"residual: expected x's shape \[3, 8\], got \[2, 8\]"),
        ((x, residual, weight[:7], bias), r"x: expected \[..., 7\] by the weight, got \[3, 8\]"),
        ((x, residual, weight, bias[:7]), r"bias: expected \[8\], got \[7\]"),
        ((x, residual, weight[None], bias), r"weight: expected \[width\] of at least one column, got \[1, 8\]"),
    ]:
        with pytest.raises(ValueError, match=f"^add_layer_norm: {message}"):
            add_layer_norm(*arguments)
    with pytest.raises(TypeError, match="^add_layer_norm: residual: expected x's dtype torch.float32, got torch.float"):
        add_layer_norm(x, residual.half(), weight, bias)
    with pytest.raises(TypeError, match="^add_layer_norm: eps: expected a number, got str"):
        add_layer_norm(x, residual, weight, bias, "1e-5")  # type: ignore[arg-type]


def test_when_auto_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU while a graph is recorded, or for many rows; never where a gradient is recorded. No GPU is asked."""
    module = sys.modules["zs3fast.ops.add_layer_norm"]  # the name in `zs3fast.ops` is the function's

    class OnGpu:
        type = "cuda"

    class Tokens(Tensor):  # a CPU tensor that says it is on a GPU
        device = OnGpu()  # type: ignore[assignment]

    monkeypatch.setattr(module, "_triton_objections", lambda *_: [])
    monkeypatch.setattr(module._matmul, "autocasting", lambda _: False)
    x, _, weight, bias = make((2, 8))
    few, many = x.as_subclass(Tokens), torch.empty(1, device="meta").expand(MANY // 8, 8).as_subclass(Tokens)
    with torch.no_grad():
        assert not module._by_op(few, few, weight, bias) and module._by_op(many, many, weight, bias)
        with recording():
            assert module._by_op(few, few, weight, bias)
            assert not module._by_op(x, x, weight, bias)  # on the CPU
    with recording():
        assert not module._by_op(few, few, weight.requires_grad_(), bias)


def test_recording_is_the_thread_s() -> None:
    seen = []
    with recording():
        thread = threading.Thread(target=lambda: seen.append(is_recording()))
        thread.start()
        thread.join()
        assert is_recording()
    assert seen == [False] and not is_recording()


def block() -> Block:
    torch.manual_seed(0)
    made = Block(SMALL)
    for norm in (made.ln_1, made.ln_2):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return made.eval()


@torch.no_grad()
def test_block_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results, and the op is really asked."""
    made, x = block(), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    context = made.context(x[:1, :3])
    calls: list[str] = []
    call = _dispatch.call
    monkeypatch.setattr(_dispatch, "call", lambda name, *args: (calls.append(name), call(name, *args))[1])
    with use_backend("reference"):
        want = made.double()(x.double(), tuple(c.double() for c in context))
    made.float()
    calls.clear()
    plain = made(x, context)
    assert "add_layer_norm" not in calls  # on the CPU the residual rides on the output projection
    with use_backend("triton"):
        if _dispatch.objections("add_layer_norm", "triton", x):
            pytest.skip("Triton's kernels do not run here")
        got = made(x, context)
        assert calls.count("add_layer_norm") == 1
        hook = made.ln_2.register_forward_hook(lambda *_: None)
        assert not runs_kernel(x, made.ln_2)  # who looks at a norm sees it run
        hook.remove()
    for out in (plain, got):
        assert (out.double() - want).norm() / want.norm() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attend", [False, True])
def test_keys_and_values_in_place(attend: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU for one image: the projection is written behind the context's keys and values."""
    torch.manual_seed(0)
    attention = Attention(32, 2)
    nn.init.normal_(attention.in_proj_bias)
    x, rows = torch.randn(1, 9, 32), torch.randn(1, 3, 32)
    context = attention.context_keys_values(rows)
    kept = [c.clone() for c in context]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert k.shape == v.shape == (1, 2, 12, 16) and q.shape == (1, 2, 9, 16)
        return F.scaled_dot_product_attention(q, k, v)

    want = attention(x, context, plain)
    joined = []
    in_place = attention._joined
    monkeypatch.setattr(Attention, "_joins_in_place", lambda *_: True)
    monkeypatch.setattr(Attention, "_joined", lambda self, *args: joined.append(1) or in_place(*args))
    got = attention(x, context, plain if attend else None)
    assert joined and (got - want).norm() / want.norm() < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(kept, context, strict=True))  # prompts' own are kept for other calls


def test_keys_and_values_are_joined_otherwise_here() -> None:
    attention, x = Attention(32, 2), torch.randn(1, 9, 32)
    with torch.no_grad():
        assert not attention._joins_in_place(x, attention.context_keys_values(x))
