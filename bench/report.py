"""Tables of measured numbers in Markdown files, always written from a results file.

    python bench/report.py             # fill in every table between its markers in bench/results/README.md and docs/
    python bench/report.py --check     # exit 1 if a table is not what its results file says

A table stands between `<!-- bench:DEVICE/NAME -->` and `<!-- /bench -->` and shows bench/results/DEVICE/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PAGES = [RESULTS / "README.md", *sorted((RESULTS.parents[1] / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<open><!-- bench:(?P<name>[\w./-]+) -->\n).*?(?P<close><!-- /bench -->)", re.DOTALL)
# Rows of a pass that hold more than a time, known by a key: what to show of them.
COUNTS = {
    ("peak_mib", "activations"): {"peak_mib": "MiB an image"},
    ("largest_batch", "largest batch"): {"largest_batch": "images", "budget_gib": "in GiB", "peak_mib": "peak MiB"},
    ("of_plain", "bulk"): {
        "images_per_second": "rows/s",
        "of_plain": "of the plain loop",
        "first_shard_s": "s until the first shard",
    },
    ("images_per_second", "serve"): {
        "images_per_second": "requests/s",
        "of_alone": "of alone",
        "p50_ms": "p50 ms",
        "p99_ms": "p99 ms",
        "resident_before_mib": "MiB before",
        "resident_after_mib": "MiB after",
    },
    ("peak_mib", "bulk memory"): {"images": "images", "peak_mib": "peak MiB"},
    ("agreement", "scores"): {"pacc": "pAcc", "miou": "mIoU", "hiou": "hIoU", "agreement": "same labels, %"},
}
OURS = "zs3fast"
FLOORS = {"floor: products": "/ products", "floor: products + attention": "/ products + attention"}


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of a results file: tables of times, counts, start-up and memory where measured; what they ran on."""
    if not rows:
        raise ValueError("rows: the results file is empty")
    floors = {floor_key(r, r["backend"]): r["p50_ms"] for r in rows if r["backend"] in FLOORS}
    shown = [backend for backend in FLOORS if any(key[-1] == backend for key in floors)]
    ours = {}
    for r in rows:
        if r["rounds"] and OURS in r["backend"]:
            ours.setdefault(rivals_key(r), r["p50_ms"])
    compared = any(r["rounds"] and OURS not in r["backend"] and rivals_key(r) in ours for r in rows)
    rates = any("images_per_second" in r for r in rows)
    header = ["shape", "pass", "dtype", "name", "backend", *(["images/s"] if rates else [])]
    header += ["median ms", "p20 - p80 ms", *([f"/ {OURS}"] if compared else []), *(FLOORS[f] for f in shown)]
    times = [
        [r["shape"], r["pass"], r["dtype"], r["name"], r["backend"]]
        + ([number(r.get("images_per_second"))] if rates else [])
        + [number(r["p50_ms"]), f"{number(r['p20_ms'])} - {number(r['p80_ms'])}"]
        + ([ratio(r, ours.get(rivals_key(r)))] if compared else [])
        + [ratio(r, floors.get(floor_key(r, f))) for f in shown]
        for r in rows
        if r["rounds"]
    ]
    parts = [table(header, times, left=5)] if times else []
    staged = [r for r in rows if "stages" in r]
    if staged:
        names = list(staged[0]["stages"])
        header = ["shape", "dtype", "name", "backend", *(name.replace("_", " ") for name in names)]
        parts.append(
            table(header, [[*(r[k] for k in header[:4]), *map(number, map(r["stages"].get, names))] for r in staged], 4)
        )
    for (key, pass_), columns in COUNTS.items():
        counted = [r for r in rows if key in r and r["pass"] == pass_]
        if counted:
            header = ["shape", "pass", "dtype", "name", "backend", *columns.values()]
            cells = [[*(r[k] for k in header[:5]), *(number(r.get(column)) for column in columns)] for r in counted]
            parts.append(table(header, cells, 5))
    started = [r for r in rows if "import_s" in r or "outcome" in r]
    if started:
        header = [
            "shape",
            "pass",
            "name",
            "backend",
            "import s",
            "load s",
            "first call s",
            "peak MiB",
            "of it the call",
        ]
        keys = ("import_s", "load_s", "first_call_s", "peak_mib", "call_mib")
        parts.append(
            table(
                header,
                [[r["shape"], r["pass"], r["name"], r["backend"], *costs(r, keys)] for r in started],
                4,
            )
        )
    elif any(r["peak_mib"] is not None and r["rounds"] for r in rows):
        header = ["shape", "pass", "dtype", "name", "backend", "peak MiB"]
        parts.append(table(header, [[*(r[k] for k in header[:5]), number(r["peak_mib"])] for r in rows], 5))
    return "\n\n".join([*parts, *sorted({machine(r) for r in rows})]) + "\n"


def rivals_key(row: dict[str, Any]) -> tuple[str, ...]:
    """What the rows have in common that do the same work: "layer: ..." is more of it than the op alone."""
    part = row["backend"].rpartition(": ")[0]
    return row["shape"], row["pass"], row["dtype"], row["name"], part


def ratio(row: dict[str, Any], other_ms: float | None) -> str:
    """A row's time over that of another."""
    if not other_ms:
        return ""
    times = row["p50_ms"] / other_ms
    return f"{times:.2f}" if times < 10 else number(times)


def floor_key(row: dict[str, Any], floor: str) -> tuple[str | None, ...]:
    """Where a row's floor of this kind is found."""
    return row["shape"], row["pass"], row["dtype"], row.get("floor"), floor


def costs(row: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Start-up and memory of a row; why there are none, in place of the peak, if it ran out of memory or time."""
    if "outcome" in row:
        return [row["outcome"] if key == "peak_mib" else "" for key in keys]
    return [number(row[key]) for key in keys]


def machine(row: dict[str, Any]) -> str:
    """One line on what a row was measured with."""
    threads = f", {row['threads']} threads ({row['isa']})" if "threads" in row else ""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    commit = row["commit"][:12] + "-dirty" * row["commit"].endswith("-dirty")
    return f"Measured on {row['device']}{threads}; {versions}; commit {commit}."


def number(value: float | None) -> str:
    """Three significant digits, whole numbers above 100."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are text."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def fill(markdown: str, results: Path = RESULTS) -> str:
    """The text with every marked table rendered anew."""

    def block(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.json"
        if not path.exists():
            raise FileNotFoundError(f"bench:{match['name']}: no results file {path}")
        return match["open"] + render(json.loads(path.read_text())["rows"]) + match["close"]

    return BLOCK.sub(block, markdown)


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, default=PAGES, help="Markdown with markers")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    args = parser.parse_args(argv)
    stale = []
    for path in args.files:
        before = path.read_text()
        after = fill(before)
        if after != before:
            stale.append(path)
            if not args.check:
                path.write_text(after)
    for path in stale:
        print(f"{path}: {'tables differ from their results files' if args.check else 'updated'}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
