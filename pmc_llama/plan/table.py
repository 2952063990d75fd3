"""A plan in words and numbers, on a terminal or in a file."""

from collections.abc import Iterator
from datetime import timedelta
from itertools import cycle

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pmc_llama.config import Recipe
from pmc_llama.plan.advice import Batch
from pmc_llama.plan.cluster import Cluster
from pmc_llama.plan.picture import COLORS
from pmc_llama.plan.plan import Plan, assumptions, gib

_BAR = 40  # characters of a full GPU


def describe(plan: Plan) -> RenderableType:
    """All of it: memory, time of a step, the run, advice, assumptions."""
    return Group(*_sections(plan))


def headline(plan: Plan) -> str:
    """What was planned, in one line."""
    cluster, batch = plan.cluster, plan.recipe.batch
    tokens = f"{batch.micro_size} x {plan.recipe.data.sequence_length} tokens"
    return (
        f"{plan.recipe.model.size} ({plan.work.shape.parameters / 1e9:.1f} billion parameters) under "
        f"{plan.recipe.backend} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}; "
        f"micro-batches of {tokens}, {plan.work.accumulation} a step"
    )


def batches_heading(recipe: Recipe, cluster: Cluster) -> str:
    """What is above the rows of `batch_row`."""
    where = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
    columns = f"{'recomputed':12}{'micro-batch':>12}{'GiB':>8}{'tokens/s a GPU':>16}  to set"
    return (
        f"The largest micro-batch of {recipe.data.sequence_length} tokens under {recipe.backend} on {where}, "
        f"{gib(cluster.gpu.memory_bytes)} GiB each; the global batch stays.\n"
        f"Planned, not measured: the dry run of `pmc-llama train` confirms it.\n\n{columns}"
    )


def batch_row(batch: Batch) -> str:
    """A row of what `pmc-llama plan --find-batch` found."""
    if batch.memory is None:
        return f"{batch.checkpointing:12}{'none fits':>12}"
    figures = f"{gib(batch.memory.total):>8}{batch.tokens_per_second:16,.0f}"
    return f"{batch.checkpointing:12}{batch.micro_size:>12}{figures}  {' '.join(batch.settings)}"


def _sections(plan: Plan) -> Iterator[RenderableType]:
    yield Text(f"{headline(plan)}\n", style="bold")
    yield _memory(plan)
    yield _verdict(plan)
    yield _step(plan)
    yield _run(plan)
    yield Text("Planned, not measured. Assumed:", style="bold")
    for sentence in assumptions(plan):
        yield Text(f"  {sentence}", style="dim")


def _memory(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE, title="Memory of a GPU, at the peak of a step", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("of the GPU")
    device, start = plan.cluster.gpu.memory_bytes, 0
    for (name, size), color in zip(plan.memory.parts.items(), cycle(COLORS), strict=False):
        left = round(_BAR * min(start, device) / device)
        right = round(_BAR * min(start + size, device) / device)
        bar = Text(" " * left + "█" * (right - left), style=color)
        table.add_row(name, gib(size), bar)
        start += size
    table.add_section()
    table.add_row("total", gib(start), f"{start / device:.0%} of {gib(device)} GiB")
    table.add_row("host, a rank", gib(plan.memory.host), "states and a checkpoint's copy")
    return table


def _verdict(plan: Plan) -> Text:
    largest = plan.largest_micro_size
    if plan.fits:
        return Text(f"It fits. The largest micro-batch that does is {largest}.\n", style="bold green")
    lines = ["It does not fit."]
    if largest is not None:
        lines.append(f"The largest micro-batch that does is {largest}.")
    if not plan.changes:
        lines.append("No change of micro-batch, checkpointing, sharding or nodes makes it fit.")
    for number, change in enumerate(plan.changes):
        hours = change.step_seconds * change.nodes * plan.cluster.gpus_per_node / 3600
        cost = hours * plan.duration.steps
        least = "The cheapest change" if number == 0 else "or"
        lines.append(
            f"{least}: {' '.join(change.settings)}  ({gib(change.memory.total)} GiB, {cost:,.0f} GPU-hours)"
        )
    return Text("\n".join([*lines, ""]), style="bold red")


def _step(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE, title="Time of a step", title_justify="left")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    parts = {name: value for name, value in vars(plan.step).items() if value}
    for name, value in parts.items():
        label = "communication, not hidden" if name == "communication" else name
        table.add_row(label, f"{value:.3f}", f"{value / plan.step.total:.1%}")
    table.add_section()
    table.add_row("total", f"{plan.step.total:.3f}", "")
    return table


def _run(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE, show_header=False, title="The run", title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    duration, ranks = plan.duration, plan.cluster.ranks
    rows = {
        "tokens/s a GPU": f"{plan.tokens_per_second:,.0f}",
        "tokens/s": f"{plan.tokens_per_second * ranks:,.0f}",
        "model FLOPs utilization": f"{plan.mfu:.1%}",
        "steps": f"{duration.steps:,}",
        "tokens, padding included": f"{duration.tokens:,}",
        "wall-clock": in_words(duration.wall_seconds),
        "GPU-hours": f"{duration.gpu_hours:,.0f}",
        "an evaluation": f"{duration.evaluation_seconds:,.1f} s",
        "a checkpoint": f"{duration.checkpoint_bytes / 1e9:,.0f} GB",
        "to write it": f"{duration.checkpoint_seconds:,.0f} s",
        "training stops for it": f"{duration.stall_seconds:,.1f} s",
        "checkpoints kept": f"{duration.kept_bytes / 1e12:,.2f} TB",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def in_words(seconds: float) -> str:
    """Days and hours; hours and minutes below a day."""
    if seconds < 86400:
        return str(timedelta(seconds=round(seconds)))
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} days {hours} hours"
