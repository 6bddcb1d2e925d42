"""Compile every Triton kernel in every specialisation for GPUs that are not here, and judge what came out.

    python -m tests.ops.ahead_of_time [--op mask_loss] [--arch 80 90] [--jobs 2] [--out report.json] [--table]
    python -m tests.ops.ahead_of_time --merge LOG...     # the table of docs/gpu.md, from what earlier runs printed

Ends with 1 where a kernel does not compile, does not fit, misses the tensor cores or spills more than its budget. The
table has one row a kernel and architecture: specialisations, registers, most bytes spilled, blocks an SM, how many
specialisations use tensor cores. Merged, logs make one row a kernel, later logs replacing rows of earlier ones.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.ops.aot import ARCHS, AotReport, compile_all, judge, triton_version
from tests.ops.launches import Case, Launch, cases

Chosen = tuple[Case, Launch, int]
Compiled = tuple[Case, Launch, AotReport]


def key(case: Case, launch: Launch, arch: int) -> str:
    """The name of a specialisation in aot_budget.json and in messages."""
    return f"{launch.name} {case.name} sm_{arch}"


def plan(op: str | None = None, archs: tuple[int, ...] = ARCHS, everything: bool = True) -> list[Chosen]:
    """What is compiled, each specialisation once under the first case that needs it.

    Without `everything`: the cases that stand for their op, as the test suite compiles them.
    """
    chosen: dict[str, Chosen] = {}
    for case in cases(op):
        if everything or case.everywhere:
            for launch in case.launches():
                for arch in archs:
                    chosen.setdefault(f"{launch.identity} {arch}", (case, launch, arch))
    return list(chosen.values())


def compile_plan(chosen: list[Chosen], jobs: int = 1) -> list[Compiled]:
    reports = compile_all([launch.request(arch) for _, launch, arch in chosen], jobs)
    return [(case, launch, report) for (case, launch, _), report in zip(chosen, reports, strict=True)]


def problems(compiled: list[Compiled]) -> list[str]:
    return judge(
        (key(case, launch, report.arch), report, case.tensor_cores and not launch.name.endswith("_merge_kernel"))
        for case, launch, report in compiled
    )


def table(compiled: list[Compiled]) -> str:
    lines = [
        "| kernel | sm | specialisations | registers | spilled bytes | blocks an SM | on tensor cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arch in sorted({(launch.name, report.arch) for _, launch, report in compiled}):
        mine = [report for _, launch, report in compiled if (launch.name, report.arch) == (name, arch)]
        registers, blocks = [r.registers for r in mine], [r.blocks_per_sm() for r in mine]
        spills = max(r.spills for r in mine)
        cores = sum(r.uses_tensor_cores for r in mine)
        cells = (name, arch, len(mine), _range(registers), spills, _range(blocks), cores)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def merged(logs: Iterable[str]) -> str:
    """One row a kernel of what runs with `--table` printed: ranges over architectures, a group of columns a Triton."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}  # Triton: {(kernel, architecture): the other cells}
    for log in logs:
        rows: dict[tuple[str, str], list[str]] = {}
        for line in log.splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if len(cells) in (6, 7) and "_kernel" in cells[0] and cells[1].isdigit():
                rows[cells[0], cells[1]] = cells[2:]
            elif said := re.match(r"Triton (\S+): \d+ specialisations compiled", line):
                found.setdefault(said[1], {}).update(rows)
                rows = {}
    versions = sorted(found, key=lambda version: [int(n) for n in version.split(".")])
    head = [f"{v}: {c}" for v in versions for c in ("sm", "compiled", "registers", "spilled", "blocks", "tensor cores")]
    lines = [f"| kernel | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for kernel in sorted({name for rows in found.values() for name, _ in rows}):
        cells = [kernel]
        for version in versions:
            mine = {arch: row for (name, arch), row in found[version].items() if name == kernel}
            if not mine:
                cells += ["-"] * 6
                continue
            ends = [[int(n) for row in mine.values() for n in row[i].split("-")] for i in (1, 2, 3)]
            cores = str(sum(int(row[4]) for row in mine.values())) if all(row[4:] for row in mine.values()) else "-"
            cells += [", ".join(sorted(mine, key=int)), str(sum(int(row[0]) for row in mine.values()))]
            cells += [_range(ends[0]), str(max(ends[1])), _range(ends[2]), cores]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--op")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--representative", action="store_true", help="only what the test suite compiles")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="LOG", help="print one table of earlier runs' tables")
    asked = parser.parse_args()
    if asked.merge:
        print(merged(path.read_text() for path in asked.merge))
        return 0
    compiled = compile_plan(plan(asked.op, tuple(asked.arch), not asked.representative), asked.jobs)
    if asked.out:
        rows = {
            key(case, launch, report.arch): {
                "registers": report.registers,
                "spills": report.spills,
                "shared_bytes": report.shared_bytes,
                "tensor_cores": report.uses_tensor_cores,
                "blocks_per_sm": report.blocks_per_sm(),
            }
            for case, launch, report in compiled
        }
        asked.out.write_text(json.dumps({"triton": triton_version(), "kernels": rows}, indent=1) + "\n")
    if asked.table:
        print(table(compiled))
    wrong = problems(compiled)
    print(
        f"Triton {triton_version()}: {len(compiled)} specialisations compiled, {len(wrong)} problems", *wrong, sep="\n"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
