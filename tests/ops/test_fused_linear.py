"""fused_linear: every kernel against the steps in float64, and when `auto` leaves it to torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import software_tiles
from tests.ops.budget import assert_within_budget
from zs3fast.ops import _dispatch, _extension, fused_linear, use_backend
from zs3fast.ops import fused_linear as public
from zs3fast.ops.fused_linear import ACTIVATIONS, _measured_faster, kernels, reference

op = torch.ops.zs3fast.fused_linear
needs_cpp = pytest.mark.skipif(bool(_extension.objections()), reason="; ".join(_extension.objections()))
KERNELS = [
    ("avx512", torch.float32),
    *((name, torch.bfloat16) for name in ("amx", "amx_emulated", "avx512_bf16")),
]
SHAPES = [  # rows of x, out, in
    ((1,), 32, 32),
    ((2, 32), 96, 64),  # a whole block
    ((65,), 128, 544),  # one row more; a panel and a third; two steps of depth and a part
    ((3, 5, 2), 32, 320),
    ((17,), 224, 32),
    ((33,), 64, 96),
    ((0, 4), 32, 64),
    ((), 64, 32),
]


def ids(value: object) -> str | None:
    return str(value).removeprefix("torch.").replace(" ", "")


def make(
    shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype, bias: bool = True, residual: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    rows, out, depth = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(dtype)

    weight = draw(out, depth, scale=2 * depth**-0.5)
    return draw(*rows, depth), weight, draw(out) if bias else None, draw(*rows, out) if residual else None


def steps(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    return reference(x, weight, bias, activation=activation, residual=residual)


@needs_cpp
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS, ids=ids)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_every_kernel(shape: tuple, activation: str, kernel: str, dtype: torch.dtype) -> None:
    emulated = kernel == software_tiles.NAME  # AMX's loops, where the rest of them runs
    if ("avx512_bf16" if emulated else kernel) not in kernels(dtype):
        pytest.skip(f"{kernel} does not run on this machine, which has {', '.join(kernels(dtype)) or 'none'}")
    for extras in ((True, True), (False, False), (True, False)):
        inputs = make(shape, dtype, *extras)
        if emulated:
            got = software_tiles.fused_linear(*inputs, ACTIVATIONS.index(activation))
        else:
            got = torch.ops.zs3fast_cpp.fused_linear_by(*inputs, ACTIVATIONS.index(activation), kernel)
        assert_within_budget(kernel, got, steps, *inputs, activation=activation)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpp", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=ids)
def test_backends(backend: str, dtype: torch.dtype) -> None:
    """Named ones too: what has no kernel of it, or objects, leaves it to torch."""
    for shape in (SHAPES[2], ((5,), 12, 7)):
        x, weight, bias, residual = make(shape, dtype)
        with use_backend(backend):
            got = fused_linear(x, weight, bias, activation="quick_gelu", residual=residual)
        assert_within_budget(backend, got, steps, x, weight, bias, residual, activation="quick_gelu")


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_activations_far_out(dtype: torch.dtype) -> None:
    """Where the exponential is infinite, or nothing; NaN stays in its row."""
    if not kernels(dtype):
        pytest.skip("no kernel on this machine")
    values = torch.tensor([-1e4, -200.0, -90.0, -20.0, -6.0, -1.0, -0.0, 0.0, 1.0, 6.0, 90.0, 1e4, float("nan")])
    x = torch.zeros(13, 32).to(dtype)
    x[:, 0] = values.to(dtype)
    weight = torch.zeros(32, 32).to(dtype)
    weight[:, 0] = 1
    for activation in ("quick_gelu", "gelu"):
        got = torch.ops.zs3fast_cpp.fused_linear(x, weight, None, None, ACTIVATIONS.index(activation))
        expected = reference(x.double(), weight.double(), activation=activation)
        assert torch.equal(got.isnan(), expected.isnan())
        error = (got.double() - expected)[:-1].abs()
        assert (
            error <= 2e-6 + 1e-2 * (dtype == torch.bfloat16) * expected[:-1].abs() + 1e-6 * expected[:-1].abs()
        ).all()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_layouts(dtype: torch.dtype) -> None:
    x, weight, bias, residual = make(((2, 9), 64, 96), dtype)
    with use_backend("cpp"):
        expected = fused_linear(x, weight, bias, residual=residual)
        sliced = torch.cat([x, x], 1)[:, 3:12].roll(3, 1)
        for name, (a, w, r) in {
            "weight by columns": (x, weight.t().contiguous().t(), residual),
            "weight rows of a wider one": (x, torch.cat([weight, weight], 1)[:, :96], residual),
            "weight in the middle": (x, torch.cat([weight[:3], weight, weight])[3:67], residual),
            "x transposed": (x.transpose(0, 1).contiguous().transpose(0, 1), weight, residual),
            "x by columns": (x.transpose(0, 2).contiguous().transpose(0, 2), weight, residual),
            "residual transposed": (x, weight, residual.transpose(0, 1).contiguous().transpose(0, 1)),
        }.items():
            assert torch.equal(fused_linear(a, w, bias, residual=r), expected), name
        assert sliced.shape == x.shape
        one = residual[:1, :1].expand_as(residual)
        assert_within_budget(
            "broadcast", fused_linear(x, weight, bias, residual=one), steps, x, weight, bias, one, "none"
        )


def test_no_input_columns_leave_the_bias() -> None:
    x, weight, bias = torch.zeros(3, 0), torch.zeros(32, 0), torch.arange(32.0)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            got = public(x.to(dtype), weight.to(dtype), bias.to(dtype), residual=torch.ones(3, 32, dtype=dtype))
            assert torch.equal(got, (bias + 1).to(dtype).expand(3, 32))


@needs_cpp
def test_new_weights_are_seen_at_once() -> None:
    """Nothing of them is kept: in place, by .data, by load_state_dict, in inference mode."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, _ = make(SHAPES[2], dtype)
        with torch.inference_mode(), use_backend("cpp"):
            weight = weight.clone()
            before = fused_linear(x, weight, bias)
            weight.mul_(2)
            assert torch.allclose(fused_linear(x, weight, None), 2 * (before - bias), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str) -> None:
    inputs = [t.double().requires_grad_() for t in make(((2, 3), 5, 4), torch.float64)]
    index = ACTIVATIONS.index(activation)
    with use_backend("reference"):
        torch.autograd.gradcheck(lambda *a: op(*a, index), inputs)
        torch.autograd.gradcheck(lambda x, w: op(x, w, None, None, index), inputs[:2])


def test_compiled_is_left_to_the_compiler() -> None:
    inputs = make(SHAPES[2], torch.float32)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list) -> object:
        graphs.append(str(graph.code))
        return graph

    with torch.inference_mode():
        got = torch.compile(steps, fullgraph=True, backend=backend)(*inputs, "quick_gelu")
        compiled = torch.compile(public, fullgraph=True, backend=backend)
        assert torch.allclose(compiled(*inputs[:3], activation="quick_gelu", residual=inputs[3]), got, atol=1e-5)
    assert "zs3fast" not in graphs[-1]


def test_autocast_is_torchs_own() -> None:
    x, weight, bias, residual = make(SHAPES[2], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_linear(x, weight, bias).dtype == torch.bfloat16
        assert fused_linear(x, weight, bias, residual=residual).dtype == torch.float32


@needs_cpp
def test_auto_takes_the_kernel_where_it_was_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, _ = make(SHAPES[2], torch.float32)
    seen, call = [], _dispatch.call
    monkeypatch.setattr(_dispatch, "call", lambda *a: seen.append(_dispatch.choose(*a)) or call(*a))
    fused_linear(x, weight, bias)
    assert seen == ["cpp"] * _measured_faster(torch.float32)
    seen.clear()
    fused_linear(x, weight.requires_grad_(), bias).sum().backward()
    assert seen == [] and weight.grad is not None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 5)}, ValueError, r"x: expected \[..., 4\] by the weight, got \[3, 5\]"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight: expected \[out, in\], got \[4\]"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected \[6\], got \[5\]"),
        ({"residual": torch.zeros(6)}, ValueError, r"residual: expected \[3, 6\], got \[6\]"),
        ({"activation": "swish"}, ValueError, "activation: expected one of none, quick_gelu, gelu, relu, got 'swish'"),
        (
            {"x": torch.zeros(3, 4, dtype=torch.int64)},
            TypeError,
            "x: expected a floating-point tensor, got torch.int64",
        ),
        ({"bias": torch.zeros(6).double()}, TypeError, "bias: expected x's dtype torch.float32"),
        ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "bias": torch.zeros(6)}
    with pytest.raises(error, match=message):
        fused_linear(**(arguments | change))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_more_rows_than_are_packed_at_a_time(dtype: torch.dtype) -> None:
    """6.5 MiB are kept for packed rows: 8192 columns in float32 make that 192 of them."""
    if not kernels(dtype):
        pytest.skip("no kernel on this machine")
    inputs = make(((1100,), 32, 8192), dtype)
    for contiguous in (True, False):
        x, weight, bias, residual = inputs
        if not contiguous:
            x, residual = (torch.cat([t, t], 1)[:, : t.shape[1]] for t in (x, residual))
        got = torch.ops.zs3fast_cpp.fused_linear_by(x, weight, bias, residual, 0, kernels(dtype)[0])
        assert_within_budget(str(contiguous), got, steps, *inputs, "none")


@needs_cpp
def test_below_the_public_function_shapes_are_checked_too() -> None:
    x, weight, bias, residual = make(((4,), 64, 32), torch.float32)
    run = torch.ops.zs3fast_cpp.fused_linear
    for wrong in (
        (x[:, :16], weight, bias, residual, 0),
        (x, weight[:60], bias[:60], residual[:, :60], 0),
        (x, weight, bias[:4], residual, 0),
        (x, weight, bias, residual[:2], 0),
        (x, weight.bfloat16(), bias, residual, 0),
        (x, weight, bias, residual, 4),
        (x.double(), weight.double(), bias.double(), residual.double(), 0),
    ):
        with pytest.raises(RuntimeError, match="fused_linear"):
            run(*wrong)
