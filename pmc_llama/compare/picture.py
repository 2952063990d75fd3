"""A comparison at a glance: losses, their differences, speed, where the time goes and memory on one sheet."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmc_llama.compare.report import QUANTITIES, TIMES, Verdict, differences, sentence
from pmc_llama.compare.runs import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart by everyone. The first line is broad and pale, so that one that lies
# exactly on it is seen on top of it.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1)))
_STACKED = ("data", "forward_backward", "optimizer", "checkpoint")


def draw(results: Sequence[Result], verdicts: Sequence[Verdict], path: Path) -> None:
    """Write the sheet as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplot_mosaic(
        [["losses", "speed"], ["losses", "time"], ["difference", "memory"]], width_ratios=(3, 2)
    )
    reference, *others = results
    said = [sentence(result, reference, verdict) for result, verdict in zip(others, verdicts, strict=True)]
    figure.suptitle("\n".join(said[:4]), fontsize=10, x=0.01, ha="left")
    _losses(panels["losses"], results)
    _differences(panels["difference"], results)
    quantities = {quantity.key: quantity for quantity in QUANTITIES}
    _bars(panels["speed"], results, quantities["tokens_per_second"].of, "tokens/s")
    _bars(panels["memory"], results, quantities["peak_memory_gib"].of, "peak memory of a rank, GiB")
    _times(panels["time"], results)
    for panel in panels.values():
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format="png", dpi=150)
    aside.replace(path)


def _style(number: int) -> dict[str, Any]:
    color = _COLORS[number % len(_COLORS)]
    if number == 0:
        return {"color": color, "linewidth": 4, "alpha": 0.45}
    return {"color": color, "linewidth": 1.4, "linestyle": _DASHES[number % len(_DASHES)]}


def _losses(panel: "Axes", results: Sequence[Result]) -> None:
    for number, result in enumerate(results):
        panel.plot(list(result.losses), list(result.losses.values()), label=result.name, **_style(number))
        size = max(4, 11 - 3 * number)
        points: dict[str, Any] = {
            "linestyle": "none",
            "marker": "o",
            "markerfacecolor": "none",
            "markersize": size,
        }
        panel.plot(list(result.heldout), list(result.heldout.values()),
                   color=_COLORS[number % len(_COLORS)], **points)  # fmt: skip
    panel.set_ylabel("loss, nats a token (circles: held out)")
    panel.legend(frameon=False)


def _differences(panel: "Axes", results: Sequence[Result]) -> None:
    from matplotlib.ticker import MaxNLocator

    equal, reference = True, results[0]
    for number, result in enumerate(results[1:], start=1):
        change = differences(result, reference)
        equal = equal and not any(change.values())
        panel.plot(list(change), list(change.values()), label=result.name, **_style(number))
    panel.set_ylabel("difference from the first")
    panel.set_xlabel("step")
    if equal:
        panel.set_yticks([0])  # no scale to read off a line that is zero everywhere
    else:
        panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _bars(panel: "Axes", results: Sequence[Result], of: Any, title: str) -> None:
    """A bar a variant: the median of its repetitions, with the least and the most."""
    for number, result in enumerate(results):
        spread = result.spread([of(run) for run in result.runs])
        if spread:
            error = [[spread.median - spread.least], [spread.most - spread.median]]
            panel.barh(number, spread.median, xerr=error if len(result.runs) > 1 else None, height=0.6,
                       color=_COLORS[number % len(_COLORS)], alpha=0.8)  # fmt: skip
    _name_bars(panel, results, title)


def _times(panel: "Axes", results: Sequence[Result]) -> None:
    stacked = [quantity for quantity in TIMES if quantity.key in _STACKED]
    ends = [0.0] * len(results)
    for kind, quantity in enumerate(stacked):
        spreads = [result.spread([quantity.of(run) for run in result.runs]) for result in results]
        widths = [spread.median if spread else 0.0 for spread in spreads]
        panel.barh(range(len(results)), widths, left=ends, height=0.6, label=quantity.key.replace("_", ", "),
                   color=_COLORS[-1 - kind], alpha=0.6)  # fmt: skip
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    panel.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    _name_bars(panel, results, "seconds a step")


def _name_bars(panel: "Axes", results: Sequence[Result], title: str) -> None:
    panel.set_yticks(range(len(results)), [result.name for result in results])
    panel.invert_yaxis()
    panel.set_xlabel(title)
