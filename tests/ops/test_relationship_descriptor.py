"""relationship_descriptor: every backend against the reference, term cached or not; gradients by name; GPU code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.budget import assert_within_budget
from zs3fast.ops import _dispatch, relationship_descriptor, use_backend
from zs3fast.ops.relationship_descriptor import reference, text_term

SHAPES = [  # visual rows, C, D, D'
    ((1,), 1, 64, 64),
    ((3,), 2, 12, 20),
    ((2,), 171, 512, 512),
    ((2, 5), 171, 40, 24),
    ((1, 7), 847, 16, 9),
    ((1, 1), 1500, 8, 4),  # more classes than a chunk has rows
    ((700,), 3, 8, 5),  # more visual rows than a chunk has
]
SMALL = [((1,), 1, 8, 4), ((2, 3), 5, 12, 20), ((1,), 70, 80, 70)]  # Triton's interpreter takes a second for each
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("text", "visual", "weight", "bias")
CASES = [(b, s, d) for b in ("reference", "cpp") for s in SHAPES for d in DTYPES]
CASES += [("triton", s, d) for s in SMALL for d in DTYPES]


def _id(value: object) -> str:
    if isinstance(value, tuple):
        rows, C, D, wide = value
        return "-".join(f"{x}{n}" for x, n in zip("BM", rows, strict=False)) + f"-C{C}-D{D}-D'{wide}"
    return str(value).removeprefix("torch.")


def _inputs(shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, C, D, wide = shape
    torch.manual_seed(0)
    tensors = torch.randn(C, D), torch.randn(*rows, D), torch.randn(wide, 2 * D) / D**0.5, torch.randn(wide)
    return tuple(x.to(dtype) for x in tensors)


def _skip_unless_possible(backend: str, text: Tensor) -> None:
    with use_backend(backend):
        reasons = _dispatch.objections("relationship_descriptor", backend, text)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def _cached(text, visual, weight, bias):
    return relationship_descriptor(text, visual, weight, bias, text_term=text_term(text, weight, bias))


def _gradients(call, inputs, grad):
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(call(*leaves), leaves, grad)


@pytest.mark.parametrize("call", [relationship_descriptor, _cached], ids=["whole", "cached"])
@pytest.mark.parametrize(("backend", "shape", "dtype"), CASES, ids=_id)
def test_agrees_with_reference(backend, shape, dtype, call):
    inputs = _inputs(shape, dtype)
    _skip_unless_possible(backend, inputs[0])
    with use_backend(backend):
        out = call(*inputs)
        grad = torch.randn_like(out)
        grads = _gradients(call, inputs, grad)
    assert out.shape == (*shape[0], shape[1], shape[3]) and out.is_contiguous()
    assert_within_budget("out", out, reference, *inputs)
    wide = _gradients(reference, [x.double() for x in inputs], grad.double())
    plain = _gradients(reference, inputs, grad)
    for name, g, w, p in zip(NAMES, grads, wide, plain, strict=True):
        budget = 1e-5
        if dtype != torch.float32:
            budget = 2 * ((p.double() - w).norm() / w.norm()).item() + 2 * torch.finfo(dtype).eps
        error = ((g.double() - w).norm() / w.norm()).item()
        assert error <= budget, f"d{name}: error {error:.2e} over budget {budget:.2e}"


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_every_optional_argument(backend):
    text, visual, weight, bias = _inputs(((2, 3), 5, 12, 20))
    _skip_unless_possible(backend, text)
    term = torch.randn(5, 20)
    with use_backend(backend):
        assert_within_budget("no bias", relationship_descriptor(text, visual, weight), reference, text, visual, weight)
        got = relationship_descriptor(text, visual, weight, bias, term)  # a term given is the term used, bias included
        w1 = weight[:, :12]
        assert_within_budget("term", got, lambda t, v, w, m: (t * v.unsqueeze(-2)) @ w.T + m, text, visual, w1, term)
        assert_within_budget("reference's term", got, reference, text, visual, weight, bias, term)
        leaves = [x.requires_grad_() for x in (weight, bias, term)]
        dweight, dbias, dterm = torch.autograd.grad(
            relationship_descriptor(text, visual, *leaves).sum(), leaves, allow_unused=True
        )
        assert dbias is None and (dterm == 6).all() and (dweight[:, 12:] == 0).all() and (dweight[:, :12] != 0).all()


def test_one_gradient_at_a_time():
    """What is not asked for is not computed, and what is must not depend on it."""
    inputs = _inputs(((4,), 6, 12, 10))
    for backend in ("reference", "cpp", "triton"):
        with use_backend(backend):
            if _dispatch.objections("relationship_descriptor", backend, inputs[0]):
                continue
            want = _gradients(relationship_descriptor, inputs, torch.ones(4, 6, 10))
            for i, name in enumerate(NAMES):
                leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
                (got,) = torch.autograd.grad(relationship_descriptor(*leaves).sum(), leaves[i])
                torch.testing.assert_close(got, want[i], msg=f"{backend}: d{name}")


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "every-second-column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one-row-for-all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_any_layout(backend, layout):
    inputs = [LAYOUTS[layout](x) for x in _inputs(((2, 3), 7, 12, 10))]
    grad = LAYOUTS[layout](torch.randn(2, 3, 7, 10))
    _skip_unless_possible(backend, inputs[0])
    with use_backend(backend):
        assert_within_budget(layout, relationship_descriptor(*inputs), reference, *inputs)
        grads = _gradients(relationship_descriptor, inputs, grad)
    wide = _gradients(reference, [x.double() for x in inputs], grad.double())
    for name, g, w in zip(NAMES, grads, wide, strict=True):
        assert (g.double() - w).norm() <= 1e-5 * w.norm(), f"d{name}"


@pytest.mark.parametrize("shape", [((0,), 3, 8, 5), ((2, 0), 3, 8, 5), ((2,), 0, 8, 5), ((2,), 3, 8, 0)], ids=_id)
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_nothing_in_nothing_out(backend, shape):
    inputs = _inputs(shape)
    _skip_unless_possible(backend, inputs[0])
    with use_backend(backend):
        for call in (relationship_descriptor, _cached):
            out = call(*inputs)
            assert out.shape == (*shape[0], shape[1], shape[3])
            for x, grad in zip(inputs, _gradients(call, inputs, torch.ones_like(out)), strict=True):
                assert grad.shape == x.shape and (grad == 0).all()


# --- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_opcheck(backend, cached):
    text, visual, weight, bias = (x.requires_grad_() for x in _inputs(((2, 3), 5, 12, 20)))
    _skip_unless_possible(backend, text)
    term = torch.randn(5, 20, requires_grad=True) if cached else None
    args = (text, visual, weight, bias, term)
    with use_backend(backend):
        torch.library.opcheck(torch.ops.zs3fast.relationship_descriptor, args)
        if not cached:
            torch.library.opcheck(torch.ops.zs3fast.relationship_descriptor, args[:3])
        tensors = torch.randn(2, 3, 5, 20), text.detach(), visual.detach(), weight.detach()
        for needs in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
            torch.library.opcheck(torch.ops.zs3fast.relationship_descriptor_backward, (*tensors, cached, *needs))


def test_gradcheck_of_reference_and_of_the_explicit_backward():
    inputs = [x.double().requires_grad_() for x in _inputs(((2, 2), 3, 4, 3))]
    term = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    for call in (reference, relationship_descriptor, _cached):  # float64 runs on the reference backend
        assert torch.autograd.gradcheck(call, inputs)
    for call in (reference, relationship_descriptor):
        assert torch.autograd.gradcheck(lambda *x: call(*x[:3], None, x[3]), (*inputs[:3], term))  # noqa: B023


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(compiler):
    inputs = [x.requires_grad_() for x in _inputs(((2, 3), 5, 12, 20))]

    def step(*inputs):
        return relationship_descriptor(*inputs).sin().sum() + _cached(*inputs).cos().sum()

    got, want = torch.compile(step, fullgraph=True, backend=compiler)(*inputs), step(*inputs)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(g, w)


def test_exports_with_any_number_of_classes():
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return relationship_descriptor(*inputs)

    text, *others = _inputs(((2,), 5, 12, 20))
    shapes = {"inputs": ({0: torch.export.Dim.DYNAMIC}, None, None, None)}
    program = torch.export.export(Module(), (text, *others), dynamic_shapes=shapes)
    assert "zs3fast.relationship_descriptor" in str(program.graph)
    more = torch.randn(9, 12)
    torch.testing.assert_close(program.module()(more, *others), relationship_descriptor(more, *others))


def test_autocast_casts_and_keeps_gradients_in_fp32():
    text, visual, weight, bias = (x.requires_grad_() for x in _inputs(((2,), 5, 12, 20)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = text_term(text, weight, bias)
        assert term.dtype == torch.bfloat16
        out = relationship_descriptor(text, visual, weight, bias, term)
        assert relationship_descriptor(text, visual.bfloat16(), weight, bias).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.norm() > 0


# --- errors ----------------------------------------------------------------------------------------------------------

GOOD = {"text": torch.ones(5, 4), "visual": torch.ones(2, 4), "weight": torch.ones(3, 8), "bias": torch.ones(3)}


@pytest.mark.parametrize(
    ("wrong", "error", "named"),
    [
        ({"text": None}, TypeError, "text: expected a tensor, got NoneType"),
        (
            {"text": torch.ones(5, 4, dtype=torch.int32)},
            TypeError,
            "text: expected a floating-point tensor, got torch.int32",
        ),
        ({"text": torch.ones(1, 5, 4)}, ValueError, r"text: expected \[C, D >= 1\], got shape \[1, 5, 4\]"),
        ({"text": torch.ones(5, 0)}, ValueError, "text: expected"),
        (
            {"visual": torch.ones(4)},
            ValueError,
            r"visual: expected \[B, D\] or \[B, M, D\] with text's D = 4, got \[4\]",
        ),
        ({"visual": torch.ones(2, 5)}, ValueError, r"visual: expected .* got \[2, 5\]"),
        ({"visual": torch.ones(2, 4).double()}, TypeError, "visual: expected text's dtype torch.float32, got"),
        ({"visual": torch.ones(2, 4, device="meta")}, ValueError, "visual: expected text's device cpu, got meta"),
        ({"weight": torch.ones(3, 4)}, ValueError, r"weight: expected \[D', 2D\] = \[D', 8\], got shape \[3, 4\]"),
        ({"weight": [1.0]}, TypeError, "weight: expected a tensor, got list"),
        ({"bias": torch.ones(4)}, ValueError, r"bias: expected \[D'\] = \[3\], got shape \[4\]"),
        ({"bias": torch.ones(1, 3)}, ValueError, "bias: expected"),
        ({"text_term": torch.ones(4, 3)}, ValueError, r"text_term: expected \[C, D'\] = \[5, 3\], got \[4, 3\]"),
        ({"text_term": torch.ones(5, 3).half()}, TypeError, "text_term: expected text's dtype"),
    ],
)
def test_errors_name_the_argument(wrong, error, named):
    with pytest.raises(error, match=f"relationship_descriptor: .*{named}"):
        relationship_descriptor(**{**GOOD, **wrong})


def test_errors_of_text_term():
    with pytest.raises(ValueError, match=r"text_term: weight: expected \[D', 2D\]"):
        text_term(torch.ones(5, 4), torch.ones(3, 4))
