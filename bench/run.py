"""Whole models, image in, label map out: the official structure against zs3fast against the floor under both.

    python bench/run.py                        # all models and class counts, results in bench/results/<device>/
    python bench/run.py --quick                # under two minutes on two cores
    python bench/run.py --models tagclip --classes 171 --stages
    python bench/run.py --compare before.json  # this run beside an earlier one of the same device
    python bench/run.py --models clip_rc --pass training --regions 16 256 --probes-only  # memory of a training step

ViT-B/16 at 512 x 512, random weights, the published prompt counts: C = 20 with 10 prompts a layer, C = 171 with 100;
CLIP-RC with M = 16 regions. Everything is timed side by side in one process, in interleaved rounds; start-up and memory
come from a process each. A training step is forward and backward on the seen classes, without the optimiser.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402

from bench import contenders, harness, stages  # noqa: E402
from bench.contenders import Setting  # noqa: E402
from bench.harness import Contender  # noqa: E402

PRODUCTS, ATTENTION = "floor: products", "floor: products + attention"
KEY = ("name", "backend", "shape", "dtype", "pass")

console = Console() if sys.stdout.isatty() else Console(width=120)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=contenders.METHODS, default=None, help="all; quick: zegclip")
    parser.add_argument(
        "--classes", nargs="+", type=int, choices=tuple(contenders.PROMPTS), default=None, help="20 171"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images a call (1)")
    parser.add_argument(
        "--regions", nargs="+", type=int, default=[contenders.PUBLISHED_REGIONS], help="M of CLIP-RC, squares (16)"
    )
    parser.add_argument("--pass", dest="passes", nargs="+", choices=contenders.PASSES, default=["inference"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--backend", default="auto", help="backend of zs3fast's ops")
    parser.add_argument("--rounds", type=int, default=None, help="samples of each contender (9; 3 with --quick)")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the official structure")
    parser.add_argument("--stages", action="store_true", help="also break zs3fast's time down by stage and operator")
    parser.add_argument("--skip", nargs="+", choices=("official", "zs3fast", "floors", "probes"), default=[])
    parser.add_argument(
        "--probes-only", action="store_true", help="start-up and memory only; nothing is checked or timed"
    )
    parser.add_argument(
        "--memory-limit", type=float, default=None, help="GiB a probe may take on the CPU (80%% of what is available)"
    )
    parser.add_argument("--probe-timeout", type=float, default=600, help="seconds a probe may take (600)")
    parser.add_argument("--quick", action="store_true", help="ZegCLIP with C = 20 only, 3 rounds")
    parser.add_argument("--tiny", action="store_true", help="a toy network: exercises this script, measures nothing")
    parser.add_argument("--json", type=Path, default=None, help="where to write (bench/results/<device>/models.json)")
    parser.add_argument(
        "--update", action="store_true", help="keep the file's rows that this run does not measure anew"
    )
    parser.add_argument("--compare", type=Path, default=None, help="earlier results of the same device to set beside")
    args = parser.parse_args(argv)
    args.models = args.models or (["zegclip"] if args.quick else list(contenders.METHODS))
    args.classes = args.classes or ([20] if args.quick else [20, 171])
    args.rounds = args.rounds or (3 if args.quick else 9)
    if args.json is None and not args.tiny:
        name = "memory" if args.probes_only else "models-quick" if args.quick else "models"
        args.json = harness.results_path(name, args.device)
    return args


def make_settings(args: argparse.Namespace, classes: int, batch: int) -> list[Setting]:
    """One setting a model; CLIP-RC has one a number of regions."""
    regions = {"clip_rc": args.regions}
    settings = [
        Setting(method, classes, batch, regions=m)
        for method in args.models
        for m in regions.get(method, [contenders.PUBLISHED_REGIONS])
    ]
    return [s.tiny() for s in settings] if args.tiny else settings


def measure_group(args: argparse.Namespace, classes: int, batch: int, pass_: str) -> list[dict[str, Any]]:
    """Rows of all models with one class list and batch size, timed together over common floors."""
    settings = {s.name: s for s in make_settings(args, classes, batch)}
    device, entries, probed = args.device, [], {}
    for name, setting in settings.items():
        baseline = contenders.make_baseline(setting, device)
        if "probes" not in args.skip or args.probes_only:
            probed |= probe(args, setting, baseline, pass_)
        if args.probes_only:
            continue
        call = contenders.make_call("official", pass_, setting, baseline, device)
        if "official" not in args.skip:
            entries.append(Contender(f"{name}/official eager", call))
        if args.compile:
            compiled = contenders.compile_baseline(baseline)
            check = partial(check_contender, "official", compiled, baseline, setting, pass_, device)
            call = contenders.make_call("official", pass_, setting, compiled, device)
            entries.append(Contender(f"{name}/official compiled", call, check))
        if "zs3fast" not in args.skip:
            ours = contenders.make_ours(setting, baseline.state_dict(), device)
            check = partial(check_contender, "zs3fast", ours, baseline, setting, pass_, device)
            call = contenders.make_call("zs3fast", pass_, setting, ours, device)
            entries.append(Contender(f"{name}/zs3fast", call, check))
            if args.stages and pass_ == "inference":
                stages.report(console, ours, setting, device)
    floors = {s.encoder_name: s for s in settings.values()}
    if "floors" not in args.skip and pass_ == "inference" and not args.probes_only:
        for name, setting in floors.items():
            for label, attention in ((PRODUCTS, False), (ATTENTION, True)):
                entries.append(Contender(f"{name}/{label}", contenders.Floor(setting, attention, device)))
    timings = harness.measure(entries, rounds=args.rounds, device=device)
    described = harness.environment(device)
    if "zs3fast" not in args.skip:
        from zs3fast.ops import _extension
    rows = []
    for label in timings or probed:
        name, backend = label.split("/")
        setting = settings.get(name) or floors[name]
        extra = dict(probed.get(label, {}))
        if backend == "zs3fast":
            extra["ops"] = f"{args.backend}, extension {_extension.info()['status']}"
        if name in settings and setting.encoder_regions:
            extra["regions"] = setting.regions
        rows.append(
            harness.row(
                name,
                backend,
                setting.shape,
                timings.get(label),
                pass_=pass_,
                device=device,
                described=described,
                peak_bytes=extra.pop("peak_bytes", None),
                classes=classes,
                prompts=setting.prompts,
                batch=batch,
                floor=setting.encoder_name,
                **extra,
            )
        )
    return rows


def check_contender(
    contender: str, model: nn.Module, baseline: nn.Module, setting: Setting, pass_: str, device: str, _: object
) -> None:
    check = contenders.check_training if pass_ == "training" else contenders.check_inference
    check(contender, model, baseline, setting, device)


def probe(args: argparse.Namespace, setting: Setting, baseline: nn.Module, pass_: str) -> dict[str, dict[str, Any]]:
    """Start-up seconds and peak memory of both contenders, each in a fresh process that loads the same file.

    A contender without numbers says why in `outcome`: it ran out of memory, or of time.
    """
    found = {}
    available = harness.available_bytes()
    limit = available * 0.8 if args.memory_limit is None and available else (args.memory_limit or 0) * 2**30
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "official.pth"
        torch.save({"state_dict": baseline.state_dict()}, weights)
        for contender, label in (("official", "official eager"), ("zs3fast", "zs3fast")):
            if contender in args.skip:
                continue
            command = [sys.executable, str(Path(__file__).with_name("probe.py")), contender, "--weights", str(weights)]
            command += ["--setting", json.dumps(asdict(setting)), "--pass", pass_, "--device", args.device]
            command += ["--threads", str(args.threads)]
            command += ["--memory-limit", str(int(limit))] if limit else []
            environment = {**os.environ, "ZS3FAST_BACKEND": args.backend}
            key = f"{setting.name}/{label}"
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, env=environment, timeout=args.probe_timeout
                )
            except subprocess.TimeoutExpired:
                found[key] = {"outcome": f"not done in {args.probe_timeout:g} s"}
                continue
            if done.returncode:
                raise RuntimeError(f"probe of {contender} failed:\n{done.stderr}")
            result = json.loads(done.stdout.splitlines()[-1])
            if "out_of_memory" in result:
                room = "the device" if torch.device(args.device).type == "cuda" else f"{limit / 2**30:.1f} GiB"
                result = {"outcome": f"does not fit in {room}"}
            else:
                result["call_mib"] = round(result.pop("call_bytes") / 2**20, 1)
            found[key] = result
            if args.probes_only:
                console.print(f"{key} {setting.shape} {pass_}: {result}")
    return found


def show(rows: list[dict[str, Any]], earlier: list[dict[str, Any]] | None) -> None:
    """Two tables a class list, batch and pass: time, then start-up and memory."""
    before = {tuple(r[k] for k in KEY): r for r in earlier or []}
    for shape, pass_ in dict.fromkeys((r["shape"], r["pass"]) for r in rows):
        group = [r for r in rows if (r["shape"], r["pass"]) == (shape, pass_)]
        first = group[0]
        title = f"{shape} {pass_}: C = {first['classes']}, {first['prompts']} prompts a layer, batch {first['batch']}"
        caption = f"{first['device']}, {first.get('threads', '-')} threads, torch {first['versions']['torch']}"
        times = make_table(
            title, caption, ["median ms", "p20", "p80", "/ products", "/ products + attention"], earlier is not None
        )
        costs = make_table("", "a process each", ["import s", "load s", "first call s", "peak MiB", "call MiB"], False)
        floors = {(r["floor"], r["backend"]): r["p50_ms"] for r in group if r["backend"] in (PRODUCTS, ATTENTION)}
        for r in group:
            if r["rounds"]:
                cells = [f"{r[k]:.1f}" for k in ("p50_ms", "p20_ms", "p80_ms")]
                under = [floors.get((r["floor"], f)) for f in (PRODUCTS, ATTENTION)]
                cells += [f"{r['p50_ms'] / floor:.2f}" if floor else "-" for floor in under]
                if earlier is not None:
                    old = before.get(tuple(r[k] for k in KEY))
                    timed = old is not None and old["rounds"]
                    cells += [f"{old['p50_ms']:.1f}", f"{old['p50_ms'] / r['p50_ms']:.2f}"] if timed else ["-", "-"]
                times.add_row(r["name"], r["backend"], *cells)
            if "import_s" in r:
                cells = [f"{r[k]:.1f}" for k in ("import_s", "load_s", "first_call_s", "peak_mib", "call_mib")]
                costs.add_row(r["name"], r["backend"], *cells)
            elif "outcome" in r:
                costs.add_row(r["name"], r["backend"], "-", "-", "-", r["outcome"], "-")
        for table in (times, costs):
            if table.row_count:
                console.print(table)


def make_table(title: str, caption: str, columns: list[str], compare: bool) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in ("model", "contender"):
        table.add_column(column)
    for column in columns + (["before ms", "speed-up"] if compare else []):
        table.add_column(column, justify="right")
    return table


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    earlier = harness.read_results(args.compare) if args.compare else None
    if earlier and {r["device"] for r in earlier} != {harness.device_name(args.device)}:
        devices = sorted({r["device"] for r in earlier})
        here = harness.device_name(args.device)
        raise SystemExit(f"--compare: {args.compare} was measured on {devices}, this is {here!r}")
    if "zs3fast" not in args.skip:
        import zs3fast

        zs3fast.ops.use_backend(args.backend)
    rows = []
    for pass_ in args.passes:
        for classes in args.classes:
            for batch in args.batch:
                rows += measure_group(args, classes, batch, pass_)
    show(rows, earlier)
    if args.json is not None:
        written = rows
        if args.update and args.json.exists():
            measured = {tuple(r[k] for k in KEY) for r in rows}
            kept = [r for r in harness.read_results(args.json) if tuple(r[k] for k in KEY) not in measured]
            written = kept + rows
        harness.write_results(args.json, written)
        console.print(f"written to {args.json}")
    return rows


if __name__ == "__main__":
    main()
