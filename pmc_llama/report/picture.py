"""A report at a glance: a panel a set, a point a model with its interval, lines for what it has to beat."""

from pathlib import Path
from typing import TYPE_CHECKING

from pmc_llama.report.paper import LLAMA
from pmc_llama.report.rows import Report, Row
from pmc_llama.report.table import name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito's palette, told apart by everyone.
_OURS, _PRINTED, _MAJORITY = "#0072B2", "#D55E00", "#000000"


def draw(report: Report, path: Path) -> None:
    """Write it as a PNG, in place in one go."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(name_of(row) for row in report.rows))
    labels = list(dict.fromkeys(row.label for row in report.rows))
    figure = Figure(figsize=(3 + 3.2 * len(sets), 2 + 0.5 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, sets, strict=True):
        _panel(panel, [row for row in report.rows if name_of(row) == name], labels)
        panel.set_title(name)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    handles, names = panels[0].get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.legend(list(unique.values()), list(unique), loc="outside lower center", ncols=4, frameon=False)
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format="png", dpi=150)
    aside.replace(path)


def _panel(panel: "Axes", rows: list[Row], labels: list[str]) -> None:
    for row in rows:
        place = labels.index(row.label)
        share, interval = row.accuracy.share, row.accuracy.interval
        if share is not None and interval is not None:
            ends = [[100 * (share - interval.low)], [100 * (interval.high - share)]]
            panel.errorbar(100 * share, place, xerr=ends, fmt="o", color=_OURS, capsize=3,
                           label="accuracy, 95% interval")  # fmt: skip
        for model, accuracy in row.published.items():
            panel.plot(100 * accuracy, place, "D", color=_PRINTED, label=f"{model}, published",
                       markerfacecolor="none" if model == LLAMA else _PRINTED)  # fmt: skip
    panel.axvline(100 * rows[0].majority, color=_MAJORITY, linestyle="--", linewidth=1,
                  label="majority class")  # fmt: skip
    panel.set_xlabel("accuracy, %")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
