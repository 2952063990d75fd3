"""A plan as a picture: the memory of a GPU and the time of a step, as stacked bars."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.errors import UserError
from data_tools.files import published
from pmc_llama.plan.cluster import GIB
from pmc_llama.plan.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart by everyone, and greys.
COLORS = (
    "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#F0E442", "#999999", "#555555"
)  # fmt: skip


def draw(plans: Mapping[str, Plan], title: str, path: Path) -> None:
    """Write a PNG: a bar of memory and a bar of time for each plan.

    Args:
        plans: by the name that stands beside their bars.
        title: above them.
        path: of the picture.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("A picture needs matplotlib: pip install 'pmc-llama[compare]'.") from error
    figure = Figure(figsize=(11, 3.6 + 1.1 * len(plans)), layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    memory, time = figure.subplots(2, 1)
    parts = {
        name: {part: size / GIB for part, size in plan.memory.parts.items()} for name, plan in plans.items()
    }
    _stack(memory, parts, "memory of a GPU at the peak of a step, GiB")
    for row, plan in enumerate(plans.values()):
        limit = plan.cluster.gpu.memory_bytes / GIB
        memory.plot([limit, limit], [row - 0.45, row + 0.45], color="black", linewidth=1.5)
        memory.annotate(f" {limit:.0f}", (limit, row), va="center", fontsize=8)
    _stack(time, {name: vars(plan.step) for name, plan in plans.items()}, "seconds of a step")
    try:
        with published(path) as partial:
            figure.savefig(partial, format="png", dpi=150)
    except OSError as error:
        raise UserError(f"The picture {path} cannot be written: {error.strerror}.") from error


def _stack(axes: "Axes", bars: Mapping[str, Mapping[str, float]], title: str) -> None:
    """A horizontal bar for each name, of the same parts in all; those that are 0 in all are left out."""
    parts = list(next(iter(bars.values())))
    ends = [0.0] * len(bars)
    for part, color in zip(parts, cycle(COLORS), strict=False):
        sizes = [bar[part] for bar in bars.values()]
        if any(sizes):
            axes.barh(list(bars), sizes, left=ends, height=0.6, color=color, label=part)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=9, loc="lower left", bbox_to_anchor=(0, 1), columnspacing=1)
