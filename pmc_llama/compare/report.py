"""A comparison in words and numbers: Markdown for people, JSON for programs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pmc_llama.compare.runs import GIB, PROFILED_STEPS, WARM_UP_STEPS, Result, Run, Spread

TABLE_STEPS = 30
PADDING = "Tokens/s and model FLOPs count the padding of papers shorter than a sequence."


@dataclass(frozen=True)
class Quantity:
    """A row of the table.

    Args:
        key: in the JSON report.
        label: in the table, with its unit.
        form: how a number is formatted.
        of: its value in one repetition.
    """

    key: str
    label: str
    form: str
    of: Callable[[Run], float | None]


def _of_step(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.median(key)


def _gib(run: Run) -> float | None:
    size = run.most("peak_memory_bytes")
    return None if size is None else size / GIB


def _profiled(kind: str) -> Callable[[Run], float | None]:
    return lambda run: run.profiled(kind)


QUANTITIES = (
    Quantity("tokens_per_second", "tokens/s", ",.0f", _of_step("tokens_per_second")),
    Quantity(
        "tokens_per_second_per_device", "tokens/s a device", ",.0f", _of_step("tokens_per_second_per_device")
    ),
    Quantity("mfu", "model FLOPs utilization", ".1%", _of_step("mfu")),
    Quantity("peak_memory_gib", "peak memory of a rank, GiB", ".2f", _gib),
    Quantity(
        "time_to_first_step", "time to first step, s", ".1f", lambda run: run.first("seconds_since_start")
    ),
)

TIMES = (
    Quantity("step", "step", ".4f", _of_step("step_seconds")),
    Quantity("data", "data", ".4f", _of_step("data_seconds")),
    Quantity("forward_backward", "forward and backward", ".4f", _of_step("forward_backward_seconds")),
    Quantity("optimizer", "optimizer, with clipping", ".4f", _of_step("optimizer_seconds")),
    Quantity(
        "checkpoint", "checkpoint, mean over all steps", ".4f", lambda run: run.mean("checkpoint_seconds")
    ),
    Quantity("communication", "communication (profiled)", ".4f", _profiled("communication")),
)


@dataclass(frozen=True)
class Verdict:
    """How the losses of a variant differ from those of the first one.

    Args:
        steps: that both made.
        worst_step: where they differ most; None when they have no step in common.
        worst: loss there, less the reference's.
        relative: `worst`, as a part of the reference's loss, without sign.
        allowed: what `relative` may be.
    """

    steps: int
    worst_step: int | None
    worst: float
    relative: float
    allowed: float

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        return self.worst_step is not None and self.relative <= self.allowed


def differences(result: Result, reference: Result) -> dict[int, float]:
    """Training loss minus that of the reference, at the steps that both made."""
    others = reference.losses
    return {step: loss - others[step] for step, loss in result.losses.items() if step in others}


def judge(result: Result, reference: Result, allowed: float) -> Verdict:
    """Hold the losses of a variant against those of the first one.

    Args:
        result: the variant.
        reference: the first one.
        allowed: relative difference, see `variants.allowed_difference`.
    """
    found = differences(result, reference)
    if not found:
        return Verdict(0, None, 0.0, 0.0, allowed)
    step, worst = max(found.items(), key=lambda item: abs(item[1]))
    return Verdict(len(found), step, worst, abs(worst / reference.losses[step]), allowed)


def sentence(result: Result, reference: Result, verdict: Verdict) -> str:
    """A verdict in words."""
    names = f"{result.name} and {reference.name}"
    if verdict.worst_step is None:
        return f"{names} have no step in common."
    if verdict.worst == 0:
        return f"The losses of {names} are bitwise equal at all {verdict.steps} steps."
    allowed = f"{verdict.allowed:.2g} of it" if verdict.allowed else "no difference"
    return (
        f"The losses of {names} differ by at most {abs(verdict.worst):.3g} (step {verdict.worst_step} of "
        f"{verdict.steps}), {verdict.relative:.2g} of the loss; {allowed} is allowed"
        f"{'.' if verdict.kept else ', so they DISAGREE.'}"
    )


def describe(
    results: Sequence[Result],
    verdicts: Sequence[Verdict],
    facts: Sequence[str],
    commands: Sequence[str],
    padded: bool = False,
) -> str:
    """The report as Markdown.

    Args:
        results: of each variant; differences are from the first.
        verdicts: on each but the first.
        facts: lines about the machine and the software.
        commands: one a variant, as they can be repeated.
        padded: sequences are filled up where a paper is shorter.
    """
    reference, *others = results
    names = [result.name for result in results]
    title = " and ".join(names) if len(names) < 4 else f"{len(names)} variants"
    lines = [
        f"# {title}, one recipe",
        "",
        *[sentence(result, reference, verdict) for result, verdict in zip(others, verdicts, strict=True)],
        *_repeats(results),
        "",
        "![losses, their differences, speed, time and memory of each variant](comparison.png)",
        "",
        *_table(["", *names], _quantity_rows(results)),
        "",
        *_reading(results),
        *([PADDING, ""] if padded else []),
        "## Where a step's time goes, seconds",
        "",
        *_table(["", *names], [_row(quantity, results) for quantity in TIMES]),
        "",
        "Forward and backward include what they wait for others. Communication is that of "
        f"{PROFILED_STEPS} profiled steps, part of the rows above it and hidden behind them or not.",
        "",
        *_loss_tables(results),
        "## Made with",
        "",
        *[f"- {fact}" for fact in facts],
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "",
        *[f"    {command}" for command in commands],
        "",
    ]
    return "\n".join(lines)


def as_data(
    results: Sequence[Result], verdicts: Sequence[Verdict], facts: Sequence[str], commands: Sequence[str]
) -> dict[str, Any]:
    """The report as plain data: every quantity with its spread, every loss, every verdict."""

    def spread(result: Result, quantity: Quantity) -> dict[str, float] | None:
        found = result.spread([quantity.of(run) for run in result.runs])
        return asdict(found) if found else None

    entries = []
    for number, result in enumerate(results):
        entries.append(
            {
                "name": result.name,
                "ranks": result.variant.ranks,
                "changes": dict(result.variant.changes),
                "repetitions": len(result.runs),
                "repeat_difference": result.repeat_difference,
                "quantities": {quantity.key: spread(result, quantity) for quantity in QUANTITIES},
                "step_seconds": {quantity.key: spread(result, quantity) for quantity in TIMES},
                "losses": result.losses,
                "heldout_losses": result.heldout,
                "verdict": asdict(verdicts[number - 1]) | {"kept": verdicts[number - 1].kept}
                if number
                else None,
                "command": commands[number],
            }
        )
    return {"made_with": list(facts), "variants": entries}


def _reading(results: Sequence[Result]) -> list[str]:
    repeated = len(results[0].runs)
    spread = f" (least to most of {repeated} repetitions)" if repeated > 1 else ""
    return [
        f"Speeds and times are medians without the first {WARM_UP_STEPS} steps{spread}. Time to the first "
        "step counts from the start of the process.",
        "",
    ]


def _repeats(results: Sequence[Result]) -> list[str]:
    if len(results[0].runs) < 2:
        return []
    worst = max(results, key=lambda result: result.repeat_difference)
    if worst.repeat_difference == 0:
        return ["Every repetition has the losses of the first, bit for bit."]
    return [f"Repetitions differ: those of {worst.name} by up to {worst.repeat_difference:.2g} of the loss."]


def _quantity_rows(results: Sequence[Result]) -> list[list[str]]:
    return [
        ["steps", *[f"{len(result.runs[0].rows):,}" for result in results]],
        ["training loss", *[_first_and_last(result.losses) for result in results]],
        ["held-out loss", *[_first_and_last(result.heldout) for result in results]],
        *[_row(quantity, results) for quantity in QUANTITIES],
    ]


def _row(quantity: Quantity, results: Sequence[Result]) -> list[str]:
    cells = []
    for result in results:
        spread = result.spread([quantity.of(run) for run in result.runs])
        cells.append(_shown(spread, quantity.form, repeated=len(result.runs) > 1))
    return [quantity.label, *cells]


def _shown(spread: Spread | None, form: str, repeated: bool) -> str:
    if spread is None:
        return "-"
    middle = format(spread.median, form)
    return f"{middle} ({spread.least:{form}} to {spread.most:{form}})" if repeated else middle


def _loss_tables(results: Sequence[Result]) -> list[str]:
    reference, *others = results
    names = [result.name for result in results]
    changes = [differences(result, reference) for result in others]
    return [
        "## Losses, nats a token",
        "",
        *_table(
            ["step", *names, *[f"{result.name} - {reference.name}" for result in others]],
            [
                [str(step), *[_number(result.losses.get(step), ".7f") for result in results]]
                + [_number(change.get(step), ".2e", zero="0") for change in changes]
                for step in _spread_steps(list(reference.losses), TABLE_STEPS)
            ],
        ),
        "",
        "## Held-out losses, nats a token",
        "",
        *_table(
            ["step", *names],
            [
                [str(step), *[_number(result.heldout.get(step), ".7f") for result in results]]
                for step in _spread_steps(list(reference.heldout), TABLE_STEPS)
            ],
        ),
        "",
    ]


def _first_and_last(values: Mapping[int, float]) -> str:
    if not values:
        return "none"
    return f"{values[min(values)]:.4f} to {values[max(values)]:.4f}"


def _number(value: float | None, form: str, zero: str | None = None) -> str:
    if value is None:
        return "-"
    return zero if zero is not None and value == 0 else format(value, form)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _spread_steps(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
