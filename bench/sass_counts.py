"""What the GPU has to issue: instructions, registers, spills and blocks an SM of every Triton kernel, counted in SASS.

    python -m bench.sass_counts [--op mask_loss] [--arch 90] [--out bench/results/sass]

Kernels are compiled ahead of time at published sizes with the Triton that runs this, for a GPU that need not be here.
`hot` is the loop (the whole kernel where it has none) that does the work, found by the instruction that one element of
work issues a known number of times; `per_element` is its instructions a thread and element: a pixel and class of
masks_to_labels and mask_loss, a proposal and pixel of proposals_to_labels, a matrix instruction of the attentions. It
counts what a full warp issues and no stalls. Writes triton-X.Y.json; rows of other versions lie beside it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.ops import launches
from tests.ops.aot import compile_all, triton_version

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_x?_?\d+):")
_TARGET = re.compile(r"\((\.L_x?_?\d+)\)")


@dataclass(frozen=True)
class Work:
    """A problem at a published size and what marks one element of its work in the SASS of each kernel."""

    op: str
    name: str
    run: launches.Run
    markers: dict[str, tuple[str, float]]  # kernel: (opcode, times an element issues it)


def instructions(listing: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(opcode, operands) in order and the place of every label."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append((found[2], found[3]))
    while code and code[-1][0] in ("NOP", "BRA"):  # padding behind the end
        code.pop()
    return code, labels


def loops(code: list[tuple[str, str]], labels: dict[str, int]) -> list[tuple[int, int]]:
    """[first, last] of every backward branch, both included."""
    found = set()
    for place, (opcode, operands) in enumerate(code):
        target = _TARGET.search(operands)
        if opcode.startswith("BRA") and target and labels.get(target[1], place) < place:
            found.add((labels[target[1]], place))
    return sorted(found)


def hot_loop(code: list[tuple[str, str]], labels: dict[str, int], opcode: str) -> tuple[int, int]:
    """[first, last] of the smallest loop that holds as many of `opcode` as any: loops around it only repeat it."""

    def marks(span: tuple[int, int]) -> int:
        return sum(op.startswith(opcode) for op, _ in code[span[0] : span[1] + 1])

    spans = loops(code, labels)
    most = max(map(marks, spans), default=0)
    return min((s for s in spans if marks(s) == most and most), key=lambda s: s[1] - s[0], default=(0, len(code) - 1))


def count(listing: str, marker: tuple[str, float] | None) -> dict[str, Any]:
    """Instructions of the kernel and of its hot loop; see the module."""
    code, labels = instructions(listing)
    row: dict[str, Any] = {"instructions": len(code)}
    row["loops"] = [last - first + 1 for first, last in loops(code, labels)]
    if marker is not None:
        opcode, times = marker
        first, last = hot_loop(code, labels, opcode)
        inside = [op for op, _ in code[first : last + 1]]
        row["hot"], row["marker"] = len(inside), opcode
        row["marks"] = sum(op.startswith(opcode) for op in inside)
        row["per_element"] = round(len(inside) * times / row["marks"], 1) if row["marks"] else None
        row["mix"] = dict(Counter(op.split(".")[0] for op in inside).most_common(8))
    return row


def work() -> list[Work]:
    half, single = torch.bfloat16, torch.float32
    labels = launches._masks_to_labels
    taps = ("LDG", 4.0)
    tensor = {80: "HMMA", 90: "HMMA"}[80]
    attention = (tensor, 1.0)
    exponents = ("MUFU.EX2", 1.0)  # a score each, and one a row; its products are HMMA or HGMMA by the tile
    found = [
        Work("masks_to_labels", "one window, C = 171", labels(single, False), {"one_window": taps}),
        Work("masks_to_labels", "windows, C = 171", labels(single, True), {"windows": ("MUFU.EX2", 1.0)}),
        Work("masks_to_labels", "windows, trusty", labels(single, True, "both"), {"windows": ("MUFU.EX2", 1.0)}),
        Work("mask_loss", "B = 16, C = 156", launches._mask_loss(half, torch.uint8), {"": ("MUFU.EX2", 1.0)}),
        Work("attention_to_mask", "C = 171, N = 1024, masks", launches._attention_to_mask(half, 64, dropout=0.0),
             {"": exponents}),
        Work("attention_to_mask", "dropout", launches._attention_to_mask(half, 64, masks=False), {"": exponents}),
        Work("region_bridge_attention", "32 x 32, 16 regions", launches._region_bridge(half, 64), {"bwd": attention}),
        Work("proposal_attention", "100 of 1600", launches._proposal_attention(half, 64), {"": attention}),
        Work("proposals_to_labels", "100 x 171", launches._proposals_to_labels(single, True, True, False, False),
             {"": ("MUFU.EX2", 0.25)}),
        Work("relationship_descriptor", "C = 171", launches._relationship_descriptor(half), {"": attention}),
        Work("masks_to_bits", "100 proposals", launches._masks_to_bits(single, False, True), {"": ("MUFU.EX2", 0.25)}),
    ]  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results/sass"))
    parser.add_argument("--label", default="", help="behind the version in the file's name")
    parser.add_argument("--listing", type=Path, help="a folder for the SASS itself")
    parser.add_argument("--loops", type=Path, help="a folder for the SASS of the hot loops alone")
    asked = parser.parse_args()
    chosen = [w for w in work() if asked.op in (None, w.op)]
    plan = [(w, launch) for w in chosen for launch in launches.Case(w.op, w.name, w.run).launches()]
    reports = compile_all([launch.request(asked.arch) for _, launch in plan], asked.jobs, sass=True)
    rows = {}
    for (w, launch), report in zip(plan, reports, strict=True):
        marker = next((m for part, m in w.markers.items() if part in launch.name), None)
        row = {
            "op": w.op,
            "work": w.name,
            "registers": report.registers,
            "spills": report.spills,
            "shared_bytes": report.shared_bytes,
            "warps": report.warps,
            "blocks_per_sm": report.blocks_per_sm(),
            **count(report.sass, marker),
        }
        rows[f"{launch.name} ({w.name})"] = row
        print(f"{launch.name} ({w.name}): " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("op", "work")))
        name = re.sub(r"[^\w]+", "_", f"{launch.name}_{w.name}_{triton_version()}{asked.label}")
        code, labels = instructions(report.sass)
        first, last = hot_loop(code, labels, marker[0]) if marker else (0, -1)
        loop = "".join(f"{opcode}{operands}\n" for opcode, operands in code[first : last + 1])
        for folder, text in ((asked.listing, report.sass), (asked.loops, loop)):
            if folder and text:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{name}.sass").write_text(text)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"triton-{triton_version()}{asked.label}.json"
    whole = json.loads(path.read_text())["kernels"] if asked.op and path.exists() else {}
    found = {"triton": triton_version(), "arch": asked.arch, "kernels": whole | rows}
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
