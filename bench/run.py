"""Whole models, image in, label map out: the official structure against zs3fast against the floor under both.

    python bench/run.py                        # all methods, C = 20 and 171, results in bench/results/<device>/
    python bench/run.py --quick                # all methods on images of 128 pixels: under two minutes on two cores
    python bench/run.py --models tagclip --classes 171 --stages
    python bench/run.py --device cuda --batch 1 16 --dtype float32 bfloat16 --compile
    python bench/run.py --peers openvino onnxruntime frozen --dtype float32 bfloat16    # other runtimes on the CPU
    python bench/run.py --backend cpp reference --models zegclip        # backends of zs3fast's ops side by side
    python bench/run.py --pass end-to-end                               # JPEG file in, label map in NumPy out
    python bench/run.py --compare before.json  # this run beside an earlier one of the same device
    python bench/run.py --models zegclip --classes 20 59 150 171 847 --probes-only   # memory against C
    python bench/run.py --models clip_rc --pass training --regions 16 256 --probes-only  # memory of a training step

ViT-B/16 with random weights at each method's published size (512; MAFT 480 with 100 proposals; ClsCLIP 352), published
prompt counts: 10 a layer for C = 20, 100 beyond; CLIP-RC with M = 16 regions. ClsCLIP has no official code: "plain" is
one pass of plain PyTorch a class, and it runs at C = 20 unless asked for by name. Everything is timed side by side in
one process, in interleaved rounds, after its results have met their error budget (with --quick everything over one
floor, which then makes room for the next); start-up and memory come from a process each. FPS is images a second;
parameters are all of them without the text tower, and those that the recipe trains; GMAC are 1e9 multiply-adds of
products and convolutions, as torch's FLOP counter sees them (the papers' GFLOPs). A training step is forward and
backward on the seen classes of ZegCLIP, TagCLIP and CLIP-RC, without the optimiser; the largest batch in a memory
budget is `bench/training.py largest`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from bench import groups, harness, peers, tables  # noqa: E402
from bench.setting import DTYPES, METHODS, ONE_STAGE, PUBLISHED_REGIONS  # noqa: E402

PASSES = ("inference", "training", "end-to-end")
BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")

console = Console() if sys.stdout.isatty() else Console(width=180)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=METHODS, default=None, help="all")
    add("--classes", nargs="+", type=int, default=None, help="lengths C of the class list (20 171)")
    add("--batch", nargs="+", type=int, default=[1], help="images a call (1)")
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=["float32"])
    add("--backend", nargs="+", choices=BACKENDS, default=["auto"], help="of zs3fast's ops, each a contender")
    add("--regions", nargs="+", type=int, default=[PUBLISHED_REGIONS], help="M of CLIP-RC, squares (16)")
    add("--pass", dest="passes", nargs="+", choices=PASSES, default=["inference"])
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--rounds", type=int, default=None, help="samples of each contender (9, on a GPU 50; 3 with --quick)")
    add("--compile", action="store_true", help="also time torch.compile of the official structure")
    add(
        "--peers", nargs="*", choices=peers.NAMES, default=[], help="also time the official structure in these runtimes"
    )
    add("--stages", action="store_true", help="also break zs3fast's time down by stage and operator")
    add("--picture", type=Path, default=None, help="file to label end to end (the repository's photo at 500 x 375)")
    add("--skip", nargs="+", choices=("official", "zs3fast", "floors", "probes"), default=[])
    add("--probes-only", action="store_true", help="start-up and memory only; nothing is checked or timed")
    add("--memory-limit", type=float, default=None, help="GiB a probe may take on the CPU (80%% of what is available)")
    add("--probe-timeout", type=float, default=600, help="seconds a probe may take (600)")
    add("--quick", action="store_true", help="images of 128 pixels, C = 20 only, 3 rounds")
    add("--tiny", action="store_true", help="a toy network: exercises this script, measures nothing")
    add("--json", type=Path, default=None, help="where to write (bench/results/<device>/models.json)")
    add("--update", action="store_true", help="keep the file's rows that this run does not measure anew")
    add("--compare", type=Path, default=None, help="earlier results of the same device to set beside")
    args = parser.parse_args(argv)
    # A pass a class: at C = 171 ClsCLIP alone would take longer than everything else together.
    args.clsclip_classes = 20 if args.models is None else None
    args.models = args.models or list(METHODS)
    args.classes = args.classes or ([20] if args.quick else [20, 171])
    args.rounds = args.rounds or (3 if args.quick else 50 if args.device != "cpu" else 9)
    if min(args.classes) < 1:
        parser.error(f"--classes: expected at least 1, got {min(args.classes)}")
    if "training" in args.passes and max(args.classes) > 255:
        parser.error(f"--classes: label maps of the training pass hold up to 255 classes, got {max(args.classes)}")
    if set(args.passes) != {"inference"} and not set(args.models) & set(ONE_STAGE):
        parser.error(f"--pass: training and end-to-end are compared for {', '.join(ONE_STAGE)}")
    if args.json is None and not args.tiny:
        name = "memory" if args.probes_only else "models-quick" if args.quick else "models"
        args.json = harness.results_path(name, args.device)
    return args


def earlier_results(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The rows to compare with; those of another device are refused."""
    if args.compare is None:
        return None
    earlier = harness.read_results(args.compare)
    devices, here = sorted({r["device"] for r in earlier}), harness.device_name(args.device)
    if devices != [here]:
        raise SystemExit(f"--compare: {args.compare} was measured on {devices}, this is {here!r}")
    return earlier


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    earlier = earlier_results(args)
    rows = []
    for pass_ in args.passes:
        for classes in args.classes:
            for batch in [1] if pass_ == "end-to-end" else args.batch:
                rows += groups.measure_group(args, console, classes, batch, pass_)
    tables.show(console, rows, earlier)
    if args.json is not None:
        write = harness.update_results if args.update else harness.write_results
        write(args.json, rows)
        console.print(f"written to {args.json}")
    return rows


if __name__ == "__main__":
    main()
