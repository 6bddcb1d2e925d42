"""What every op promises, once for all of them: an op without a row in cases.py fails here."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zs3fast.ops
from tests.ops import cases
from tests.ops.cases import CASES, LAYOUTS, Draw, Request
from zs3fast.ops import _dispatch, use_backend

OPS = [op for op in _dispatch.registered() if not op.endswith("_backward")]
PAIRS = [(op, backend) for op in OPS for backend in (cases.backends(op) if op in CASES else ())]
SEEDS = (1, 2, 3)
WIDE = ("reference", torch.float64)


def run(op: str, request: Request, backend: str) -> Any:
    try:
        return cases.run(op, request, backend)
    except RuntimeError as error:
        if cases.refused(error):
            pytest.skip(str(error).replace("\n", " "))
        raise


def test_every_op_has_a_row() -> None:
    assert set(OPS) == set(CASES)


def test_every_op_has_a_flop_formula() -> None:
    from torch.utils.flop_counter import flop_registry

    assert [op for op in _dispatch.registered() if getattr(torch.ops.zs3fast, op) not in flop_registry] == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_every_backend_against_float64(op: str, backend: str, layout: str) -> None:
    for seed in SEEDS[: 1 if backend == "triton" else None]:
        request = CASES[op].draw(Draw(seed, layout))
        CASES[op].judge(request, run(op, request, backend), cases.want_of(op, request))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "backend"), [pair for pair in PAIRS if CASES[pair[0]].differentiable])
def test_gradients_against_float64(op: str, backend: str, layout: str) -> None:
    for seed in SEEDS[: 1 if backend == "triton" else None]:
        request = CASES[op].draw(Draw(seed, layout))
        got, want = gradients(op, request, backend, torch.float32), gradients(op, request, "reference", torch.float64)
        cases.close(request, got, want, 1e-4)


def gradients(
    op: str, request: Request, backend: str, dtype: torch.dtype, function: Callable[..., Any] | None = None
) -> list[Tensor]:
    """Of a weighted sum of the results, of the public function or of another one in its place."""
    leaves, given = [], {}
    for label, x in request.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.to(dtype).detach()
            if label in CASES[op].differentiable:
                leaves.append(x.requires_grad_())
        given[label] = tuple(c.to(dtype) for c in x) if label == "context" and x is not None else x
    outputs = [
        x for x in cases.tensors_of(function(**given) if function else run(op, given, backend)) if x.requires_grad
    ]
    loss = sum((x * torch.linspace(0.5, 1.5, x.numel(), dtype=dtype).reshape(x.shape)).sum() for x in outputs)
    return [g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None]


def raw_calls(op: str, request: Request, backend: str) -> list[tuple[str, tuple[Any, ...]]]:
    """What the public function and its gradient ask of torch.ops.zs3fast."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    call = _dispatch.call

    def record(name: str, *args: Any) -> Any:
        calls.append((name, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return call(name, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "call", record)
        if CASES[op].differentiable:
            gradients(op, request, backend, torch.float32)
        else:
            run(op, request, backend)
    return calls


def _backward_of(op: str, backend: str) -> bool:
    name = f"{op}_backward"
    return backend in _dispatch.registered(name) if name in _dispatch.registered() else True


@pytest.mark.parametrize(("op", "backend"), [pair for pair in PAIRS if pair[1] != "triton"])
def test_opcheck(op: str, backend: str) -> None:
    """The schema tells no lies, and shapes, strides and dtypes are those that a traced program expects."""
    for seed in SEEDS:
        for name, args in raw_calls(op, CASES[op].draw(Draw(seed)), backend):
            with use_backend(backend if backend in _dispatch.registered(name) else "reference"):
                torch.library.opcheck(getattr(torch.ops.zs3fast, name), args)
                if name == op and CASES[op].differentiable and _backward_of(op, backend):
                    floats = (isinstance(a, Tensor) and a.is_floating_point() for a in args)
                    leaves = (a.requires_grad_() if is_float else a for a, is_float in zip(args, floats, strict=True))
                    torch.library.opcheck(getattr(torch.ops.zs3fast, name), tuple(leaves))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", OPS)
def test_compiles_whole(op: str, dynamic: bool) -> None:
    if dynamic and op == "masks_to_labels":
        pytest.skip("numbers become symbols, and windows are sorted; its own test compiles it with any size of tensors")
    for seed in SEEDS[:2]:
        torch._dynamo.reset()
        request = CASES[op].draw(Draw(seed))
        function = torch.compile(getattr(zs3fast.ops, op), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        CASES[op].judge(request, function(**request), cases.want_of(op, request))
        if CASES[op].differentiable:
            got = gradients(op, request, "auto", torch.float32, function)
            cases.close(request, got, gradients(op, request, "reference", torch.float64), 1e-4)


class Module(torch.nn.Module):
    def __init__(self, op: str, rest: Request) -> None:
        super().__init__()
        self.op, self.rest = op, rest

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        return tuple(cases.tensors_of(getattr(zs3fast.ops, self.op)(**tensors, **self.rest)))


@pytest.mark.parametrize("op", OPS)
def test_exports_and_saves(op: str) -> None:
    request = CASES[op].draw(Draw(1))
    tensors = {k: v for k, v in request.items() if isinstance(v, Tensor)}
    module = Module(op, {k: v for k, v in request.items() if k not in tensors})
    program = torch.export.export(module, (tensors,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    got = torch.export.load(file).module()(tensors)
    for g, w in zip(got, module(tensors), strict=True):
        assert torch.equal(g, w)


def of_size(request: Request, sizes: dict[str, int], times: int) -> Request:
    """The request with some of its tensors so many times as long."""
    changed = dict(request)
    for label, dim in sizes.items():
        if isinstance(request.get(label), Tensor):
            changed[label] = torch.cat([request[label]] * times, dim) if times else request[label].narrow(dim, 0, 0)
    if 0 in sizes.values() and isinstance(request.get("context"), tuple):
        changed["context"] = tuple(x[:1] for x in request["context"])
    return changed


SIZES = [(op, sizes) for op in OPS if op in CASES for sizes in CASES[op].sizes()]


@pytest.mark.parametrize(("op", "sizes"), SIZES)
def test_exports_with_any_size(op: str, sizes: dict[str, int]) -> None:
    two, three = (of_size(CASES[op].draw(Draw(1)), sizes, n) for n in (2, 3))
    tensors = {k: v for k, v in two.items() if isinstance(v, Tensor)}
    module = Module(op, {k: v for k, v in two.items() if k not in tensors})
    dynamic = {k: {sizes[k]: torch.export.Dim.AUTO} if k in sizes else None for k in tensors}
    program = torch.export.export(module, (tensors,), dynamic_shapes=(dynamic,))
    more = {k: three[k] for k in tensors}
    for g, w in zip(program.module()(more), module(more), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("threads", [2, 7])
@pytest.mark.parametrize(("op", "backend"), [pair for pair in PAIRS if pair[1] == "cpp"])
def test_torch_s_threads(op: str, backend: str, threads: int) -> None:
    """Results and gradients with any number of them, however uneven their shares."""
    before = torch.get_num_threads()
    try:
        for seed in SEEDS:
            request = of_size(CASES[op].draw(Draw(seed)), CASES[op].sizes()[0], 5)
            torch.set_num_threads(threads)
            CASES[op].judge(request, run(op, request, backend), cases.want_of(op, request))
            if CASES[op].differentiable:
                got, want = (gradients(op, request, *how) for how in ((backend, torch.float32), WIDE))
                cases.close(request, got, want, 1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
def test_threads(op: str) -> None:
    """Four threads at once, each with its own request: every result is that of one thread."""
    requests = [CASES[op].draw(Draw(seed)) for seed in range(4)]
    alone = [cases.tensors_of(cases.run(op, r, "auto")) for r in requests]
    wrong: list[Any] = []

    def work(i: int) -> None:
        for _ in range(5):
            got = cases.tensors_of(getattr(zs3fast.ops, op)(**requests[i]))
            if not all(torch.equal(g, w) for g, w in zip(got, alone[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_no_images(op: str, backend: str) -> None:
    request = CASES[op].draw(Draw(2))
    full = cases.tensors_of(cases.run(op, request, "reference"))
    got = cases.tensors_of(run(op, of_size(request, CASES[op].sizes()[0], 0), backend))
    for g, w in zip(got, full, strict=True):
        assert g.dtype == w.dtype and (g.ndim == 0 or g.shape[1:] == w.shape[1:])
        assert g.ndim == 0 or g.shape[0] == 0


@pytest.mark.parametrize(("op", "backend"), [pair for pair in PAIRS if CASES[pair[0]].free])
def test_nothing_of_a_free_size(op: str, backend: str) -> None:
    request = of_size(CASES[op].draw(Draw(2)), dict(CASES[op].free), 0)
    got, want = (cases.tensors_of(run(op, request, which)) for which in (backend, "reference"))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and torch.equal(g, w)


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_nan(op: str, backend: str) -> None:
    """NaN stands where the definition has it, which the op's docstring says in a sentence, and nowhere else."""
    for seed in SEEDS[: 2 if backend == "triton" else None]:
        draw = Draw(seed)
        request = CASES[op].draw(draw)
        floats = [x for x in request.values() if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
        if not floats:
            continue
        poisoned = draw.random.choice(floats)
        poisoned.view(-1)[draw.random.randrange(poisoned.numel())] = float("nan")
        got, want = run(op, request, backend), cases.want_of(op, request)
        if backend == "triton" and op in ("proposal_attention", "region_bridge_attention"):
            got = torch.where(got.isnan() & ~want.isnan(), want.float(), got)  # at least those that see it
        CASES[op].judge(request, got, want)
