"""The tables that `run.py` prints: FPS, parameters and work against baselines and floors, then start-up and memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.end_to_end import STAGES
from bench.floors import ATTENTION, NAMES, PRODUCTS
from bench.harness import KEY

GROUP = ("classes", "batch", "pass")
Row = dict[str, Any]


def show(console: Console, rows: Sequence[Row], earlier: Sequence[Row] | None = None) -> None:
    """Two tables a class list, batch and pass: time of all models, then start-up and memory."""
    before = {tuple(r[k] for k in KEY): r for r in earlier or []}
    for group in dict.fromkeys(tuple(r[k] for k in GROUP) for r in rows):
        some = [r for r in rows if tuple(r[k] for k in GROUP) == group]
        for table in (times(some, None if earlier is None else before), costs(some)):
            if table.row_count:
                console.print(table)


def times(rows: Sequence[Row], before: dict[tuple, Row] | None) -> Table:
    first = rows[0]
    end_to_end, inference = first["pass"] == "end-to-end", first["pass"] == "inference"
    columns = ["FPS", "median", "p20 - p80", "p99", "x eager", "M par.", "trained", "GMAC", "peak MiB"]
    columns += ["/ products", "/ + attention"] if inference else []
    columns += STAGES if end_to_end else []
    columns += ["before", "speed-up"] if before is not None else []
    title = f"{first['pass']}: C = {first['classes']}, batch {first['batch']}, times in ms"
    table = make_table(title, caption(first), rows, columns)
    floors = {(r["floor"], r["dtype"], r["backend"]): r["p50_ms"] for r in rows if r["backend"] in NAMES}
    for r in rows:
        if not r["rounds"]:
            continue
        spread = f"{r['p20_ms']:.1f} - {r['p80_ms']:.1f}"
        cells = [number(r["images_per_second"]), f"{r['p50_ms']:.1f}", spread, f"{r['p99_ms']:.1f}"]
        cells.append(ratio(eager_time(r, rows), r["p50_ms"]))
        cells += [size(r.get("parameters")), size(r.get("trainable"))]
        cells += ["-" if r.get(key) is None else f"{r[key]:.1f}" for key in ("gmac", "peak_mib")]
        if inference:
            cells += [ratio(r["p50_ms"], floors.get((r["floor"], r["dtype"], f))) for f in (PRODUCTS, ATTENTION)]
        if end_to_end:
            cells += [f"{r['stages'][f'{stage}_ms']:.1f}" for stage in STAGES]
        if before is not None:
            old = before.get(tuple(r[k] for k in KEY), {}).get("p50_ms")
            cells += ["-" if old is None else f"{old:.1f}", ratio(old, r["p50_ms"])]
        add(table, r, cells)
    return table


def costs(rows: Sequence[Row]) -> Table:
    columns = ["import s", "load s", "first call s", "peak MiB", "call MiB"]
    table = make_table("", "a process each", rows, columns)
    for r in rows:
        if "import_s" in r:
            add(table, r, [f"{r[k]:.1f}" for k in ("import_s", "load_s", "first_call_s", "peak_mib", "call_mib")])
        elif "outcome" in r:
            add(table, r, ["-", "-", "-", r["outcome"], "-"])
    return table


def caption(row: Row) -> str:
    text = f"{row['device']}, {row.get('threads', '-')} threads, torch {row['versions']['torch']}"
    if row["pass"] == "training":
        text += "; forward and backward. The largest batch in a memory budget: python bench/training.py largest"
    return text


def eager_time(row: Row, rows: Iterable[Row]) -> float | None:
    """The eager baseline of the row's model, in float32 where that was measured, else in the row's own dtype."""
    eager = [r for r in rows if r["name"] == row["name"] and r["backend"].endswith("eager") and r["rounds"]]
    found = {r["dtype"]: r["p50_ms"] for r in eager}
    return found.get("float32", found.get(row["dtype"]))


def ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else "-"


def size(count: int | None) -> str:
    """Millions of parameters."""
    return "-" if count is None else f"{count / 1e6:.2f}"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def make_table(title: str, caption: str, rows: Sequence[Row], columns: Iterable[str]) -> Table:
    """Names on the left, with the dtype where there are several."""
    dtypes = sorted({r["dtype"] for r in rows})
    title = f"{title}, {dtypes[0]}" if title and len(dtypes) == 1 else title
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in ("model", "contender", *(["dtype"] if len(dtypes) > 1 else [])):
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def add(table: Table, row: Row, cells: Sequence[str]) -> None:
    names = [row["name"], row["backend"], row["dtype"]]
    table.add_row(*names[: len(table.columns) - len(cells)], *cells)
