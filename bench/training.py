"""Training: the largest batch in a memory budget, the whole step, 1 against N processes, what activations take.

    python bench/training.py                                   # all four, ZegCLIP, TagCLIP and CLIP-RC, C = 20 and 171
    python bench/training.py largest --memory-gib 8 --classes 20
    python bench/training.py scaling --processes 1 2 --batch 4 --models tagclip
    python bench/training.py step --device cuda --precision bf16 --batch 16

largest: the most images a training step takes before memory runs out, each try in a process of its own whose memory is
limited (CPU) or that has the GPU to itself. Contenders: the official structure in eager PyTorch, zs3fast, and zs3fast
that recomputes its frozen encoder blocks. step: what `zs3fast train` runs an iteration (forward, backward, AdamW), on
prepared images, for each precision, with recomputation and, with --compile, as one graph. scaling: the same step over
processes that share the machine's threads (CPU) or take a GPU each; the batch of an iteration stays the same.
activations: the bytes that each image adds to what autograd keeps from forward to backward, counted and not sampled.
`bench/run.py --pass training` times forward and backward against the official structure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from bench import contenders, harness  # noqa: E402
from bench.setting import ONE_STAGE, Setting, make_inputs, make_labels  # noqa: E402

PARTS = ("largest", "step", "scaling", "activations")
CONTENDERS = ("official", "zs3fast", "zs3fast recompute")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="largest, step, scaling, activations (all)")
    parser.add_argument("--models", nargs="+", choices=ONE_STAGE, default=list(ONE_STAGE))
    parser.add_argument("--classes", nargs="+", type=int, default=[20, 171])
    parser.add_argument("--memory-gib", type=float, default=8.0, help="budget of `largest` on the CPU (8)")
    parser.add_argument("--most", type=int, default=256, help="batches that `largest` stops at (256)")
    parser.add_argument("--batch", type=int, default=4, help="images an iteration in `step` and `scaling` (4)")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--compile", action="store_true", help="`step` through torch.compile, too")
    parser.add_argument("--rounds", type=int, default=3, help="timed iterations (3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads, over all processes")
    parser.add_argument("--tiny", action="store_true", help="a toy network: exercises this script, measures nothing")
    parser.add_argument("--json", type=Path, default=None, help="where to write (bench/results/<device>/training.json)")
    parser.add_argument("--probe", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if set(args.parts) - set(PARTS):
        parser.error(f"PART: expected some of {', '.join(PARTS)}, got {' '.join(args.parts)}")
    args.parts = args.parts or list(PARTS)
    if args.json is None and not args.tiny:
        args.json = harness.results_path("training", args.device)
    return args


def make_setting(args: argparse.Namespace, method: str, classes: int, batch: int) -> Setting:
    setting = Setting(method, classes, batch)
    return setting.tiny() if args.tiny else setting


def make_model(contender: str, setting: Setting, device: str) -> nn.Module:
    baseline = contenders.make_baseline(setting, "cpu" if contender != "official" else device)
    if contender == "official":
        return baseline
    model = contenders.make_ours(setting, baseline.state_dict(), device)
    if contender.endswith("recompute"):
        from zs3fast.training.setup import checkpoint_blocks

        checkpoint_blocks(model)
    return model


# The largest batch --------------------------------------------------------------------------------------------------


def measure_largest(args: argparse.Namespace, method: str, classes: int) -> list[dict[str, Any]]:
    """A row a contender: how many images a training step takes at most in the budget."""
    from zs3fast.training.batch_size import largest_batch  # not at the top: the official contender runs without us

    rows = []
    for contender in CONTENDERS:
        setting = make_setting(args, method, classes, 1)
        batch, peak = largest_batch(partial(probe, args, contender, setting), args.most)
        room = "the device" if args.device != "cpu" else f"{args.memory_gib:g} GiB"
        reached = " (and more)" if batch == args.most else ""
        print(f"largest {setting.name} C={classes} {contender}: {batch}{reached} images in {room}", flush=True)
        extra = {"largest_batch": batch, "largest_tried": args.most, "budget_gib": args.memory_gib}
        shape = setting.shape.rpartition("-")[0]
        rows.append(row(args, setting, contender, shape, "largest batch", None, peak_bytes=peak, **extra))
    return rows


def probe(args: argparse.Namespace, contender: str, setting: Setting, batch: int) -> int | None:
    """Peak bytes of a process that trains one step; None: it ran out of memory."""
    request = {"contender": contender, "setting": asdict(replace(setting, batch=batch))}
    request |= {"device": args.device, "threads": args.threads}
    request["limit"] = int(args.memory_gib * 2**30)
    command = [sys.executable, __file__, "--probe", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{contender} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def run_probe(request: dict[str, Any]) -> None:
    torch.set_num_threads(request["threads"])
    device, setting = request["device"], Setting(**request["setting"])
    if device == "cpu":
        harness.limit_memory(request["limit"])
    try:
        model = make_model(request["contender"], setting, device)
        side = "official" if request["contender"] == "official" else "zs3fast"
        contenders.make_call(side, "training", setting, model, device)()
        peak = harness.peak_resident_bytes() if device == "cpu" else torch.cuda.max_memory_allocated()
    except (RuntimeError, MemoryError) as error:
        if not harness.out_of_memory(error):
            raise
        peak = None
    print(json.dumps({"peak_bytes": peak}))


# The step that training runs ----------------------------------------------------------------------------------------


def measure_processes(args: argparse.Namespace, method: str, classes: int, pass_: str) -> list[dict[str, Any]]:
    """Rows of the whole training step: variants in one process ("step"), or one variant in several ("scaling")."""
    ways = ("", " recompute", *([" compiled"] if args.compile else []))
    variants = [(1, precision, way) for precision in args.precision for way in ways]
    if pass_ == "scaling":
        variants = [(count, args.precision[0], "") for count in args.processes]
    rows, first = [], None
    for count, precision, way in variants:
        setting = make_setting(args, method, classes, args.batch)
        samples, peak = in_processes(args, setting, count, precision, way)
        timing = harness.Timing(samples)
        seconds = timing.percentile(50)
        first = first or seconds
        name = f"zs3fast{way}, {count} process{'es' if count > 1 else ''}"
        speed = args.batch / seconds
        print(
            f"{pass_} {setting.name} C={classes} {precision} {name}: {seconds:.3f} s, {speed:.2f} images/s", flush=True
        )
        extra = {"processes": count, "images_per_second": round(speed, 3), "speed_up": round(first / seconds, 3)}
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        rows.append(row(args, setting, name, setting.shape, pass_, timing, peak_bytes=peak, dtype=dtype, **extra))
    return rows


def in_processes(
    args: argparse.Namespace, setting: Setting, count: int, precision: str, way: str
) -> tuple[list[float], int]:
    """Seconds of each timed iteration, and the first process's peak bytes."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = str(Path(folder) / "result.json")
        work = (count, port, setting, precision, way, vars(args), out)
        processes = [context.Process(target=train_steps, args=(rank, *work)) for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"{setting.name} in {count} processes failed: see above")
        result = json.loads(Path(out).read_text())
    return result["samples"], result["peak_bytes"]


def train_steps(
    rank: int, count: int, port: int, setting: Setting, precision: str, way: str, args: dict[str, Any], out: str
) -> None:
    """One process of a run on prepared images: the loop's own iteration, without reading and logging."""
    from zs3fast.training import loop, optimiser, setup
    from zs3fast.training.config import OptimizerConfig
    from zs3fast.training.steps import OneStageStep
    from zs3fast.utils import distributed

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(max(args["threads"] // count, 1))
    with distributed.dist_env(args["device"]) as group:
        model = make_model(f"zs3fast{way}", setting, str(group.device))
        optimiser.freeze(model)
        images, text = make_inputs(setting)
        share = setting.batch // count
        mine = slice(rank * share, (rank + 1) * share)
        batch = {"images": images[mine], "labels": make_labels(setting)[mine]}
        batch = {name: value.to(group.device) for name, value in batch.items()}
        step = OneStageStep(model, text, setting="inductive", ignore_index=255, precision=precision)
        step.to(group.device).train()
        if way == " compiled":
            step.compile()
        spread = distributed.parallelize(step, "ddp", group)
        optimizer = optimiser.make_optimizer(model, OptimizerConfig())
        split = setup.Shares(setting.batch, share, share, 1)
        samples = []
        for iteration in range(1 + args["rounds"]):
            group.barrier()
            started = time.perf_counter()
            loop.gradients(spread, step, batch, split, group, (0, iteration))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if group.device.type == "cuda":
                torch.cuda.synchronize()
            group.barrier()
            samples.append(time.perf_counter() - started)
        if group.main:
            cuda = group.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated() if cuda else harness.peak_resident_bytes()
            Path(out).write_text(json.dumps({"samples": samples[1:], "peak_bytes": peak}))


# What autograd keeps --------------------------------------------------------------------------------------------------


def measure_activations(args: argparse.Namespace, method: str, classes: int) -> list[dict[str, Any]]:
    """Rows: bytes an image of the official structure and of ours, from steps of one and of two images."""
    rows = []
    for contender in CONTENDERS[:2]:
        kept = [kept_bytes(contender, make_setting(args, method, classes, batch), args.device) for batch in (1, 2)]
        setting = make_setting(args, method, classes, 1)
        print(f"activations {setting.name} C={classes} {contender}: {(kept[1] - kept[0]) / 2**20:.1f} MiB an image")
        rows.append(row(args, setting, contender, setting.shape, "activations", None, peak_bytes=kept[1] - kept[0]))
    return rows


def kept_bytes(contender: str, setting: Setting, device: str) -> int:
    """Bytes that autograd keeps of one forward pass with its loss; weights apart."""
    from zs3fast.utils.memory import kept_for_backward

    model = make_model(contender, setting, device)
    side = "official" if contender == "official" else "zs3fast"
    call = contenders.make_call(side, "training", setting, model, device)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept_for_backward(call).values())


def row(
    args: argparse.Namespace, setting: Setting, backend: str, shape: str, pass_: str, timing: Any, **extra: Any
) -> Any:
    described = harness.environment(args.device)
    if "threads" in described:
        described["threads"] = args.threads
    return harness.row(
        setting.name, backend, shape, timing, pass_=pass_, device=args.device, described=described, **extra
    )


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse_arguments(argv)
    if args.probe is not None:
        run_probe(json.loads(args.probe))
        return []
    rows = []
    for part in args.parts:
        for classes in args.classes:
            for method in args.models:
                if part == "largest":
                    rows += measure_largest(args, method, classes)
                elif part == "activations":
                    rows += measure_activations(args, method, classes)
                else:
                    rows += measure_processes(args, method, classes, part)
    if args.json is not None:
        harness.update_results(args.json, rows)
        print(f"written to {args.json}")
    return rows


if __name__ == "__main__":
    main()
