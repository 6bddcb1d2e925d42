"""What the launchers of the Triton kernels would compile, recorded from launches on tensors without memory.

    for case in cases("mask_loss"):
        compile_all(case.requests())

A launcher runs on the meta device while its kernels are replaced by recorders that keep their arguments. Types,
constants (None, 1) and divisibility by 16 follow from the arguments as Triton's own launcher finds them out, so what is
compiled ahead of time is what a GPU would run: nothing here repeats a kernel's signature.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tests.ops.aot import AotRequest

_LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 3}
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
Run = Callable[[Any], None]
Pair = tuple[int, int]
HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's "module:name", what it is specialised on, and its grid."""

    kernel: str
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]
    grid: tuple[int, ...]

    def request(self, arch: int) -> AotRequest:
        return AotRequest(self.kernel, self.signature, self.constexprs, arch, aligned=self.aligned, **self.options)

    @property
    def name(self) -> str:
        return self.kernel.partition(":")[2]

    @property
    def identity(self) -> str:
        """Equal where the compiled code would be."""
        return repr((self.kernel, self.signature, self.constexprs, self.aligned, self.options))


@dataclass(frozen=True)
class Case:
    """A problem of one op: `run(module)` calls its launchers. `tensor_cores`: whether its kernels, but for one named
    merge, multiply with them.

    `everywhere` cases stand for their op in the test suite; continuous integration compiles all of them.
    """

    op: str
    name: str
    run: Callable[[Any], Any]
    tensor_cores: bool | None = None
    everywhere: bool = False

    def launches(self) -> list[Launch]:
        """The kernels of this problem, each specialisation once."""
        module = import_module(f"zs3fast.kernels.{self.op}")
        with recording(module) as launches:
            self.run(module)
        return list({launch.identity: launch for launch in launches}.values())


@contextmanager
def recording(module: Any) -> Iterator[list[Launch]]:
    """Replace the kernels `module` launches; gives the list its launches go to."""
    launches: list[Launch] = []
    kernels = {n: k for n, k in vars(module).items() if "_kernel" in n and hasattr(k, "fn")}
    for name, kernel in kernels.items():
        setattr(module, name, _Recorder(f"{module.__name__}:{name}", kernel.fn, launches))
    try:
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


class _Recorder:
    def __init__(self, name: str, function: Callable[..., Any], launches: list[Launch]) -> None:
        self.name, self.function, self.launches = name, function, launches

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {k: kwargs.pop(k, default) for k, default in _LAUNCH_OPTIONS.items()}
            signature: dict[str, Any] = {}
            constexprs: dict[str, Any] = {}
            aligned = []
            bound = inspect.signature(self.function).bind(*args, **kwargs)
            for parameter in inspect.signature(self.function).parameters.values():
                value = bound.arguments[parameter.name]
                constant = "constexpr" in str(parameter.annotation)
                if isinstance(value, tuple) and not constant:
                    signature[parameter.name] = [_kind(element) for element in value]
                    parts = {f"{parameter.name}.{i}": element for i, element in enumerate(value)}
                else:
                    parts = {parameter.name: value}
                for name, part in parts.items():
                    kind = "constexpr" if constant else _kind(part)
                    if kind == "constexpr":
                        constexprs[name] = part
                        continue
                    if name == parameter.name:
                        signature[name] = kind
                    if isinstance(part, int) and part % 16 == 0:
                        aligned.append(name)
            self.launches.append(Launch(self.name, signature, constexprs, tuple(aligned), options, tuple(grid)))

        return launch


def _kind(value: Any) -> str:
    """Triton's type of a run-time argument; "constexpr" where its launcher makes a constant of it."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"an argument that no kernel takes: {value!r}")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def dtype_name(dtype: torch.dtype) -> str:
    return _TYPES[dtype]


# --- the problems, at published sizes -------------------------------------------------------------------------------


def _attention_to_mask(
    dtype: torch.dtype, dh: int, C: int = 171, dropout: float = 0.1, masks: bool = True, N: int = 1024, heads: int = 8
) -> Run:
    """A decoder layer on an image of 512 x 512; heads lie as [B, tokens, heads, dh], as the models make them."""

    def run(kernels: Any) -> None:
        q, k, v = (_heads(2, heads, n, dh, dtype) for n in (C, N, N))
        seed = empty(1, dtype=torch.int64) if dropout else None
        output, _, lse = kernels.forward(q, k, v, 0.125, dropout, seed, masks)
        grad_masks = empty(2, C, N, dtype=dtype) if masks else None
        kernels.backward(torch.empty_like(output), grad_masks, q, k, v, output, lse, 0.125, dropout, seed)

    return run


def _heads(b: int, heads: int, tokens: int, dh: int, dtype: torch.dtype) -> Tensor:
    return empty(b, tokens, heads, dh, dtype=dtype).transpose(1, 2)


def _add_layer_norm(dtype: torch.dtype, width: int, bias: bool = True) -> Run:
    """One image of 512 x 512."""

    def run(kernels: Any) -> None:
        x, residual = (empty(1, 1025, width, dtype=dtype) for _ in range(2))
        weight = empty(width, dtype=dtype)
        kernels.add_layer_norm(x, residual, weight, empty(width, dtype=dtype) if bias else None, 1e-5)

    return run


def _region_bridge(
    dtype: torch.dtype,
    dh: int,
    grid: tuple[int, int] = (32, 32),
    regions: tuple[int, int] = (4, 4),
    prompts_q: int = 11,
) -> Run:
    """CLIP-RC's encoder on 512 x 512: 11 tokens of prefix, 1024 patches, 16 regions."""

    def run(kernels: Any) -> None:
        rest = math.prod(grid) + math.prod(regions)
        q, k, v = (_heads(2, 12, n + rest, dh, dtype) for n in (prompts_q, 11, 11))
        output, lse = kernels.forward(q, k, v, 11, grid, regions, 0.125)
        kernels.backward(torch.empty_like(output), q, k, v, output, lse, 11, grid, regions, 0.125)

    return run


def _proposal_attention(dtype: torch.dtype, dh: int, batch: int = 1, Nq: int = 100) -> Run:
    """MAFT's encoder on 640 x 640: 1600 patches."""

    def run(kernels: Any) -> None:
        q, k_self, v_self = (_heads(batch, 12, Nq, dh, dtype) for _ in range(3))
        k, v = (_heads(batch, 12, 1600, dh, dtype) for _ in range(2))
        bits = empty(batch, Nq, 50, dtype=torch.int32)
        output, lse = kernels.forward(q, k_self, v_self, k, v, bits, 0.125)
        kernels.backward(torch.empty_like(output), q, k_self, v_self, k, v, bits, output, lse, 0.125)

    return run


def _relationship_descriptor(dtype: torch.dtype, C: int = 171, M: int | None = None, D: int = 512) -> Run:
    def run(kernels: Any) -> None:
        text, weight = empty(C, D, dtype=dtype), empty(D, 2 * D, dtype=dtype)
        visual = empty(4, D, dtype=dtype) if M is None else empty(4, M, D, dtype=dtype)
        grad = kernels.forward(text, visual, weight, None, empty(C, D, dtype=dtype))
        kernels.backward(grad, text, visual, weight, True, True, True, False)

    return run


def _mask_loss(
    dtype: torch.dtype, labels: torch.dtype, C: int = 156, gamma: float = 2.0, size: int = 512, grid: int = 32
) -> Run:
    def run(kernels: Any) -> None:
        logits, target = empty(16, C, grid, grid, dtype=dtype), empty(16, size, size, dtype=labels)
        kernels.forward(logits, target, 0.25, gamma)
        grads = (empty(16, C) for _ in range(3))
        kernels.backward(*grads, logits, target, 0.25, gamma)

    return run


def _masks_to_bits(dtype: torch.dtype, align: bool, logits: bool) -> Run:
    def run(kernels: Any) -> None:
        masks = empty(1, 100, 160, 160, dtype=dtype)
        kernels.masks_to_bits(masks, (40, 40), (640, 640) if logits else (160, 160), align, logits)

    return run


def _masks_to_labels(
    dtype: torch.dtype,
    windows: bool,
    weighting: str | None = None,
    details: bool = False,
    C: int = 171,
    labels: torch.dtype = torch.int64,
    top_k: int = 1,
) -> Run:
    """An image of 512 x 512 in one window, or of 512 x 683 in two that overlap."""

    def run(kernels: Any) -> None:
        n = 2 if windows else 1
        masks = empty(n, C, 32, 32, dtype=dtype)
        trusty = None if weighting is None else empty(n, 1, 32, 32, dtype=dtype)
        corners = [0, 0, 0, 171] if windows else [0, 0]
        canvas = (512, 683) if windows else (512, 512)
        size = (480, 640) if windows else (512, 512)
        kernels.masks_to_labels(
            masks, trusty, list(range(C * 3 // 4)), 0.1, weighting or "both", size, (512, 512), canvas, corners,
            top_k, labels, details,
        )  # fmt: skip

    return run


def _proposals_to_labels(
    dtype: torch.dtype, logits: bool, upsample: bool, align: bool, scores: bool, Nq: int = 100, C: int = 171
) -> Run:
    def run(kernels: Any) -> None:
        masks = empty(1, Nq, 160, 160, dtype=dtype)
        padded = (640, 640) if upsample else (160, 160)
        kernels.proposals_to_labels(
            empty(1, Nq, C), masks, (480, 640), logits, list(padded), list(padded), align, torch.int64, scores
        )

    return run


def _self_similarity(dtype: torch.dtype, dh: int, similarity: str, std: float | None) -> Run:
    """The last block on a window of 512 x 512."""

    def run(kernels: Any) -> None:
        q, k, v = (_heads(2, 12, 1025, dh, dtype) for _ in range(3))
        kernels.forward(q, k, v, similarity, 0.125, (32, 32), 1, std)

    return run


def _refine_maps(dilations: tuple[int, ...], labels: bool, names: int = 21) -> Run:
    """An image of 375 x 500; maps of any type are widened before the kernels see them."""

    def run(kernels: Any) -> None:
        image, maps, size = empty(1, 3, 336, 448), empty(1, names, 336, 448), (375, 500)
        kernels.refine_maps(image, maps, size, size, size, [0, 0], 10, dilations, 40.0, [1], labels)

    return run


def cases(op: str | None = None) -> list[Case]:
    """Every specialisation of every kernel: element types, head widths, options and the shapes that choose a tile."""
    found: list[Case] = []

    def add(name: str, run: Run, cores: bool | None, everywhere: bool = False) -> None:
        found.append(Case(current, name, run, cores, everywhere))

    current = "add_layer_norm"
    for dtype in FLOATS:
        for width in (32, 192, 768, 1024, 2048, 8192, 8191):
            name, spread = f"{dtype_name(dtype)}-{width}", width == 768 and dtype != torch.float16
            add(name, _add_layer_norm(dtype, width), False, spread)
        add(f"{dtype_name(dtype)}-768-no-bias", _add_layer_norm(dtype, 768, bias=False), False)
    current = "attention_to_mask"
    for dtype in FLOATS:
        for dh in (16, 32, 64, 96, 128):
            for dropout, masks in ((0.1, True), (0.0, True), (0.1, False), (0.0, False)):
                name = f"{dtype_name(dtype)}-dh{dh}" + "-dropout" * (dropout > 0) + "-masks" * masks
                spread = dh == 64 and dtype != torch.float16 and dropout > 0 and masks
                add(name, _attention_to_mask(dtype, dh, dropout=dropout, masks=masks), dtype in HALF, spread)
        add(f"{dtype_name(dtype)}-C1", _attention_to_mask(dtype, 64, C=1), dtype in HALF)
    current = "region_bridge_attention"
    for dtype in FLOATS:
        for dh in (12, 32, 64, 96, 128):
            name = f"{dtype_name(dtype)}-dh{dh}"
            add(name, _region_bridge(dtype, dh), dtype in HALF, dh == 64 and dtype != torch.float16)
        for grid, regions in (((32, 32), (32, 32)), ((32, 32), (1, 1)), ((30, 31), (4, 3)), ((14, 14), (2, 2))):
            name = f"{dtype_name(dtype)}-{grid[0]}x{grid[1]}-{regions[0]}x{regions[1]}"
            add(name, _region_bridge(dtype, 64, grid, regions, prompts_q=1), dtype in HALF)
    current = "proposal_attention"
    for dtype in FLOATS:
        for dh in (12, 32, 64, 96, 128):
            for batch, Nq in ((1, 100), (16, 300)):
                name = f"{dtype_name(dtype)}-dh{dh}-B{batch}-Nq{Nq}"
                spread = dh == 64 and batch == 1 and dtype != torch.float16
                add(name, _proposal_attention(dtype, dh, batch, Nq), dtype in HALF, spread)
    current = "self_similarity_attention"
    for dtype in FLOATS:
        for dh in (12, 32, 64, 96, 128):
            for similarity, std in (("kk", None), ("kk", 5.0), ("qq+kk", None), ("qq+kk", 5.0)):
                name = f"{dtype_name(dtype)}-dh{dh}-{similarity}" + "-prior" * (std is not None)
                spread = dh == 64 and dtype != torch.float16
                add(name, _self_similarity(dtype, dh, similarity, std), dtype in HALF, spread)
    current = "refine_maps"
    for dilations in ((8, 16), (1, 2, 4, 8, 12, 24), (1,)):
        for labels in (False, True):
            name = f"{len(dilations)}-dilations" + "-labels" * labels
            add(name, _refine_maps(dilations, labels), False, dilations == (8, 16))
    current = "relationship_descriptor"
    for dtype in FLOATS:
        for C, M, D in ((171, None, 512), (847, 16, 768), (1, None, 512), (20, None, 64)):
            name = f"{dtype_name(dtype)}-C{C}-M{M or 0}-D{D}"
            add(name, _relationship_descriptor(dtype, C, M, D), dtype in HALF, C == 171 and dtype != torch.float16)
    current = "mask_loss"
    for dtype in FLOATS:
        for labels in (torch.int64, torch.uint8, torch.int32, torch.int16):
            spread = dtype == torch.float32 and labels == torch.int64
            add(f"{dtype_name(dtype)}-{dtype_name(labels)}", _mask_loss(dtype, labels), False, spread)
        add(f"{dtype_name(dtype)}-C1-gamma1", _mask_loss(dtype, torch.int64, C=1, gamma=1.5), False)
        add(f"{dtype_name(dtype)}-same-size", _mask_loss(dtype, torch.uint8, size=32), False)
        add(f"{dtype_name(dtype)}-8-pixels", _mask_loss(dtype, torch.uint8, size=256, gamma=0.5), False)
    current = "masks_to_bits"
    for dtype in FLOATS:
        for align, logits in ((True, True), (False, True), (False, False)):
            name = f"{dtype_name(dtype)}" + "-align" * align + "-logits" * logits
            add(name, _masks_to_bits(dtype, align, logits), False, dtype == torch.float32)
    current = "masks_to_labels"
    for dtype in FLOATS:
        for windows in (False, True):
            for weighting in (None, "both", "seen", "unseen"):
                for details in (False, True):
                    name = f"{dtype_name(dtype)}" + "-windows" * windows + (f"-{weighting}" if weighting else "")
                    name += "-details" * details
                    spread = dtype == torch.float32 and weighting in (None, "both") and details == bool(weighting)
                    add(name, _masks_to_labels(dtype, windows, weighting, details), False, spread)
            for top_k in (1, 5):
                name = f"{dtype_name(dtype)}" + "-windows" * windows + f"-top{top_k}-int16-C1"
                add(name, _masks_to_labels(dtype, windows, None, True, 7, torch.int16, top_k), False)
    current = "proposals_to_labels"
    for dtype in FLOATS:
        for logits, upsample, align in (
            (True, True, True), (True, True, False), (True, False, False), (False, False, False),
        ):  # fmt: skip
            for scores in (False, True):
                name = f"{dtype_name(dtype)}" + "-logits" * logits + "-upsample" * upsample + "-align" * align
                spread = dtype == torch.float32 and scores and (align or not logits)
                add(
                    name + "-scores" * scores,
                    _proposals_to_labels(dtype, logits, upsample, align, scores),
                    True,
                    spread,
                )
    return [case for case in found if op in (None, case.op)]
