"""The model card of an export: what the checkpoint tells of itself, and what its owner adds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_tools.errors import UserError
from pmc_llama.checkpoint import Manifest


@dataclass(frozen=True)
class About:
    """What only the owner of a model knows.

    Attributes:
        license: identifier of a licence, as Hugging Face has them (`apache-2.0`, `llama2`, ...); None where
            nobody has said.
        results: files that `pmc-llama evaluate --output` wrote of this model.
    """

    license: str | None = None
    results: tuple[Path, ...] = ()


NOTHING_MORE = About()


def model_card(
    name: str, manifest: Manifest, parameters: int, dtype: str, about: About, adapters: bool = False
) -> str:
    """Markdown with the front matter of Hugging Face.

    Args:
        name: of the model.
        manifest: of the checkpoint.
        parameters: of the model.
        dtype: of its weights.
        about: what else is to be said.
        adapters: whether the export is adapters alone, without the weights that they belong to.

    Raises:
        UserError: a file of results is none.
    """
    base = manifest.recipe["model"]["initialize_from"]
    versions = ", ".join(f"{package} {version}" for package, version in sorted(manifest.versions.items()))
    what = f"LoRA adapters for `{base}`," if adapters else "A LLaMA language model"
    return f"""---
library_name: {"peft" if adapters else "transformers"}
pipeline_tag: text-generation
license: {about.license or "other"}
tags: [llama, biomedical, pretraining]
---
# {name}

{what} of {parameters:,} parameters ({dtype}), trained on biomedical papers with pmc-llama.

| | |
|---|---|
| base model | {base or "none (random first weights)"} |
| optimizer steps | {manifest.step:,} |
| sequences seen | {manifest.samples:,} |
| tokens seen | {manifest.tokens:,} (positions, padding included) |
| corpus fingerprint | `{manifest.corpus}` |
| sharding backend | {manifest.recipe["backend"]} |
| versions | {versions} |
{_results(about.results)}
## Intended use

Research on biomedical text, and a starting point for fine-tuning. It is a base model: it continues text and
has not been taught to follow instructions. It makes mistakes with confidence, may repeat errors and personal
data of its sources, and has not been tested for safety. Do not use it for medical advice or clinical
decisions.

## Tokenizer

`AutoTokenizer` gives exactly the ids that the model was trained on. Characters such as `</s>` or
`<|endoftext|>` in a text are text; pass `split_special_tokens=False` to have them read as control tokens.

## Licence

{_license(about.license, base)}
The papers of the corpus have licences of their own.

## Recipe

```yaml
{yaml.safe_dump(manifest.recipe, sort_keys=False).rstrip()}
```
"""


def _license(license: str | None, base: str | None) -> str:
    stated = f"Published under `{license}`. " if license else ""
    if base:
        return f"{stated}The weights continue those of `{base}` and stay under that model's licence."
    return f"{stated}The weights were trained from random values and are under no other model's licence."


def _results(files: tuple[Path, ...]) -> str:
    if not files:
        return ""
    lines = [line for file in files for line in _lines(file)]
    return "\n## Results\n\n" + "\n".join(
        ["| measured | on | value | 95% interval | n |", "|---|---|---|---|---|", *lines, ""]
    )


def _lines(file: Path) -> list[str]:
    """A row of the table for each result of a file."""
    from pmc_llama.evaluate.results import read_scores
    from pmc_llama.report.rows import make_report

    found = _read(file)
    lines = []
    if "perplexity" in found:
        of, kept = found["perplexity"], found["held_out"]
        for name, key in (("perplexity a token", "per_token"), ("bits a byte", "bits_per_byte")):
            one = of[key]
            interval = f"{one['low']:.4g} to {one['high']:.4g}"
            lines.append(
                f"| {name} | papers held out ({kept:,}) | {one['value']:.4g} | {interval} | {of['texts']:,} |"
            )
    if "scores" in found:
        for row in make_report([read_scores(file)]).rows:
            share, sure = row.accuracy.share, row.accuracy.interval
            if share is not None and sure is not None:
                accuracy = f"{share:.2%} | {sure.low:.2%} to {sure.high:.2%}"
                what = f"accuracy ({row.method}, prompt `{row.prompt}`)"
                lines.append(f"| {what} | {row.set}, {row.split} | {accuracy} | {row.accuracy.questions:,} |")
    if not lines:
        raise UserError(f"{file} holds no results; expected a file that `pmc-llama evaluate --output` wrote.")
    return lines


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"The results {file} cannot be read: {error}.") from error
    return found if isinstance(found, dict) else {}
