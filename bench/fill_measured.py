"""Fill zs3fast/ops/_measured.py from what the second call of bench/gpu_suite.sh measured.

    python bench/fill_measured.py OUT/results.json sm_90 [--source bench/results/h100/ops.json]

Of every op and shape measured on both backends in the same call, the smallest ratio of Triton's time to the CUDA
kernel's counts: the GPU's own time of a graph, where there is one. Entries of other architectures stay.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zs3fast.ops import _measured  # noqa: E402

FILE = Path(__file__).resolve().parents[1] / "zs3fast" / "ops" / "_measured.py"
TABLE = "SPEEDUP_OVER_TRITON"


def speedups(rows: list[dict[str, Any]]) -> dict[str, float]:
    """{op: smallest ratio of Triton's time to CUDA's over the shapes, passes and dtypes that both ran}."""
    times: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        found = re.fullmatch(r"zs3fast \((.+)\)", str(row.get("backend")))
        if found and "cuda" in row["versions"]:
            ms = row.get("graph_ms", row["p50_ms"])
            times[tuple(str(row[k]) for k in ("name", "shape", "dtype", "pass"))][found[1]] = ms
    ratios: dict[str, list[float]] = defaultdict(list)
    for (op, *_), of in times.items():
        if "triton" in of and "cuda" in of:
            ratios[op].append(of["triton"] / of["cuda"])
    return {op: round(min(found), 3) for op, found in sorted(ratios.items())}


def filled(text: str, rows: list[dict[str, Any]], architecture: str, source: str) -> str:
    """The text of _measured.py with the ratios of `architecture` replaced by those of `rows`."""
    entries = {
        op: {a: r for a, r in of.items() if a != architecture} for op, of in _measured.SPEEDUP_OVER_TRITON.items()
    }
    for op, ratio in speedups(rows).items():
        entries.setdefault(op, {})[architecture] = ratio
    lines = [f'    "{op}": {json.dumps(of, sort_keys=True)},  # {source}' for op, of in sorted(entries.items()) if of]
    body = "{\n" + "\n".join(lines) + "\n}" if lines else "{}"
    table = rf"^({TABLE}: dict\[str, dict\[str, float\]\] = ){{.*?}}$"
    text, done = re.subn(table, lambda m: m[1] + body, text, flags=re.M | re.S)
    if done != 1:
        raise ValueError(f"{FILE.name}: expected one table {TABLE}, got {done}")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("architecture", help="sm_80, sm_90, ...")
    parser.add_argument("--source", default=None, help="the file under bench/results that shows it")
    parser.add_argument("--file", type=Path, default=FILE, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not re.fullmatch(r"sm_\d+", args.architecture):
        parser.error(f"architecture: expected sm_80, sm_90, ..., got {args.architecture}")
    rows = json.loads(args.results.read_text())["rows"]
    args.file.write_text(filled(FILE.read_text(), rows, args.architecture, args.source or str(args.results)))


if __name__ == "__main__":
    main()
