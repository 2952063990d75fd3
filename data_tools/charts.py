"""Pictures of a corpus. matplotlib is imported here alone: `pip install pmc-llama[compare]`."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.files import published
from data_tools.stats import Statistics


def draw(statistics: Statistics, path: Path) -> None:
    """Draw tokens a paper, papers by year, and what was left out, as PNG.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("A picture needs matplotlib: pip install 'pmc-llama[compare]'.") from error
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    lengths, years, waterfall = figure.subplots(1, 3)
    _draw_lengths(lengths, statistics)
    _draw_years(years, statistics)
    _draw_waterfall(waterfall, statistics)
    try:
        with published(path) as partial:
            figure.savefig(partial, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"The picture {path} cannot be written: {error.strerror}.") from error


def _draw_lengths(axes: Any, statistics: Statistics) -> None:
    edges = statistics.edges
    widths = [end - start for start, end in pairwise(edges)]
    axes.bar(edges[:-1], statistics.histogram, widths, align="edge", edgecolor="white", linewidth=0.5)
    axes.axvline(statistics.quantiles["median"], color="black", linewidth=1, label="median")
    axes.set(xscale="log", xlabel="tokens a paper", ylabel="papers", title="Length")
    axes.legend()


def _draw_years(axes: Any, statistics: Statistics) -> None:
    years = {int(year): share.papers for year, share in statistics.years.items() if year != "none"}
    axes.bar(list(years), list(years.values()))
    axes.set(xlabel="year", ylabel="papers", title="Year")


def _draw_waterfall(axes: Any, statistics: Statistics) -> None:
    steps = statistics.waterfall
    read = steps[0].left + steps[0].left_out if steps else sum(s.papers for s in statistics.splits.values())
    names = ["read", *(step.reason for step in steps), "kept"]
    kept = steps[-1].left if steps else read
    widths = [read, *(step.left_out for step in steps), kept]
    starts = [0, *(step.left for step in steps), 0]
    colors = ["C0", *("C3" for _ in steps), "C2"]
    axes.barh(names, widths, left=starts, color=colors)
    axes.invert_yaxis()
    axes.set(xlabel="records", title="Read, left out, kept")
