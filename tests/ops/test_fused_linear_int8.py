"""fused_linear_int8: every kernel against whole numbers in float64, rounding for rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import software_tiles
from tests.ops.budget import assert_within_budget
from zs3fast.ops import _extension, fused_linear_int8, use_backend
from zs3fast.ops.fused_linear import ACTIVATIONS
from zs3fast.ops.fused_linear_int8 import kernels, quantize_rows, quantize_weight, reference

needs_cpp = pytest.mark.skipif(bool(_extension.objections()), reason="; ".join(_extension.objections()))
KERNELS = ("avx512_vnni", "amx", software_tiles.NAME)
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [  # rows of x, out, in
    ((1,), 32, 64),
    ((2, 32), 96, 64),  # a whole block
    ((65,), 128, 1088),  # one row more; a panel and a third; two steps of depth and a part
    ((3, 5, 2), 32, 320),
    ((17,), 224, 64),
    ((33,), 64, 192),
    ((130,), 192, 512),  # three blocks, so that tasks of one panel share its sums
    ((0, 4), 32, 64),
    ((), 64, 64),
]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def ids(value: object) -> str | None:
    return str(value).removeprefix("torch.").replace(" ", "")


def make(
    shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype, bias: bool = True, residual: bool = True
) -> Inputs:
    """x, weight, scale, bias, residual; rows of x are of many sizes, and not about 0."""
    rows, out, depth = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x = (draw(*rows, depth) + draw(*rows, 1)) * draw(*rows, 1).exp()
    weight, scale = quantize_weight(2 * depth**-0.5 * draw(out, depth) / x.abs().mean().nan_to_num(1))
    return (
        x.to(dtype),
        weight,
        scale,
        draw(out).to(dtype) if bias else None,
        draw(*rows, out).to(dtype) if residual else None,
    )


def steps(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    return reference(x, weight, scale, bias, activation=activation, residual=residual)


def by(kernel: str, *inputs: Tensor | None, activation: str = "none") -> Tensor:
    """By a kernel of this name; AMX's loops where the rest of them runs."""
    emulated = kernel == software_tiles.NAME
    if ("avx512_vnni" if emulated else kernel) not in kernels():
        pytest.skip(f"{kernel} does not run on this machine, which has {', '.join(kernels()) or 'none'}")
    index = ACTIVATIONS.index(activation)
    if emulated:
        return software_tiles.fused_linear_int8(*inputs, index)
    out: Tensor = torch.ops.zs3fast_cpp.fused_linear_int8_by(*inputs, index, kernel)
    return out


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_every_kernel(shape: tuple, activation: str, kernel: str, dtype: torch.dtype) -> None:
    for extras in ((True, True), (False, False), (True, False)):
        inputs = make(shape, dtype, *extras)
        got = by(kernel, *inputs, activation=activation)
        assert_within_budget(kernel, got, steps, *inputs, activation=activation, fp32=2e-6)


@needs_cpp
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_are_exact(kernel: str) -> None:
    """Whole numbers of every size, the extremes of both sides among them, at the depth where int32 is nearly full."""
    generator = torch.Generator().manual_seed(1)
    for depth in (64, 512, 65536):
        rows = 2 if depth > 512 else 70
        codes = torch.randint(0, 256, (rows, depth), generator=generator)
        codes[:, 0], codes[:, 1] = 0, 255  # so that x is its own code: scale 1, zero point 0
        codes[1, 2:] = 255
        weight = torch.randint(-127, 128, (32, depth), generator=generator).to(torch.int8)
        weight[0], weight[1], weight[2] = 127, -127, -128
        got = by(kernel, codes.float(), weight, torch.ones(32), None, None)
        whole = codes.double() @ weight.double().mT
        assert torch.equal(got, whole.float())
        shifted = by(kernel, codes.float() - 128, weight, torch.ones(32), None, None)  # zero point 128
        assert torch.equal(shifted, ((codes.double() - 128) @ weight.double().mT).float())


def test_rounding_costs_what_eight_bits_cost() -> None:
    """Of a plain product: under half a step of each side a factor, and right on a grid of 8 bits."""
    x, weight = torch.randn(40, 256, dtype=torch.float64), torch.randn(48, 256, dtype=torch.float64)
    codes, scale = quantize_weight(weight)
    assert ((codes * scale[:, None] - weight).abs() <= 0.5001 * weight.abs().amax(1, keepdim=True) / 127).all()
    whole, row_scale = quantize_rows(x)
    assert torch.equal(whole, whole.round()) and (whole.amax(1) - whole.amin(1) <= 255).all()
    assert ((whole * row_scale - x).abs() <= 1.001 * row_scale).all()
    got = fused_linear_int8(x, codes, scale)
    assert 1e-3 < (got - x @ weight.mT).norm() / (x @ weight.mT).norm() < 0.02
    one_sided = x.abs()  # as after an activation: all 256 steps are on one side
    whole, row_scale = quantize_rows(one_sided)
    assert whole.min() >= 0 and whole.max() == 255
    assert ((whole * row_scale - one_sided).abs() <= 0.501 * row_scale).all()


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_rows_out_of_the_ordinary(dtype: torch.dtype) -> None:
    """Zeros, all alike, one sign, tiny, huge, NaN and infinite: each stays in its row."""
    if not kernels():
        pytest.skip("no kernel on this machine")
    _, weight, scale, bias, _ = make(((1,), 64, 128), dtype)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(12, 128, generator=generator)
    factors = (0.0, 1.0, 1e-37, 1e-40, 1e-30, 1e30, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    x = rows * torch.tensor(factors).unsqueeze(1)
    x[1], x[6], x[7] = 3.0, rows[6].abs(), -rows[7].abs()
    x[8, 17], x[9, 127], x[10, 0] = float("nan"), float("inf"), -float("inf")
    x[11], x[11, 0], x[11, 1] = 0.0, 3e38, -3e38  # a spread beyond float32
    got = torch.ops.zs3fast_cpp.fused_linear_int8(x.to(dtype), weight, scale, bias, None, 0)
    want = reference(x.to(dtype).double(), weight, scale, bias)
    assert want[8:].isnan().all() and not want[:8].isnan().any()
    assert torch.equal(got.isnan(), want.isnan())
    allowed = (1e-5 if dtype == torch.float32 else 5e-3) * want[:8].abs().amax(1, keepdim=True)
    assert ((got[:8].double() - want[:8]).abs() <= allowed).all()
    assert torch.equal(got[0], bias)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=ids)
def test_backends(backend: str, dtype: torch.dtype) -> None:
    """`auto` takes any size and type: what the kernel objects to, the reference does."""
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(5, 7, generator=generator).to(dtype), torch.randn(12, 7, generator=generator)
    codes, scale = quantize_weight(weight)
    with use_backend(backend):
        for inputs in ((x, codes, scale, None, None), make(SHAPES[2], dtype)):
            got = fused_linear_int8(*inputs[:4], activation="gelu", residual=inputs[4])
            assert got.dtype == dtype
            assert_within_budget(backend, got, steps, *inputs, activation="gelu")


def test_named_backends_refuse() -> None:
    _, weight, scale, *_ = make(((1,), 32, 32), torch.float32)
    with (
        use_backend("cpp"),
        pytest.raises(RuntimeError, match="cannot take this request.*multiples of 32 and 64"),
    ):
        fused_linear_int8(torch.zeros(1, 32), weight, scale)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_layouts(dtype: torch.dtype) -> None:
    if not kernels():
        pytest.skip("no kernel on this machine")
    x, weight, scale, bias, residual = make(((2, 9), 64, 128), dtype)
    with use_backend("cpp"):
        expected = fused_linear_int8(x, weight, scale, bias, residual=residual)
        for name, (a, w, s, r) in {
            "weight by columns": (x, weight.t().contiguous().t(), scale, residual),
            "weight rows of a wider one": (x, torch.cat([weight, weight], 1)[:, :128], scale, residual),
            "weight and scale in the middle": (
                x,
                torch.cat([weight[:3], weight, weight])[3:67],
                scale.repeat_interleave(2)[::2],
                residual,
            ),
            "x transposed": (x.transpose(0, 1).contiguous().transpose(0, 1), weight, scale, residual),
            "x by columns": (x.transpose(0, 2).contiguous().transpose(0, 2), weight, scale, residual),
            "residual transposed": (x, weight, scale, residual.transpose(0, 1).contiguous().transpose(0, 1)),
        }.items():
            assert torch.equal(fused_linear_int8(a, w, s, bias, residual=r), expected), name


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_more_rows_than_are_packed_at_a_time(dtype: torch.dtype) -> None:
    """What a thread keeps holds 65536 columns of some 200 rows."""
    if not kernels():
        pytest.skip("no kernel on this machine")
    inputs = make(((300,), 32, 65536), dtype)
    x, weight, scale, bias, residual = inputs
    got = torch.ops.zs3fast_cpp.fused_linear_int8(x, weight, scale, bias, residual, 0)
    assert_within_budget("parts", got, steps, *inputs, "none")


def test_autocast_changes_nothing() -> None:
    x, weight, scale, bias, _ = make(SHAPES[2], torch.float32)
    expected = fused_linear_int8(x, weight, scale, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_linear_int8(x, weight, scale, bias), expected)


def test_weights_that_are_no_numbers() -> None:
    assert torch.equal(quantize_weight(torch.zeros(2, 3))[0], torch.zeros(2, 3, dtype=torch.int8))
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight: expected finite numbers to quantise"):
            quantize_weight(torch.tensor([[1.0, wrong]]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 5)}, ValueError, r"x: expected \[..., 4\] by the weight, got \[3, 5\]"),
        ({"weight": torch.zeros(6, 4)}, TypeError, "weight: expected int8, got torch.float32"),
        ({"weight": torch.zeros(4).char()}, ValueError, r"weight: expected \[out, in\] with in from 1 to 65536, got"),
        ({"weight": torch.zeros(6, 0).char(), "x": torch.zeros(3, 0)}, ValueError, r"weight: .*got \[6, 0\]"),
        ({"scale": torch.zeros(5)}, ValueError, r"scale: expected \[6\], got \[5\]"),
        ({"scale": torch.zeros(6).int()}, TypeError, "scale: expected floating point, got torch.int32"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected \[6\], got \[5\]"),
        ({"bias": torch.zeros(6).double()}, TypeError, "bias: expected x's dtype torch.float32"),
        ({"residual": torch.zeros(6)}, ValueError, r"residual: expected \[3, 6\], got \[6\]"),
        ({"activation": "swish"}, ValueError, "activation: expected one of none, quick_gelu, gelu, relu, got 'swish'"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "x: expected floating point, got torch.int64"),
        ({"scale": None}, TypeError, "scale: expected a tensor, got NoneType"),
        ({"x": torch.zeros(3, 4).to_sparse()}, TypeError, "x: expected a dense tensor, got torch.sparse_coo"),
        ({"bias": torch.zeros(6).to_sparse()}, TypeError, "bias: expected a dense tensor, got torch.sparse_coo"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.zeros(3, 4),
        "weight": torch.zeros(6, 4).char(),
        "scale": torch.ones(6),
        "bias": torch.zeros(6),
    }
    with pytest.raises(error, match=message):
        fused_linear_int8(**(arguments | change))


@needs_cpp
def test_below_the_public_function_shapes_are_checked_too() -> None:
    x, weight, scale, bias, residual = make(((4,), 64, 128), torch.float32)
    run = torch.ops.zs3fast_cpp.fused_linear_int8
    for wrong in (
        (x[:, :64], weight, scale, bias, residual, 0),
        (x, weight[:60], scale[:60], bias[:60], residual[:, :60], 0),
        (x[:, :96], weight[:, :96], scale, bias, residual, 0),
        (x, weight, scale[:4], bias, residual, 0),
        (x, weight, scale.double(), bias, residual, 0),
        (x, weight, scale, bias[:4], residual, 0),
        (x, weight, scale, bias, residual[:2], 0),
        (x, weight.float(), scale, bias, residual, 0),
        (x, weight, scale, bias, residual, 4),
        (x.double(), weight, scale, bias.double(), residual.double(), 0),
    ):
        with pytest.raises(RuntimeError, match="fused_linear_int8"):
            run(*wrong)
