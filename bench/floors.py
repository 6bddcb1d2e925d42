"""Floors under `run.py`: the work an encoder cannot do without, timed beside the contenders.

Matrix products at the live shapes: prompt tokens are never queries, and their keys and values do not depend on the
image, so the rows are B * (1 + N) and the attention is (1 + N) x (1 + K + N). CLIP-RC's encoder has M rows more, and
attention between each region token and its window, both ways. MAFT's proposals join the patches in the masked layers
(their own attention, a few patches each, is not counted) and alone need the last layer's output. ClsCLIP shares all
layers before the first navigated one, and that one's projections, between the classes. Decoder and pixel stage are in
no floor: they come on top, and CLIP-RC's decoder of M * C queries is no small part. Every product runs on the fastest
kernel there is for its shape, torch's or zs3fast's, by a trial before anything is timed; attention on zs3fast's kernel
has its softmax with it.

Bytes: weights, images and labels, moved once at the bandwidth that a copy reaches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.setting import Setting
from zs3fast.ops import encoder_attention, fused_linear

PRODUCTS, ATTENTION, BYTES = "floor: products", "floor: products + attention", "floor: bytes"
NAMES = (PRODUCTS, ATTENTION, BYTES)
SHARED_LAYERS = 2  # ClsCLIP: the layers before the first navigated one


@dataclass(frozen=True)
class Linear:
    """tokens [rows, inner] times a weight of its own, `times` times one after the other."""

    rows: int
    inner: int
    columns: int
    times: int = 1

    @property
    def macs(self) -> int:
        return self.rows * self.inner * self.columns * self.times


@dataclass(frozen=True)
class Attention:
    """The two products of `batch` heads, `times` times."""

    batch: int
    queries: int
    keys: int
    head_width: int
    times: int = 1

    @property
    def macs(self) -> int:
        return 2 * self.batch * self.queries * self.keys * self.head_width * self.times


Work = Linear | Attention
Call = Callable[[], object]


def fastest(calls: Sequence[Call], trials: int = 3) -> int:
    """Index of the call whose best time is the shortest, trials taken in turn after one call each to warm up."""
    best = [math.inf] * len(calls)
    for trial in range(trials + 1):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if trial:
                best[index] = min(best[index], time.perf_counter() - start)
    return best.index(min(best))


def block(
    s: Setting, rows: int, attention: list[Attention], *, q_rows: int | None = None, outputs: int | None = None,
    times: int = 1, input_times: int | None = None,
) -> list[Work]:  # fmt: skip
    """A transformer block. q_rows, outputs: tokens that need queries, and all that follows; None: every row."""
    width = s.width
    inputs = times if input_times is None else input_times
    qkv = [Linear(rows, width, 3 * width, inputs)]
    if q_rows is not None:
        qkv = [Linear(rows, width, 2 * width, inputs), Linear(q_rows, width, width, inputs)]
    outputs = rows if outputs is None else outputs
    after = [(width, width), (width, 4 * width), (4 * width, width)]
    return [*qkv, *attention, *(Linear(outputs, inner, columns, times) for inner, columns in after)]


def layers(s: Setting) -> list[list[Work]]:
    """The live products of every layer of the encoder."""
    B, N, head_width = s.batch, s.patches, s.width // s.heads
    heads, live = B * s.heads, B * (1 + N)
    if s.method == "maft":
        Nq, plain = s.proposals, Attention(heads, N, N, head_width)
        before = [block(s, live, [Attention(heads, 1 + N, 1 + N, head_width)]) for _ in range(s.start_layer)]
        masked = [block(s, B * (Nq + N), [plain]) for _ in range(s.layers - s.start_layer - 1)]
        return [*before, *masked, block(s, B * (Nq + N), [], q_rows=B * Nq, outputs=B * Nq)]
    if s.method == "clsclip":
        C, one = s.classes, Attention(heads, 1 + N, 1 + N, head_width)
        each = Attention(heads, 1 + N, 1 + N, head_width, C)
        shared = [block(s, live, [one]) for _ in range(SHARED_LAYERS)]
        merged = block(s, B * N, [each], outputs=live, times=C, input_times=1)
        return [*shared, merged, *(block(s, live, [each], times=C) for _ in range(s.layers - SHARED_LAYERS - 1))]
    attention = [Attention(heads, 1 + N, 1 + s.prompts + N, head_width)]
    if s.encoder_regions:
        window = (s.image_size // s.patch_size // math.isqrt(s.regions)) ** 2
        pairs = ((window, 1), (1, window + 1))
        attention += [Attention(heads * s.regions, queries, keys, head_width) for queries, keys in pairs]
    return [block(s, live + B * s.encoder_regions, attention) for _ in range(s.layers)]


def ends(s: Setting) -> list[Linear]:
    """Patch embedding, and the projection to the joint space where a method has one."""
    stem = Linear(s.batch * s.patches, 3 * s.patch_size**2, s.width)
    if s.method == "clsclip":
        return [stem]
    rows = s.batch * (s.proposals if s.method == "maft" else 1 + s.patches + s.encoder_regions)
    return [stem, Linear(rows, s.width, s.embed_dim)]


class Floor:
    """The encoder's products alone, every product with a weight of its own.

    Args:
        attention: with (True) or without (False) the two products of the attention.
    """

    def __init__(self, setting: Setting, attention: bool, device: str | torch.device = "cpu"):
        torch.manual_seed(0)
        self.place = {"device": device, "dtype": setting.torch_dtype}
        self.buffers: dict[tuple[str, ...], Tensor] = {}
        self.fastest: dict[Work, int] = {}
        works = [*ends(setting), *(work for layer in layers(setting) for work in layer)]
        self.works = [work for work in works if attention or isinstance(work, Linear)]
        self.calls = [(self._call(work), work.times) for work in self.works]

    def _buffer(self, role: str, *shape: int) -> Tensor:
        """One tensor for all products of this role and size."""
        key = (role, *map(str, shape))
        if key not in self.buffers:
            self.buffers[key] = torch.randn(*shape, **self.place) * shape[-1] ** -0.5
        return self.buffers[key]

    def _call(self, work: Work) -> Call:
        """The product on the kernel that was fastest for its shape; on a GPU torch's, as ours are the CPU's."""
        calls = self._linear(work) if isinstance(work, Linear) else self._attention(work)
        if work not in self.fastest:
            self.fastest[work] = fastest(calls) if torch.device(self.place["device"]).type == "cpu" else 0
        return calls[self.fastest[work]]

    def _linear(self, work: Linear) -> list[Call]:
        weight = torch.randn(work.columns, work.inner, **self.place) * work.inner**-0.5
        tokens = self._buffer("in", work.rows, work.inner)
        out = self._buffer("out", work.rows, work.columns)
        return [lambda: torch.mm(tokens, weight.t(), out=out), lambda: fused_linear(tokens, weight)]

    def _attention(self, work: Attention) -> list[Call]:
        q = self._buffer("q", work.batch, work.queries, work.head_width)
        k, v = (self._buffer(role, work.batch, work.keys, work.head_width) for role in "kv")
        scores, p = (self._buffer(role, work.batch, work.queries, work.keys) for role in ("scores", "p"))
        attended = self._buffer("attended", work.batch, work.queries, work.head_width)

        def products() -> None:
            torch.bmm(q, k.transpose(1, 2), out=scores)
            torch.bmm(p, v, out=attended)

        side = [self._buffer("side", 1, rows, work.batch, work.head_width) for rows in (work.queries, work.keys)]
        return [products, lambda: encoder_attention(side[0], side[1], side[1])]

    def __call__(self) -> None:
        for call, times in self.calls:
            for _ in range(times):
                call()

    def flops(self) -> int:
        """Floating-point operations of one call, 2 a multiply-add."""
        return 2 * sum(work.macs for work in self.works)


class BytesFloor:
    """Weights and images read and labels written once, as a copy that moves as many bytes, half of them read."""

    def __init__(self, setting: Setting, weights: int, device: str | torch.device = "cpu"):
        item = setting.torch_dtype.itemsize
        height, width = setting.label_size
        self.bytes = weights * item + setting.batch * (3 * setting.image_size**2 * item + 8 * height * width)
        self.source = torch.zeros(self.bytes // 2, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    def __call__(self) -> None:
        self.target.copy_(self.source)
