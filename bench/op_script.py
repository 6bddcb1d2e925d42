"""What the scripts in bench/ops share: options, turns in one process, peak memory in a process each, rows.

A script says which shapes, passes and contenders there are and makes one contender's call; `run` does the rest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.harness import Contender
from bench.setting import DTYPES
from zs3fast.ops import use_backend

OURS = "zs3fast"


class Unsupported(Exception):
    """A contender that does not run here; the message says why."""


@dataclass(frozen=True)
class OpScript:
    """One benchmark file.

    Args:
        op: the op's name, and that of its results file.  file: the script's `__file__`.  doc: its docstring.
        shapes: names of shapes; "tiny" only exercises the script.
        contenders: names; "zs3fast" is ours.
        make: (contender, shape, pass, options) -> what to time. Raises `Unsupported` where that does not run.
        passes, dtypes: choices; the first dtype is the default.
        default_passes: what is run when none is asked for; None: all.
        rounds: samples of each.
        optional: shapes that run only when named.  large: those of them that take gigabytes or minutes on a CPU.
        together: all shapes of a pass take turns in one process, so that their ratios hold on a busy machine too.
    """

    op: str
    file: str
    doc: str
    shapes: Collection[str]
    contenders: Sequence[str]
    make: Callable[[str, str, str, argparse.Namespace], Contender]
    passes: Sequence[str] = ("forward",)
    default_passes: Sequence[str] | None = None
    dtypes: Sequence[str] = ("float32",)
    rounds: int = 10
    optional: Collection[str] = ()
    large: Collection[str] = ()
    together: bool = False


def run(script: OpScript, argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write `bench/results/<device>/<op>.json`; the rows."""
    args = parse(script, argv)
    torch.set_num_threads(args.threads)
    with use_backend(args.backend):
        if args.peak_of is not None:
            print(call_peak(script, args))
            return []
        groups = [args.shapes] if script.together else [[shape] for shape in args.shapes]
        rows: list[dict[str, Any]] = []
        path = args.json or harness.results_path(script.op, args.device)
        for pass_, shapes in [(pass_, shapes) for pass_ in args.passes for shapes in groups]:
            rows += measure(script, shapes, pass_, args)
            if args.shapes != ["tiny"] and args.device != "cpu":  # as they come: a later shape may hang or crash
                (harness.update_results if args.update else harness.write_results)(path, rows)
    if args.shapes != ["tiny"]:
        (harness.update_results if args.update else harness.write_results)(path, rows)
    return rows


def parse(script: OpScript, argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, examples = script.doc.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", help=", ".join(script.shapes))
    default = list(script.default_passes or script.passes)
    parser.add_argument("--passes", nargs="+", choices=script.passes, default=default)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=script.dtypes, default=script.dtypes[0])
    parser.add_argument("--backend", default="auto", help="backend of zs3fast's op")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--rounds", type=int, default=script.rounds)
    parser.add_argument("--skip", nargs="+", default=[], choices=[name for name in script.contenders if name != OURS])
    parser.add_argument("--no-peaks", dest="peaks", action="store_false", help="skip peak memory (a process a row)")
    parser.add_argument("--json", type=Path, help=f"where to write (bench/results/<device>/{script.op}.json)")
    parser.add_argument("--update", action="store_true", help="keep the file's rows that are not measured anew")
    parser.add_argument("--peak-of", default=None, choices=script.contenders, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.shapes = args.shapes or [shape for shape in script.shapes if shape not in ("tiny", *script.optional)]
    if unknown := set(args.shapes) - set(script.shapes):
        parser.error(f"unknown shapes {sorted(unknown)}, expected some of {', '.join(script.shapes)}")
    return args


def measure(script: OpScript, shapes: Sequence[str], pass_: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one pass; whoever does not run here is named and left out."""
    calls: dict[tuple[str, str], Contender] = {}
    for shape in shapes:
        for name in script.contenders:
            if name in args.skip:
                continue
            try:
                call = replace(script.make(name, shape, pass_, args), name=f"{shape}/{name}")
                if name != OURS and args.device != "cpu":  # on a borrowed card one contender must not cost the others
                    call.run()
                    if call.check is not None:
                        call.check(call.run())
                calls[shape, name] = call
            except Unsupported as error:
                print(f"{shape:19s} {pass_:17s} {name:23s} does not run here: {str(error)[:100]}", flush=True)
            except Exception as error:
                if name == OURS or args.device == "cpu":
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{shape:19s} {pass_:17s} {name:23s} failed: {reason[:200]}", flush=True)
    timings = harness.measure(list(calls.values()), rounds=args.rounds, device=args.device, own_time=True)
    described = harness.environment(args.device)
    rows = []
    for (shape, name), timing in zip(calls, timings.values(), strict=True):
        on_cpu = args.device == "cpu" and args.peaks
        row = harness.row(
            script.op,
            f"{name} ({args.backend})" if name == OURS else name,
            shape,
            timing,
            dtype=DTYPES[args.dtype],
            pass_=pass_,
            device=args.device,
            peak_bytes=child_peak(script, name, shape, pass_, args) if on_cpu else timing.peak_bytes,
            described=described,
        )
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:9.1f} MiB"
        times = f"{row['p20_ms']:9.2f} {row['p50_ms']:9.2f} {row['p80_ms']:9.2f} ms"
        own = "".join(f" {k} {v:.4g}" if isinstance(v, float) else f" {k}: {v}" for k, v in (timing.gpu or {}).items())
        print(f"{shape:19s} {pass_:17s} {row['backend']:23s} {times} {memory}{own}", flush=True)
        rows.append(row)
    return rows


def child_peak(script: OpScript, name: str, shape: str, pass_: str, args: argparse.Namespace) -> int:
    """Bytes a call needs at its peak on the CPU, measured in a process of its own: no other call's memory counts."""
    command = [sys.executable, script.file, shape, "--peak-of", name, "--passes", pass_, "--backend", args.backend]
    command += ["--dtype", args.dtype, "--threads", str(args.threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def call_peak(script: OpScript, args: argparse.Namespace) -> int:
    """The child's side. The second call counts: the first, on the tiny shape where that will do, loads code."""
    (shape,), (pass_,), name = args.shapes, args.passes, args.peak_of
    script.make(name, shape if "compiled" in name else "tiny", pass_, args).run()
    call = script.make(name, shape, pass_, args).run
    harness.reset_peak_resident()
    before = harness.resident_bytes()
    call()
    return harness.peak_resident_bytes() - before
