"""What a GPU adds to an op: graphs, streams, devices, addresses beyond 2^31 elements, compiled whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.device import DEVICE, ON_GPU, busy_stream, capture, far_apart, skip_unless_free, skip_without_gpu
from tests.gpu.problems import FAMILIES, Family, as_tuple, backends_of, passes_of, skip_if_refused
from zs3fast.ops import _dispatch, masks_to_labels, use_backend

skip_without_gpu()

KERNELS = ("cuda", "triton", "cpp")
REACH = 2**31 + 2**20 if ON_GPU else 2**12  # elements
ALL = [(f, b) for f in FAMILIES.values() for b in backends_of(f.op)]
ALL_IDS = [f"{name}-{b}" for name, f in FAMILIES.items() for b in backends_of(f.op)]
BY_KERNELS = [pytest.param(f, b, id=i) for (f, b), i in zip(ALL, ALL_IDS, strict=True) if b in KERNELS]


def close(got: Any, expected: Any) -> None:
    for g, e in zip(as_tuple(got), as_tuple(expected), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("family", "backend"), BY_KERNELS)
def test_a_graph_replays_on_new_values(family: Family, backend: str) -> None:
    problem = family.make(family.shapes["tiny"], torch.float32)
    with use_backend(backend):
        skip_if_refused(family.op, backend, problem)
        inputs = [x.clone() for x in problem.tensors]
        replay = capture(lambda: problem.call(*inputs))
        for x, own in zip(inputs, problem.tensors, strict=True):
            x.copy_(own.roll(1, 0).roll(1, -1))
        close(replay(), problem.call(*(x.clone() for x in inputs)))


@pytest.mark.parametrize(("family", "backend"), BY_KERNELS)
def test_on_the_current_stream(family: Family, backend: str) -> None:
    """Inputs are NaN until the stream gets to writing them: a kernel launched on another stream reads that."""
    problem = family.make(family.shapes["tiny"], torch.float32)
    with use_backend(backend):
        skip_if_refused(family.op, backend, problem)
        expected = problem.call(*problem.tensors)
        inputs = [torch.full_like(x, torch.nan) for x in problem.tensors]
        with busy_stream():
            for x, own in zip(inputs, problem.tensors, strict=True):
                x.copy_(own)
            got = problem.call(*inputs)
        close(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize(("family", "backend"), BY_KERNELS)
def test_on_a_device_that_is_not_the_current_one(family: Family, backend: str) -> None:
    problem = family.make(family.shapes["tiny"], torch.float32)
    with use_backend(backend):
        skip_if_refused(family.op, backend, problem)
        got = as_tuple(problem.call(*(x.to("cuda:1") for x in problem.tensors)))
        assert {x.device for x in got} == {torch.device("cuda:1")}
        close([x.to("cuda:0") for x in got], problem.call(*problem.tensors))


@pytest.mark.xdist_group("large0")
@pytest.mark.parametrize(("family", "backend"), BY_KERNELS)
def test_rows_beyond_32_bit_addresses(family: Family, backend: str) -> None:
    """Rows of every input lie so far apart that the last begins more than 2^31 elements behind the first."""
    problem = family.make(family.shapes["tiny"], torch.float16)
    skip_unless_free(REACH * 2 * (len(problem.tensors) + 1))
    with use_backend(backend):
        skip_if_refused(family.op, backend, problem)
        far = [x if x.ndim < 2 else far_apart(x, REACH) for x in problem.tensors]
        problem.check_forward(*far)
        if "backward" in passes_of(family, backend):
            problem.check_backward(*far)


@pytest.mark.xdist_group("large0")
@pytest.mark.parametrize("backend", [b for b in backends_of("masks_to_labels") if b in KERNELS])
def test_labels_beyond_32_bit_addresses(backend: str) -> None:
    """Three images of 27,000 x 27,000 labels are 2.2e9 bytes."""
    side = 27_000 if ON_GPU else 9
    logits = torch.randn(3, 2, 3, 3, device=DEVICE)
    skip_unless_free(6 * side * side)
    with use_backend(backend):
        if reasons := _dispatch.objections("masks_to_labels", backend, logits):
            pytest.skip("; ".join(reasons))
        every = masks_to_labels(logits, (side, side), dtype=torch.uint8)
        alone = masks_to_labels(logits[2:], (side, side), dtype=torch.uint8)
    assert torch.equal(every[2:], alone) and alone.any() and not alone.all()


@pytest.mark.parametrize(("family", "backend"), ALL, ids=ALL_IDS)
def test_compiles_whole(family: Family, backend: str) -> None:
    """The op inside a function compiled as one graph, and its gradients, are those of the op alone."""
    problem = family.make(family.shapes["tiny"], torch.float32)

    def step(*tensors: Tensor) -> Any:
        return [x * 2 for x in as_tuple(problem.call(*(t + 0 for t in tensors)))]

    with use_backend(backend):
        skip_if_refused(family.op, backend, problem)
        torch.compiler.reset()  # families share the code of `step`, and only so many versions of it are compiled
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
        expected = step(*problem.tensors)
        close(compiled(*problem.tensors), expected)
        if family.differentiable:
            grads = [torch.randn_like(x) for x in expected]
            got, want = (problem.gradients(f, *grads, *problem.tensors) for f in (compiled, step))
            for g, w in zip(got, want, strict=True):
                assert (g - w).norm() <= 1e-5 * w.norm()


class Calls(TorchDispatchMode):
    """Records the calls of our ops, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "zs3fast":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "backend"), ALL, ids=ALL_IDS)
def test_opcheck(family: Family, backend: str) -> None:
    """Schema, fake and autograd of the op, and of its backward, on the arguments that it is called with."""
    problem = family.make(family.shapes["tiny"], torch.float32)
    with use_backend(backend):
        skip_if_refused(family.op, backend, problem)
        with Calls() as calls:
            results = as_tuple(problem.call(*problem.tensors))
            if family.differentiable:
                problem.gradients(problem.call, *(torch.randn_like(x) for x in results), *problem.tensors)
        called = {func: args for func, args in calls.seen}
        assert {func.name().split("::")[1].removesuffix("_backward") for func in called} == {family.op}
        assert len(called) == 1 + family.differentiable
        for func, args in called.items():
            backward = func.name().endswith("_backward")
            wanted = [x.data_ptr() for x in problem.tensors] if family.differentiable and not backward else []
            args = tuple(
                x.detach().requires_grad_(x.data_ptr() in wanted) if isinstance(x, Tensor) else x for x in args
            )
            checks = ("test_schema", "test_faketensor") if backward else None
            torch.library.opcheck(func, args, **({"test_utils": checks} if checks else {}))
