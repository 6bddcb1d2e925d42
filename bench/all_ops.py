"""Every script of bench/ops in one process, which starts once: one that fails does not stop the others.

    python bench/all_ops.py results --device cuda --dtype bfloat16
    python bench/all_ops.py results --only mask_loss --tiny

Rows of each op in FOLDER/<op>.json; what a copy and a product reach in the same run in FOLDER/floor.json. An op that is
not measured in the dtype asked for is left out, and named.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import gpu_clock, harness, op_script  # noqa: E402
from bench.op_script import OpScript  # noqa: E402
from bench.op_shapes import OPS  # noqa: E402

SCRIPTS = {path.stem: path for path in sorted((Path(__file__).parent / "ops").glob("*.py")) if path.stem in OPS}


def declared(path: Path) -> OpScript:
    """What a script of bench/ops hands to `op_script.run`, without running it."""
    found: list[OpScript] = []
    run = op_script.run
    op_script.run = lambda script, argv=None: found.append(script) or []  # type: ignore[assignment]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        op_script.run = run
    (script,) = found
    return script


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), metavar="OP")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=op_script.DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=None, help="samples of each contender (the script's own)")
    parser.add_argument("--tiny", action="store_true", help="toy shapes without compiled contenders: measures nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    failed = []
    rounds = 1 if args.tiny else 5
    reached = gpu_clock.floors(args.device, op_script.DTYPES[args.dtype], rounds=rounds, tiny=args.tiny)
    row = harness.row("floor", "copy and product", "largest", None, device=args.device, **reached)
    harness.write_results(args.folder / "floor.json", [row | {"dtype": args.dtype}])
    print(" ".join(f"{name} {value:.4g}" for name, value in reached.items()), flush=True)
    for op in args.only:
        try:
            script = declared(SCRIPTS[op])
            if args.dtype not in script.dtypes:
                print(f"{op}: not measured in {args.dtype} ({', '.join(script.dtypes)})", flush=True)
                continue
            options = ["--device", args.device, "--dtype", args.dtype, "--json", str(args.folder / f"{op}.json")]
            options += ["--rounds", str(args.rounds)] if args.rounds else []
            if args.tiny:
                slow = [name for name in script.contenders if "compiled" in name]
                options = ["tiny", *options, "--no-peaks", *(["--skip", *slow] if slow else [])]
            rows = op_script.run(script, options)
            if args.tiny:  # scripts keep no such rows
                harness.write_results(args.folder / f"{op}.json", rows)
        except (Exception, SystemExit):  # whatever it is, the next op may do better
            traceback.print_exc()
            failed.append(op)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
