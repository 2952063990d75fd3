"""`pmc-llama plan`: what a recipe needs at any size of cluster, found on any machine."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_tools.errors import UserError
from pmc_llama.recipe_file import RecipeParser, recipe_path


def plan(arguments: Sequence[str]) -> int:
    """Tell the memory, time and GPU-hours of a recipe on any cluster, without a GPU."""
    parser = RecipeParser("pmc-llama plan", recipe_path(arguments), (plan.__doc__ or "").strip())
    parser.add_argument("--nodes", type=int, default=1, help="of the cluster")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="ranks, one a GPU")
    parser.add_argument(
        "--gpu", default="h100", help="a100-40, a100, h100, h100-pcie, h100-nvl, h200, b200, ..."
    )
    parser.add_argument(
        "--interconnect",
        default="ib400",
        help="between nodes: ib100 ... ib800 (Gbit/s of each GPU's adapter), eth25 ... eth200 (of a node)",
    )
    parser.add_argument(
        "--filesystem", type=float, default=5.0, help="GB/s at which all nodes together write a checkpoint"
    )
    parser.add_argument("--tokens", type=int, help="of the corpus, when it is not on this machine")
    parser.add_argument("--papers", type=int, help="of the corpus, when it is not on this machine")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw memory and time as stacked bars")
    parser.add_argument(
        "--find-batch",
        action="store_true",
        help="find the largest micro-batch that fits, for each kind of activation checkpointing",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON: bytes and seconds")
    recipe, values = parser.read(arguments)
    options = argparse.Namespace(**values)
    if recipe.lora:
        raise UserError(
            "The recipe has lora, and plan knows only runs that train all weights; with --lora null it plans "
            "such a run, which needs more memory and time."
        )
    for name in ("nodes", "gpus_per_node", "filesystem", "tokens", "papers"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected a number above 0")

    from pmc_llama.plan.advice import find_batches
    from pmc_llama.plan.cluster import Cluster, find_gpu, node_bandwidth
    from pmc_llama.plan.duration import corpus_here, corpus_size
    from pmc_llama.plan.memory import check_batch
    from pmc_llama.plan.picture import draw
    from pmc_llama.plan.plan import as_data, batch_data, make_plan, planned_config
    from pmc_llama.plan.table import batch_row, batches_heading, describe, headline

    cluster = Cluster(
        gpu=find_gpu(options.gpu),
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        node_bandwidth=node_bandwidth(options.interconnect, options.gpus_per_node),
        filesystem_bandwidth=options.filesystem * 1e9,
    )
    if options.find_batch:
        check_batch(recipe, cluster.ranks)
        batches = find_batches(recipe, planned_config(recipe, corpus_here(recipe)), cluster)
        if options.json:
            print(json.dumps([batch_data(batch) for batch in batches], indent=1))
            return 0
        print(batches_heading(recipe, cluster), flush=True)
        for batch in batches:
            print(batch_row(batch), flush=True)
        return 0
    corpus = corpus_size(recipe, options.tokens, options.papers)
    made = make_plan(recipe, planned_config(recipe, corpus_here(recipe)), cluster, corpus)
    if options.picture:
        bar = f"{recipe.model.size} {recipe.backend}\n{options.nodes} x {options.gpus_per_node} {options.gpu}"
        draw({bar: made}, headline(made), options.picture)
    if options.json:
        print(json.dumps(as_data(made), indent=1))
        return 0
    console = Console(emoji=False, highlight=False)
    console.print(describe(made), soft_wrap=True)
    if options.picture:
        console.print(f"{options.picture} shows memory and time as bars", markup=False, soft_wrap=True)
    return 0
