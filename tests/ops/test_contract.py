"""What every op promises, once for all of them: an op without a row in cases.py fails here."""

from __future__ import annotations

import io
import threading
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


def gradients(op: str, request: Request, backend: str, dtype: torch.dtype) -> list[Tensor]:
    leaves, given = [], {}
    for label, x in request.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.to(dtype).detach()
            if label in CASES[op].differentiable:
                leaves.append(x.requires_grad_())
        given[label] = tuple(c.to(dtype) for c in x) if label == "context" and x is not None else x
    outputs = [x for x in cases.tensors_of(run(op, given, backend)) if x.requires_grad]
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


@pytest.mark.parametrize(("op", "backend"), [pair for pair in PAIRS if pair[1] != "triton"])
def test_opcheck(op: str, backend: str) -> None:
    """The schema tells no lies, and shapes, strides and dtypes are those that a traced program expects."""
    for seed in SEEDS:
        for name, args in raw_calls(op, CASES[op].draw(Draw(seed)), backend):
            with use_backend(backend if backend in _dispatch.registered(name) else "reference"):
                torch.library.opcheck(getattr(torch.ops.zs3fast, name), args)


@pytest.mark.parametrize("op", OPS)
def test_compiles_whole(op: str) -> None:
    for seed in SEEDS[:2]:
        torch._dynamo.reset()
        request = CASES[op].draw(Draw(seed))
        function = torch.compile(getattr(zs3fast.ops, op), fullgraph=True, backend="aot_eager")
        CASES[op].judge(request, function(**request), cases.want_of(op, request))


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
    for label in CASES[op].batched:
        if isinstance(request.get(label), Tensor):
            request[label] = request[label][:0]
    if isinstance(request.get("context"), tuple):
        request["context"] = tuple(x[:1] for x in request["context"])
    got = cases.tensors_of(run(op, request, backend))
    for g, w in zip(got, full, strict=True):
        assert g.dtype == w.dtype and (g.ndim == 0 or g.shape[1:] == w.shape[1:])
        assert g.ndim == 0 or g.shape[0] == 0


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
