"""region_bridge_attention: structured attention against dense-mask attention, over the number of region tokens.

    python bench/ops/region_bridge_attention.py                  # all shapes, results in bench/results/<device>/
    python bench/ops/region_bridge_attention.py voc-M16 voc-M1024 --rounds 20
    python bench/ops/region_bridge_attention.py --device cuda --dtype bfloat16

Shapes are CLIP ViT-B/16 at 512 x 512: 12 heads of width 64, 32 x 32 patches, a global token and K = 10 (voc) or 100
(coco) prompts, M region tokens. "sdpa no regions" is unmasked attention over prefix and patches alone: the floor, less
work than was asked for. Dense masks and FlexAttention's block masks are made before the clock starts. All contenders
and shapes of a pass take turns in one process, so their ratios hold on a busy machine too. Peak memory is a call's,
inputs and the dense mask (4 E^2 bytes: 17 MB at M = 1024) not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: E402

from bench import harness  # noqa: E402
from bench.harness import Contender, within_budget  # noqa: E402
from zs3fast.ops import region_bridge_attention, use_backend  # noqa: E402
from zs3fast.ops.region_bridge_attention import reference, region_bridge_mask  # noqa: E402

HEADS, WIDTH = 12, 64
SHAPES = {  # num_prefix, grid, regions
    **{f"voc-M{side * side}": (11, (32, 32), (side, side)) for side in (1, 4, 8, 16, 32)},
    "coco-M16": (101, (32, 32), (4, 4)),
    "tiny": (3, (5, 4), (2, 2)),  # exercises this script, measures nothing
}
PASSES = ("forward", "backward", "forward+backward")
FLOOR = "sdpa no regions"
CONTENDERS = ("zs3fast", "sdpa dense mask", "flex compiled", "xformers bias", FLOOR)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unsupported(Exception):
    """A contender that does not run on this device; the message is its own."""


def make_inputs(shape: str, batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed projection [B, E, 3, heads, dh] and a gradient [B, E, heads, dh], seeded."""
    num_prefix, grid, regions = SHAPES[shape]
    E = num_prefix + math.prod(grid) + math.prod(regions)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, E, 4, HEADS, WIDTH, generator=generator).to(device, dtype)
    return packed[:, :, :3].contiguous(), packed[:, :, 3].contiguous()


def attention(contender: str, shape: str, device: str, dtype: torch.dtype) -> Attend:
    """q, k, v [B, heads, E, dh] -> [B, heads, E, dh]; the floor has no region rows."""
    num_prefix, grid, regions = SHAPES[shape]
    E = num_prefix + math.prod(grid) + math.prod(regions)
    if contender == "zs3fast":
        return partial(region_bridge_attention, num_prefix=num_prefix, grid=grid, regions=regions)
    if contender == FLOOR:
        return F.scaled_dot_product_attention
    mask = region_bridge_mask(num_prefix, grid, regions, torch.device(device))
    bias = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, float("-inf"))
    if contender == "sdpa dense mask":
        return partial(F.scaled_dot_product_attention, attn_mask=bias)
    if contender == "flex compiled":
        block_mask = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, E, E, device=device)
        return partial(torch.compile(flex_attention), block_mask=block_mask)
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise Unsupported(str(error)) from error

    def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        padded = F.pad(bias, (0, -E % 8))[:, :E]  # rows must start on a multiple of 8
        return memory_efficient_attention(q, k, v, attn_bias=padded.expand(len(q), HEADS, E, E)).transpose(1, 2)

    return xformers


def make_run(contender: str, shape: str, pass_: str, args: argparse.Namespace) -> Callable[[], tuple[Tensor, ...]]:
    """The timed call: -> (output,), (gradient of the packed projection,) or both."""
    packed, grad = make_inputs(shape, args.batch, args.device, DTYPES[args.dtype])
    attend = attention(contender, shape, args.device, DTYPES[args.dtype])
    if contender == FLOOR:
        without = packed.shape[1] - math.prod(SHAPES[shape][2])
        packed, grad = packed[:, :without], grad[:, :without]
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(q, k, v),)

    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def both() -> tuple[Tensor, ...]:
        output = attend(*inputs)
        return (output.detach(), *torch.autograd.grad(output, inputs, grad.transpose(1, 2)))

    try:
        if pass_ == "forward":
            forward()
            return forward
        if pass_ == "forward+backward":
            both()
            return both
        output = attend(*inputs)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, inputs, grad.transpose(1, 2), retain_graph=True)

        backward()
        return backward
    except NotImplementedError as error:  # FlexAttention's backward and xformers on a CPU
        raise Unsupported(str(error).splitlines()[0]) from error


def expected(shape: str, pass_: str, args: argparse.Namespace) -> tuple[Tensor, ...]:
    """What every contender but the floor must give, by the definition in float64."""
    packed, grad = make_inputs(shape, args.batch, args.device, DTYPES[args.dtype])
    num_prefix, grid, regions = SHAPES[shape]
    tensors = [x.transpose(1, 2).double().detach().requires_grad_() for x in packed.unbind(2)]
    output = reference(*tensors, num_prefix=num_prefix, grid=grid, regions=regions)
    grads = () if pass_ == "forward" else torch.autograd.grad(output, tensors, grad.transpose(1, 2).double())
    return grads if pass_ == "backward" else (output.detach(), *grads)


def check(wanted: tuple[Tensor, ...], budget: float, got: tuple[Tensor, ...]) -> None:
    names = ("dq", "dk", "dv") if len(wanted) == 3 else ("output", "dq", "dk", "dv")
    for name, g, w in zip(names, got, wanted, strict=False):
        within_budget(name, g, w, budget)


def child_peak(contender: str, shape: str, pass_: str, args: argparse.Namespace) -> int:
    """Bytes a call needs at its peak on the CPU, measured in a process of its own: no other call's memory counts."""
    command = [sys.executable, __file__, shape, "--peak-of", contender, "--passes", pass_, "--backend", args.backend]
    command += ["--threads", str(args.threads), "--dtype", args.dtype, "--batch", str(args.batch)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def report_peak(contender: str, shape: str, pass_: str, args: argparse.Namespace) -> None:
    """The child's side. Making the call ran it once, so compiling and loading code are over."""
    run = make_run(contender, shape, pass_, args)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory must not hide what the call takes
    harness.reset_peak_resident()
    before = harness.resident_bytes()
    run()
    print(harness.peak_resident_bytes() - before)


def measure(shapes: list[str], pass_: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    budget = 1e-5 if args.dtype == "float32" else 2e-2
    calls = {}
    for shape in shapes:
        wanted = expected(shape, pass_, args)
        for contender in (c for c in CONTENDERS if c not in args.skip):
            try:
                run = make_run(contender, shape, pass_, args)
            except Unsupported as error:
                print(f"{shape:10s} {pass_:17s} {contender:18s} does not run here: {error}", flush=True)
                continue
            checked = None if contender == FLOOR else partial(check, wanted, budget)
            calls[shape, contender] = Contender(f"{shape}/{contender}", run, checked)
    timings = harness.measure(list(calls.values()), rounds=args.rounds, device=args.device)
    described = harness.environment(args.device)
    rows, fastest = [], {}
    for (shape, contender), timing in zip(calls, timings.values(), strict=True):
        on_cpu = args.device == "cpu" and not args.no_peaks
        peak = child_peak(contender, shape, pass_, args) if on_cpu else timing.peak_bytes
        rows.append(
            harness.row(
                "region_bridge_attention",
                f"{contender} ({args.backend})" if contender == "zs3fast" else contender,
                shape,
                timing,
                dtype=DTYPES[args.dtype],
                pass_=pass_,
                device=args.device,
                peak_bytes=peak,
                described=described,
                min_ms=round(min(timing.samples) * 1e3, 4),
                batch=args.batch,
            )
        )
        fastest[shape, contender] = rows[-1]["min_ms"]
        memory = "" if peak is None else f"{rows[-1]['peak_mib']:9.1f} MiB"
        times = f"min {rows[-1]['min_ms']:9.2f} ms  p50 {rows[-1]['p50_ms']:9.2f} ms"
        print(f"{shape:10s} {pass_:17s} {rows[-1]['backend']:18s} {times} {memory}", flush=True)
    for shape in shapes:
        ours, floor = fastest.get((shape, "zs3fast")), fastest.get((shape, FLOOR))
        small = fastest.get(("voc-M16", "zs3fast"))
        if ours and floor:
            print(f"{shape:10s} {pass_:17s} zs3fast / {FLOOR}: {ours / floor:.3f}")
        if ours and small and shape.startswith("voc"):
            print(f"{shape:10s} {pass_:17s} zs3fast / zs3fast at M = 16: {ours / small:.3f}")
    return rows


def main() -> None:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", help=", ".join(SHAPES))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=["forward", "backward"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--backend", default="auto", help="backend of zs3fast's op")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--skip", nargs="+", default=[], choices=CONTENDERS)
    parser.add_argument("--no-peaks", action="store_true", help="leave out peak memory: a process each on a CPU")
    parser.add_argument("--json", type=Path, default=None, help="where to write instead of bench/results/<device>/")
    parser.add_argument("--peak-of", default=None, choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = args.shapes or [s for s in SHAPES if s != "tiny"]
    if unknown := set(shapes) - set(SHAPES):
        parser.error(f"unknown shapes {sorted(unknown)}, expected some of {', '.join(SHAPES)}")
    torch.set_num_threads(args.threads)
    with use_backend(args.backend):
        if args.peak_of is not None:
            return report_peak(args.peak_of, shapes[0], args.passes[0], args)
        rows = [row for pass_ in args.passes for row in measure(shapes, pass_, args)]
    if shapes != ["tiny"]:
        harness.write_results(args.json or harness.results_path("region_bridge_attention", args.device), rows)


if __name__ == "__main__":
    main()
