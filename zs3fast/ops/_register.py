"""register_op: everything that torch and the backends must know of an op, in one call.

How to add an op, `my_op`, in six steps:

1. Write `zs3fast/ops/my_op.py`: the public function with its shapes, formula, errors and one sentence on NaN; `_check`,
   which refuses what has no meaning; and `reference`, a few lines of plain torch, which is the definition.
2. At the end of the file call `register_op("my_op", schema=..., fake=..., reference=..., flops=...)`, and with
   `backward=Backward(...)` if it is differentiable. The public function checks, then calls `torch.ops.zs3fast.my_op`.
3. Import it in `zs3fast/ops/__init__.py`, and give it a row in `tests/ops/cases.py`: `tests/ops/test_contract.py` then
   holds every backend of it to what all ops promise. An op without a row fails there.
4. Plug kernels in: `csrc/my_op/cpu.cpp` with `TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m)`, `kernels/my_op.py` in Triton
   with `forward` and `backward` (or, without gradients, a function named as the op). Each is one more entry of
   `backends`: its name and its objections, a function that says why it cannot take a request.
5. Write `tests/ops/test_my_op.py` with what is special about it: identities, edge cases, hand-made examples.
6. Write `bench/ops/my_op.py`, and add the name to OPS in `tests/test_house.py`, which looks for all of these files.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from zs3fast.ops import _dispatch, _flops
from zs3fast.ops._dispatch import Implementation, Objections

Backends = Mapping[str, Objections | Implementation]


@dataclass(frozen=True)
class Gradients:
    """The gradient of an op, written in torch ops.

    setup_context: (ctx, inputs, output), keeps what the gradient needs.
    gradients:     (ctx, *grads of the outputs) -> one gradient or None for each input.
    """

    setup_context: Callable[..., None]
    gradients: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Backward(Gradients):
    """A gradient with kernels: an op of its own, torch.ops.zs3fast.<op>_backward, which `gradients` calls. The other
    fields are those of `register_op`.
    """

    schema: str
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    flops: Callable[..., int]
    backends: Backends = field(default_factory=dict)


def register_op(
    op: str,
    *,
    schema: str,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    flops: Callable[..., int],
    backends: Backends | None = None,
    backward: Gradients | None = None,
) -> None:
    """Make `torch.ops.zs3fast.<op>` and, for compiled kernels to plug into, `torch.ops.zs3fast_cpp.<op>`.

    Args:
        op:        the name, everywhere.
        schema:    "(Tensor x, int n) -> Tensor": all arguments positional.
        fake:      takes the arguments, returns empty tensors of the result's shapes, dtypes and strides.
        reference: takes the arguments, returns the result: the definition. It takes every request.
        flops:     takes the arguments, shapes in place of tensors, and returns the FLOPs of the matrix products and
                   interpolations among them, 2 a multiply-add: what torch.utils.flop_counter.FlopCounterMode shows.
        backends:  "cpp" | "triton" | "cuda" -> its objections (arguments -> list of reasons, empty: none).
                   "cpp" and "cuda" run torch.ops.zs3fast_cpp.<op>, "triton" zs3fast.kernels.<op>.forward (and
                   backward; without such kernels a function named as the op); an `Implementation` says it otherwise.
        backward:  the gradient, a `Backward` where it has kernels of its own; None: not differentiable.
    """
    entry = "forward" if isinstance(backward, Backward) else op
    _define(op, schema, fake, reference, flops, backends or {}, partial(_run_triton, op, entry))
    if backward is None:
        return
    if isinstance(backward, Backward):
        _define(
            f"{op}_backward",
            backward.schema,
            backward.fake,
            backward.reference,
            backward.flops,
            backward.backends,
            partial(_run_triton, op, "backward"),
        )
    torch.library.register_autograd(f"zs3fast::{op}", backward.gradients, setup_context=backward.setup_context)


def _define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    flops: Callable[..., int],
    backends: Backends,
    run_triton: Callable[..., Any],
) -> None:
    for qualified in (f"zs3fast::{name}", f"zs3fast_cpp::{name}"):
        torch.library.define(qualified, schema)
    packet = getattr(torch.ops.zs3fast, name)
    arguments = packet.default._schema.arguments
    defaults = tuple(argument.default_value for argument in arguments)
    tensors = [(i, argument.name) for i, argument in enumerate(arguments) if str(argument.type) == "Tensor"]

    def run(*args: Any) -> Any:
        for i, label in tensors:  # None passes torch's own check
            if args[i] is None:
                raise TypeError(f"{name}: {label}: expected a tensor, got None")
        return _dispatch.call(
            name, *args, *defaults[len(args) :]
        )  # torch leaves out trailing ones that are the default

    torch.library.impl(f"zs3fast::{name}", "default", run)
    torch.library.register_fake(f"zs3fast::{name}", fake)
    _flops.register(packet, flops)
    _dispatch.register(name, "reference", reference, _dispatch.never)
    for backend, how in backends.items():
        if not isinstance(how, Implementation):
            how = Implementation(run_triton if backend == "triton" else partial(_run_compiled, name), how)
        _dispatch.register(name, backend, how.run, how.objections)


def _run_compiled(name: str, *args: Any) -> Any:
    return getattr(torch.ops.zs3fast_cpp, name)(*args)  # on the CPU or on a GPU, by the device of its tensors


def _run_triton(op: str, entry: str, *args: Any) -> Any:
    return getattr(importlib.import_module(f"zs3fast.kernels.{op}"), entry)(*args)
