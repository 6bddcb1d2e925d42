"""Images of results files: one question an image, one device a folder.

    python bench/plots.py                          # every folder of bench/results
    python bench/plots.py bench/results/amd-epyc

Written beside the JSON: fps.png (images a second against the baselines), memory.png (memory of a call against C),
regions.png (region_bridge_attention against M) and proposals.png (proposal_attention against Nq). What was not measured
is not drawn, and said. Needs matplotlib (`pip install zs3fast[bench]`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import harness  # noqa: E402
from bench.floors import ATTENTION, NAMES  # noqa: E402
from bench.plot_style import INK, finish, label_ends, new_figure, plain_ticks, size_ticks  # noqa: E402
from bench.setting import METHODS, PUBLISHED_REGIONS  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
OURS, EAGER, COMPILED, OTHER = "#0072b2", "#9a9a9a", "#d9a441", ("#d55e00", "#009e73", "#cc79a7", "#6b6b6b")
TITLES = {"zegclip": "ZegCLIP", "tagclip": "TagCLIP", "clip_rc": "CLIP-RC", "maft": "MAFT", "clsclip": "ClsCLIP"}


class NotMeasured(Exception):
    """There are no rows for this image; the message says what to run."""


# Images ------------------------------------------------------------------------------------------------------------


def plot_fps(folder: Path) -> Figure:
    """Images a second of each method: baselines, zs3fast, and the floor as the line nobody gets over."""
    rows = [r for r in read(folder, "models") if r["pass"] == "inference" and r["rounds"]]
    if not rows:
        raise NotMeasured("python bench/run.py")
    lines = list(dict.fromkeys((r["batch"], r["dtype"]) for r in rows))
    columns = sorted({r["classes"] for r in rows})
    figure = new_figure(0.5 + 2.6 * len(lines))
    grid = figure.subplots(len(lines), len(columns), squeeze=False, sharey="row")
    for i, (batch, dtype) in enumerate(lines):
        for j, classes in enumerate(columns):
            some = [r for r in rows if (r["batch"], r["dtype"], r["classes"]) == (batch, dtype, classes)]
            if not some:
                grid[i][j].set_visible(False)
                continue
            fps_panel(grid[i][j], some)
            grid[i][j].set_title(f"C = {classes}, batch {batch}, {dtype}", fontsize=9, color=INK)
        grid[i][0].set_ylabel("images / s")
    handles = {h.get_label(): h for row in grid for axes in row for h in axes.get_legend_handles_labels()[0]}
    names = sorted(handles, key=lambda name: name not in LEGEND.values())  # bars, then the floor
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside upper right",
        ncols=len(handles),
        frameon=False,
        fontsize=8,
    )
    return finish(figure, "Image to label map", rows)


def fps_panel(axes: Axes, rows: Sequence[Row]) -> None:
    """Groups of bars, a method each, in the order of the methods."""
    published = [r for r in rows if r.get("regions", PUBLISHED_REGIONS) == PUBLISHED_REGIONS and r["name"] in METHODS]
    methods = [m for m in METHODS if any(r["name"] == m for r in published)]
    kinds = [k for k in COLOURS if any(kind_of(r) == k for r in published)]
    width = 0.8 / max(len(kinds), 1)
    for i, method in enumerate(methods):
        for k, kind in enumerate(kinds):
            found = [r for r in published if r["name"] == method and kind_of(r) == kind]
            if not found:
                continue
            rate = images_per_second(found[0])
            x = i + (k - (len(kinds) - 1) / 2) * width
            axes.bar(x, rate, width * 0.94, color=COLOURS[kind], label=LEGEND[kind] if i == 0 else None)
            label = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
            axes.annotate(
                label, (x, rate), (0, 1.5), textcoords="offset points", ha="center", fontsize=6.5, color=INK, zorder=4,
                bbox={"boxstyle": "square,pad=0.0", "color": "white", "lw": 0},
            )  # fmt: skip
        floors = [r for r in rows if r["backend"] == ATTENTION and r["floor"] == floor_of(published, method)]
        if floors:
            rate, label = images_per_second(floors[0]), "the encoder's products alone"
            axes.hlines(
                rate, i - 0.46, i + 0.46, color=INK, lw=1, ls=(0, (3, 2)), zorder=3, label=label if i == 0 else None
            )
    axes.set_xticks(range(len(methods)), [TITLES[m] for m in methods], fontsize=8)
    axes.margins(y=0.14)


COLOURS = {"eager": EAGER, "compiled": COMPILED, "openvino": OTHER[1], "zs3fast": OURS}
LEGEND = {
    "eager": "official, eager",
    "compiled": "official, compiled",
    "openvino": "official, OpenVINO",
    "zs3fast": "zs3fast",
}


def plot_memory(folder: Path) -> Figure:
    """What a call adds to the loaded model, over the number of classes."""
    rows = [r for name in ("models", "memory") for r in read(folder, name)]
    rows = [r for r in rows if r["pass"] == "inference" and r.get("call_mib") is not None and r["batch"] == 1]
    rows = [r for r in rows if r["dtype"] == rows[0]["dtype"]]
    curves: dict[tuple[str, str], dict[int, Row]] = {}
    for r in rows:
        if kind_of(r) in ("eager", "zs3fast") and r["name"] in METHODS:
            curves.setdefault((r["name"], kind_of(r)), {})[r["classes"]] = r
    most = max(map(len, curves.values()), default=0)
    longest = {method for (method, _), points in curves.items() if len(points) == most}
    curves = {key: points for key, points in curves.items() if key[0] in longest}
    if most < 2:
        raise NotMeasured("python bench/run.py --classes 20 59 150 171 847 --probes-only")
    used = [r for points in curves.values() for r in points.values()]
    figure = new_figure(3.6)
    axes = figure.subplots()
    ends = []
    for (method, kind), points in curves.items():
        x = sorted(points)
        y = [points[c]["call_mib"] for c in x]
        axes.plot(x, y, color=COLOURS[kind], marker=MARKERS[METHODS.index(method)], ms=4.5, lw=1.6)
        who = "zs3fast" if kind == "zs3fast" else "official"
        ends.append((x[-1], y[-1], f"{TITLES[method]}, {who}", COLOURS[kind]))
    axes.set_yscale("log")
    size_ticks(axes, [r["classes"] for r in used])
    plain_ticks(axes, "y", [r["call_mib"] for r in used])
    axes.set_xlabel("C, classes")
    axes.set_ylabel("MiB")
    label_ends(axes, ends)
    return finish(figure, "Memory that labelling one image takes on top of the model", used, "a process each")


MARKERS = ("o", "s", "^", "D", "v")


def plot_regions(folder: Path) -> Figure:
    """region_bridge_attention over M."""
    rows = read(folder, "region_bridge_attention")
    title = "region_bridge_attention, one layer, 1024 patches"
    return plot_op(rows, r"voc-M(\d+)$", "M, region tokens", title, "python bench/ops/region_bridge_attention.py")


def plot_proposals(folder: Path) -> Figure:
    """proposal_attention over Nq."""
    rows = [r for r in read(folder, "proposal_attention") if r["pass"] != "forward+backward"]
    command = "python bench/ops/proposal_attention.py nq10 nq30 nq100 nq300 nq1000 --passes forward --update"
    title = "proposal_attention, one layer, 900 patches"
    return plot_op(rows, r"nq(\d+)$", "Nq, proposals", title, command)


def plot_op(rows: Sequence[Row], pattern: str, x_label: str, title: str, command: str) -> Figure:
    """Milliseconds of every contender over a size that shapes carry in their names; a panel a pass and dtype."""
    sized = [(int(found[1]), r) for r in rows if r["rounds"] and (found := re.match(pattern, r["shape"]))]
    if len({size for size, _ in sized}) < 3:
        raise NotMeasured(command)
    wanted = list(dict.fromkeys((r["pass"], r["dtype"]) for _, r in sized))
    lines = -(-len(wanted) // 2)
    figure = new_figure(0.5 + 3.3 * lines)
    panels = figure.subplots(lines, min(len(wanted), 2), squeeze=False).flatten()
    colours = contender_colours([r["backend"] for _, r in sized])
    for axes in panels[len(wanted) :]:
        axes.set_axis_off()
    for axes, panel in zip(panels, wanted):
        some = [(size, r) for size, r in sized if (r["pass"], r["dtype"]) == panel]
        ends = []
        for backend, colour in colours.items():
            points = sorted((size, r["p50_ms"]) for size, r in some if r["backend"] == backend)
            if not points:
                continue
            x, y = zip(*points)
            style = "--" if backend == "sdpa no regions" else "-"
            axes.plot(x, y, style, color=colour, marker="o", ms=3.5, lw=2 if colour == OURS else 1.4)
            ends.append((x[-1], y[-1], backend.removesuffix(" (auto)"), colour))
        axes.set_yscale("log")
        size_ticks(axes, [size for size, _ in sized])
        plain_ticks(axes, "y", [r["p50_ms"] for _, r in some])
        axes.set_title(", ".join(panel), fontsize=9, color=INK)
        axes.set_xlabel(x_label)
        label_ends(axes, ends)
        axes.set_ylabel("ms")
    return finish(figure, title, [r for _, r in sized])


PICTURES: dict[str, Callable[[Path], Figure]] = {
    "fps": plot_fps,
    "memory": plot_memory,
    "regions": plot_regions,
    "proposals": plot_proposals,
}


# What rows say -------------------------------------------------------------------------------------------------------


def read(folder: Path, name: str) -> list[Row]:
    path = folder / f"{name}.json"
    return harness.read_results(path) if path.exists() else []


def kind_of(row: Row) -> str | None:
    """eager, compiled or zs3fast (its own choice of backends); None for everything else."""
    if row["backend"] in NAMES:
        return None
    return "zs3fast" if row["backend"] == "zs3fast" else row["backend"].rpartition(" ")[2]


def floor_of(rows: Sequence[Row], method: str) -> str:
    return next(r["floor"] for r in rows if r["name"] == method)


def images_per_second(row: Row) -> float:
    return row.get("images_per_second") or row["batch"] / row["p50_ms"] * 1e3


def contender_colours(backends: Sequence[str]) -> dict[str, str]:
    """zs3fast's own colour first, the others in the order they were measured; joint ones of a layer in greys."""
    names = list(dict.fromkeys(backends))
    ours = [name for name in names if name.startswith("zs3fast")]
    rest = [name for name in names if name not in ours]
    palette = (*OTHER, COMPILED, "#56b4e9", "#9a9a9a")
    return dict.fromkeys(ours, OURS) | {name: palette[i % len(palette)] for i, name in enumerate(rest)}


# Files ---------------------------------------------------------------------------------------------------------------


def draw(folder: Path) -> list[Path]:
    """Every image that the folder's results allow; the files written."""
    devices = {r["device"] for path in folder.glob("*.json") for r in harness.read_results(path) if "device" in r}
    if len(devices) > 1:
        raise ValueError(f"{folder}: expected results of one device, got {', '.join(sorted(devices))}")
    written = []
    for name, plot in PICTURES.items():
        path = folder / f"{name}.png"
        try:
            figure = plot(folder)
        except NotMeasured as error:
            print(f"{path}: not drawn, nothing measured: {error}")
            continue
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary, format="png", metadata={"Software": None})
        temporary.replace(path)
        print(f"{path}: written")
        written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="folders of results (all of bench/results)")
    args = parser.parse_args(argv)
    measured = sorted(path.parent for path in harness.RESULTS.glob("*/models.json"))  # not the counts of instructions
    for folder in args.folders or measured:
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder")
        draw(folder)


if __name__ == "__main__":
    main()
