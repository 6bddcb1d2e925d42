"""How the images of `plots.py` look: size, ticks, names at the ends of lines, title and caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#333333", "#dddddd"
WIDTH, DPI = 8.4, 150


def new_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def size_ticks(axes: Axes, sizes: Sequence[int]) -> None:
    """The sizes that were measured, on a logarithmic axis; of two that would overlap the larger one."""
    axes.set_xscale("log")
    ordered = sorted(set(sizes), reverse=True)
    shown = [size for i, size in enumerate(ordered) if i == 0 or ordered[i - 1] > 1.3 * size]
    axes.set_xticks(shown, [str(size) for size in shown])
    axes.minorticks_off()


def plain_ticks(axes: Axes, which: str, values: Sequence[float]) -> None:
    """1, 2, 5, 10, 20, ... within what is shown: numbers, not powers."""
    low, high = min(values), max(values)
    ticks = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]
    ticks = [t for t in ticks if low * 0.6 <= t <= high * 1.6]
    getattr(axes, f"set_{which}ticks")(ticks, [f"{t:g}" for t in ticks])


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """A name at the right end of every line, in its colour, moved apart where two would overlap (logarithmic y)."""
    axes.margins(x=0.05)
    low, high = axes.get_ylim()
    gap = (high / low) ** 0.062
    last = 0.0
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        place = max(y, last * gap)
        last = place
        axes.annotate(
            text, (x, y), (1.03, place), textcoords=("axes fraction", "data"), va="center", fontsize=8, color=colour,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": FAINT, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip


def finish(figure: Figure, title: str, rows: Sequence[dict[str, Any]], how: str = "medians") -> Figure:
    """Title, the device in the caption, and quiet axes. `how`: what the numbers are."""
    devices = {r["device"] for r in rows}
    assert len(devices) == 1, devices
    first = rows[0]
    parts = [first["device"], *([f"{first['threads']} threads"] if "threads" in first else [])]
    parts += sorted({r["dtype"] for r in rows}) + [f"torch {v}" for v in sorted({r["versions"]["torch"] for r in rows})]
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    figure.supxlabel(", ".join(parts) + f"; {how}", x=0.01, ha="left", fontsize=7.5, color="#777777")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=FAINT, lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=INK)
        axes.xaxis.label.set(fontsize=9, color=INK)
        axes.yaxis.label.set(fontsize=9, color=INK)
    return figure
