"""The commands `pmc-data fetch pmc` and `pmc-data fetch s2orc`."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from rich.console import Console

from data_tools.errors import UserError

_PMC_TERMS = (
    "Every article has its own licence, which its JSON names (license_code). Commercial: CC0, CC BY, "
    "CC BY-SA, CC BY-ND; noncommercial: CC BY-NC and kin; all: those and articles without a Creative Commons "
    "licence. NLM asks to be named as the source: https://pmc-oa-opendata.s3.amazonaws.com/README.txt"
)
_S2ORC_TERMS = (
    "S2ORC is under ODC-BY 1.0 (https://opendatacommons.org/licenses/by/1-0/): name the Semantic Scholar "
    "Open Research Corpus as the source. The papers in it keep the licences of their own."
)
_S2_KEY = "S2_API_KEY"


def add_arguments(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `fetch` and its two sources; each sets `run`, which takes the parsed arguments."""
    text = "download papers: PMC's open-access subset, or S2ORC"
    fetch = commands.add_parser(
        "fetch",
        help=text,
        description=f"{text}. A killed or interrupted fetch goes on with the same command.",
    )
    sources = fetch.add_subparsers(required=True, metavar="SOURCE")
    _add_pmc(
        sources.add_parser(
            "pmc",
            help="PMC's open-access subset, from its public bucket",
            description=f"PMC's open-access subset, packed for `build`. {_PMC_TERMS}",
        )
    )
    _add_s2orc(
        sources.add_parser(
            "s2orc",
            help="a release of S2ORC, with your key in S2_API_KEY",
            description="A release of S2ORC, through Semantic Scholar's Datasets API, with "
            f"your key in the environment variable {_S2_KEY}. {_S2ORC_TERMS}",
        )
    )


def _add_pmc(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_pmc)
    _add_common(command, connections=32)
    command.add_argument(
        "--group", choices=("commercial", "noncommercial", "all"), required=True, help="which licences"
    )
    command.add_argument(
        "--since", type=_day, metavar="DATE", help="only articles new or changed since, as YYYY-MM-DD"
    )
    command.add_argument(
        "--limit", type=_positive, metavar="N", help="look at the first N articles of the bucket only"
    )
    command.add_argument(
        "--articles-per-package",
        type=_positive,
        default=10_000,
        metavar="N",
        help="articles looked at for each package (default 10,000)",
    )


def _add_s2orc(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_s2orc)
    _add_common(command, connections=4)
    command.add_argument(
        "--dataset", choices=("s2orc_v2", "s2orc"), default="s2orc_v2", help="default s2orc_v2"
    )
    command.add_argument(
        "--release", default="latest", metavar="DATE", help="such as 2026-09-17 (default: the latest)"
    )


def _add_common(command: argparse.ArgumentParser, connections: int) -> None:
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the papers go")
    command.add_argument("--endpoint", metavar="URL", help="another server than the publisher's")
    command.add_argument(
        "--connections",
        type=_positive,
        default=connections,
        metavar="N",
        help=f"requests at once (default {connections})",
    )


def _pmc(options: argparse.Namespace) -> None:
    with _extra():
        from data_tools.fetch.pmc import BUCKET, fetch_pmc
    console = Console(file=sys.stderr)
    done = fetch_pmc(
        options.output,
        options.group,
        endpoint=options.endpoint or BUCKET,
        connections=options.connections,
        since=options.since,
        limit=options.limit,
        articles_per_package=options.articles_per_package,
        console=console,
    )
    retracted = f", {done.retracted:,} of them retracted and marked so" if done.retracted else ""
    packages = "1 package" if done.packages == 1 else f"{done.packages:,} packages"
    print(f"{done.articles:,} articles in {packages} in {options.output}{retracted}.")
    for reason, number in done.left_out.items():
        print(f"  left out: {number:,} {reason}")
    print(_PMC_TERMS)


def _s2orc(options: argparse.Namespace) -> None:
    with _extra():
        from data_tools.fetch.s2orc import API, fetch_s2orc
    key = os.environ.get(_S2_KEY, "").strip()
    if not key:
        raise UserError(
            f"The Datasets API needs a key in the environment variable {_S2_KEY}; "
            "keys are given at https://www.semanticscholar.org/product/api#api-key-form."
        )
    done = fetch_s2orc(
        options.output,
        key,
        dataset=options.dataset,
        release=options.release,
        endpoint=options.endpoint or API,
        connections=options.connections,
        console=Console(file=sys.stderr),
    )
    print(
        f"Release {done.release} of {options.dataset}: {done.files} files, {done.bytes / 1e9:,.1f} GB, "
        f"in {options.output}; {done.fetched} of them were fetched now."
    )
    if done.newer:
        print(f"There is a newer release, {done.newer}; fetch it into another directory.")
    print(_S2ORC_TERMS)


@contextmanager
def _extra() -> Iterator[None]:
    """What a fetch needs beyond a build is an extra of the package."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("requests", "urllib3"):
            raise
        raise UserError("`pmc-data fetch` needs one more package: pip install 'pmc-llama[fetch]'.") from error


def _day(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value} is not a date such as 2026-11-01") from error


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number of at least 1")
    return int(value)
