"""self_similarity_attention: backends against the reference and official answers; gradients; registration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.budget import assert_within_budget
from zs3fast.ops import _dispatch, self_similarity_attention, use_backend
from zs3fast.ops.self_similarity_attention import SIMILARITIES, distance_prior, reference

SHAPES = [  # B, heads, grid, dh, num_prefix
    (1, 2, (14, 14), 64, 1),
    (2, 3, (9, 13), 17, 1),
    (1, 1, (5, 29), 12, 3),
    (3, 2, (1, 1), 8, 0),
    (1, 2, (23, 4), 96, 1),
]
SMALL = [(1, 2, (5, 7), 16, 1), (2, 1, (3, 23), 12, 3), (1, 1, (2, 2), 8, 0)]  # Triton's interpreter is slow
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STDS = [None, 1.0, 5.0]


def _id(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


CASES = [(b, s, d) for b in ("reference", "cpp") for s in SHAPES for d in DTYPES]
CASES += [("triton", s, d) for s in SMALL for d in DTYPES]


def _inputs(shape: tuple, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    B, heads, (h, w), dh, num_prefix = shape
    torch.manual_seed(seed)
    packed = torch.randn(B, num_prefix + h * w, 3, heads, dh).to(dtype)  # as a packed projection leaves them
    return tuple(x.transpose(1, 2) for x in packed.unbind(2))


def _arguments(shape: tuple) -> dict:
    return {"scale": shape[3] ** -0.5, "grid": shape[2], "num_prefix": shape[4]}


def _skip_unless_possible(backend: str, q: Tensor) -> None:
    with use_backend(backend):
        reasons = _dispatch.objections("self_similarity_attention", backend, q)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("backend", "shape", "dtype"), CASES, ids=_id)
def test_agrees_with_reference(backend, shape, dtype, similarity):
    q, k, v = _inputs(shape, dtype)
    _skip_unless_possible(backend, q)
    for std in STDS:
        options = _arguments(shape) | {"similarity": similarity, "std": std}
        with use_backend(backend):
            got = self_similarity_attention(q, k, v, **options)
        assert_within_budget(f"std {std}", got, reference, q, k, v, **options)
        assert got.transpose(1, 2).is_contiguous()  # joining the heads is free


def test_reference_is_the_formula():
    """Written out with loops for one head: the prior between patches alone, the sum of two attentions not halved."""
    (q, k, v), (h, w), std = _inputs((1, 1, (3, 4), 6, 2)), (3, 4), 1.5
    q, k, v = (x.double() for x in (q, k, v))
    want = torch.zeros(12, 6, dtype=torch.float64)
    for tokens in (q[0, 0], k[0, 0]):
        for i in range(h * w):
            scores = 0.3 * tokens @ tokens[2 + i]
            for j in range(h * w):
                square = (i // w - j // w) ** 2 + (i % w - j % w) ** 2
                scores[2 + j] += np.exp(-square / (2 * std**2))
            want[i] += torch.softmax(scores, 0) @ v[0, 0]
    got = reference(q, k, v, similarity="qq+kk", scale=0.3, grid=(h, w), num_prefix=2, std=std)
    torch.testing.assert_close(got[0, 0], want)


def test_prior_is_the_official_one():
    folder = os.environ.get("ZS3FAST_GOLDENS")
    if not folder:
        pytest.skip("ZS3FAST_GOLDENS, the folder of official answers, is not set")
    golden = np.load(Path(folder, "training_free_tiny.npz"))
    patch = json.loads(str(golden["meta"]))["patch"]
    for name, images in (("omega", "windows"), ("omega_wide", "wide")):
        grid = tuple(n // patch for n in golden[f"input/{images}"].shape[-2:])
        want = torch.from_numpy(golden[f"eval/naclip/{name}"]).double()
        got = distance_prior(grid, 5.0)
        assert (got - want).norm() <= 1e-6 * want.norm()


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "columns-outermost": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "every-second-row-and-column": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2],
    "one-image-for-all": lambda x: x[:1].expand_as(x),
    "one-head-for-all": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_any_layout(backend, layout):
    shape = (2, 2, (5, 6), 8, 1)
    q, k, v = (LAYOUTS[layout](x) for x in _inputs(shape))
    _skip_unless_possible(backend, q)
    options = _arguments(shape) | {"similarity": "qq+kk", "std": 2.0}
    with use_backend(backend):
        got = self_similarity_attention(q, k, v, **options)
    assert_within_budget(layout, got, reference, q, k, v, **options)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_nothing_in_nothing_out(backend):
    q, k, v = (x.requires_grad_() for x in _inputs((0, 2, (3, 4), 8, 1)))
    _skip_unless_possible(backend, q)
    with use_backend(backend):
        output = self_similarity_attention(q, k, v, similarity="kk", scale=0.3, grid=(3, 4))
    assert output.shape == (0, 2, 12, 8)
    with use_backend("auto"):  # there is one backward pass, in plain torch
        assert torch.autograd.grad(output.sum(), k)[0].shape == k.shape


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_large_scores_do_not_overflow(backend):
    """Own score of every patch in the thousands, as for tokens of large norm; a far key's is thousands below it."""
    shape = (1, 1, (8, 9), 8, 1)
    q, k, v = _inputs(shape)
    q, k = q * 30, k * 30
    _skip_unless_possible(backend, q)
    options = {"similarity": "qq+kk", "scale": 1.0, "grid": (8, 9), "std": 5.0}
    with use_backend(backend):
        got = self_similarity_attention(q, k, v, **options)
    assert_within_budget("large", got, reference, q, k, v, **options, fp32=1e-3)  # fp32 scores of 1e4 have 3 decimals


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_nan_stays_in_its_head(backend):
    shape = (1, 2, (3, 5), 8, 1)
    q, k, v = (x.clone() for x in _inputs(shape))
    k[0, 0, 4, 2] = float("nan")
    _skip_unless_possible(backend, q)
    with use_backend(backend):
        got = self_similarity_attention(q, k, v, similarity="kk", **_arguments(shape))
    assert got[0, 0].isnan().all() and got[0, 1].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_cpp_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for shape in [(1, 1, (3, 7), 8, 1), (1, 1, (12, 12), 8, 1), (2, 3, (10, 17), 16, 1)]:
            q, k, v = _inputs(shape)
            _skip_unless_possible("cpp", q)
            options = _arguments(shape) | {"similarity": "kk", "std": 3.0}
            with use_backend("cpp"):
                got = self_similarity_attention(q, k, v, **options)
            assert_within_budget(_id(shape), got, reference, q, k, v, **options)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_cpp_on_every_instruction_set(capability):
    """torch fixes the instruction set when it starts, hence a process each; one this CPU lacks falls back."""
    _skip_unless_possible("cpp", torch.zeros(1, 1, 1, 1))
    program = """
from tests.ops.test_self_similarity_attention import _arguments, _inputs
from tests.ops.budget import assert_within_budget
from zs3fast.ops import self_similarity_attention, use_backend
from zs3fast.ops.self_similarity_attention import reference
use_backend("cpp")
for shape in [(1, 2, (14, 11), 20, 1), (1, 1, (9, 2), 64, 0)]:
    options = _arguments(shape) | {"similarity": "qq+kk", "std": 4.0}
    got = self_similarity_attention(*_inputs(shape), **options)
    assert_within_budget("output", got, reference, *_inputs(shape), **options)
print("agrees")
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "agrees\n", done.stderr


# --- gradients and registration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradients(similarity):
    shape = (2, 2, (2, 3), 4, 2)
    q, k, v = (x.double().requires_grad_() for x in _inputs(shape))
    options = _arguments(shape) | {"similarity": similarity, "std": 1.5}
    for call in (reference, self_similarity_attention):
        assert torch.autograd.gradcheck(lambda *x: call(*x, **options), (q, k, v), fast_mode=True)  # noqa: B023
    got = torch.autograd.grad(self_similarity_attention(q, k, v, **options).square().sum(), (q, k, v))
    want = torch.autograd.grad(
        reference(q, k, v, **options).square().sum(), (q, k, v), allow_unused=True, materialize_grads=True
    )
    for name, g, w in zip(("dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(g, w, msg=f"{name} of {similarity}")


def test_compiles_whole():
    shape = (1, 2, (3, 4), 8, 1)
    q, k, v = _inputs(shape)

    def call(q, k, v):
        return self_similarity_attention(q, k, v, similarity="qq+kk", std=5.0, **_arguments(shape)).flatten(2) * 2

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v))


def test_autocast_multiplies_half_types():
    q, k, v = _inputs((1, 2, (3, 4), 8, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert self_similarity_attention(q, k, v, similarity="kk", scale=0.3, grid=(3, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"similarity": "vv"}, ValueError, "similarity: expected one of qq, kk, qq\\+kk, qk, got 'vv'"),
        ({"grid": (3, 5)}, ValueError, "q: expected \\[B, heads, 16, dh\\], 1 prefix tokens and 3 x 5 patches"),
        ({"grid": (12,)}, TypeError, "grid: expected two ints"),
        ({"grid": (0, 12)}, ValueError, "grid: expected at least"),
        ({"num_prefix": -1}, ValueError, "num_prefix: expected 0 or more, got -1"),
        ({"num_prefix": 1.0}, TypeError, "num_prefix: expected an int"),
        ({"std": 0.0}, ValueError, "std: expected a positive number of patches, got 0.0"),
        ({"std": float("nan")}, ValueError, "std: expected a positive"),
        ({"std": "5"}, TypeError, "std: expected a number or None"),
        ({"scale": None}, TypeError, "scale: expected a number"),
        ({"k": torch.zeros(1, 2, 12, 8)}, ValueError, "k: expected q's shape"),
        ({"v": torch.zeros(1, 2, 13, 8, dtype=torch.float64)}, TypeError, "v: expected q.s dtype"),
        ({"q": torch.zeros(2, 13, 8)}, ValueError, "q: expected \\[B, heads, tokens, dh\\]"),
        ({"q": [1.0]}, TypeError, "q: expected a tensor"),
        ({"q": torch.zeros(1, 2, 13, 8, dtype=torch.int64)}, TypeError, "q: expected a floating-point tensor"),
    ],
)
def test_bad_requests(change, error, message):
    q, k, v = _inputs((1, 2, (3, 4), 8, 1))
    arguments = {"q": q, "k": k, "v": v, "similarity": "kk", "scale": 0.3, "grid": (3, 4), "num_prefix": 1} | change
    with pytest.raises(error, match=message):
        self_similarity_attention(**arguments)
