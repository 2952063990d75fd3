"""From questions to a corpus of prompts, which is trained on as any corpus is, in `data.mode: whole`.

A part for the training questions and one for those of the dev splits; a document a question. Beside what
every corpus has:

    loss_starts.npy    int64 `[documents]`, ascending: where in the concatenation of all parts each document's
                       answer begins; not there when the loss is on all of a document
    prompts.json       how the documents were made, from which questions, under which licences
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.decide import REASONS
from data_tools.documents import DocumentTable, Row, table_path, text_hash
from data_tools.errors import UserError
from data_tools.files import aside, checksum, sync, write_published
from data_tools.manifest import (
    Counts,
    Decision,
    FileInfo,
    Inputs,
    Manifest,
    PartInfo,
    SplitInfo,
    TokenizerInfo,
    to_json,
    write_manifest,
)
from data_tools.papers import Rejected, Source
from data_tools.parts import EXAMPLES, add_counts
from data_tools.progress import Progress
from data_tools.prompt_documents import (
    NotUsable,
    PromptDocument,
    PromptRecipe,
    document_of,
    require_possible,
)
from data_tools.prompt_questions import Asked, chosen_sets, read_asked, wanted
from data_tools.questions.written import QuestionSets, require_free
from data_tools.recipe import Decisions, Recipe
from data_tools.rejected import RejectedFile
from data_tools.rules import RULES_VERSION
from data_tools.splits import array_file, split_file
from data_tools.token_files import TokenFileWriter, idx_path
from data_tools.tokenizer import Tokenizer

FORMAT = "pmc-llama prompts"
VERSION = 1
_QUIET = 3.0  # seconds
_SPLITS = {"train": "train", "dev": "heldout"}
"""Of the questions, and of the corpus."""


@dataclass
class SplitMade:
    """What became of the questions of one split of the questions.

    Attributes:
        questions: there are.
        cut: documents of which words of the context were left out.
    """

    questions: int
    cut: int = 0
    lengths: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)


def make_prompts(questions: Path, tokenizer: Path, output: Path, recipe: PromptRecipe) -> Manifest:
    """Make a corpus of prompts; it appears under its name when it is complete.

    Args:
        questions: directory that `pmc-data questions` made.
        tokenizer: of the model that is to be trained.
        output: directory to make.
        recipe: how.

    Raises:
        UserError: anything that its owner can mend; nothing is written then.
    """
    require_possible(recipe)
    require_free(output)
    found, encoder = QuestionSets.open(questions), Tokenizer(tokenizer)
    sets = chosen_sets(found, recipe)
    partial = aside(output)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "parts").mkdir(parents=True)
        manifest = _write(partial, found, sets, encoder, recipe)
        os.replace(partial, output)
        sync(output.parent)
    except OSError as error:
        raise UserError(f"The prompts cannot be written to {output}: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write(
    directory: Path, found: QuestionSets, sets: list[str], tokenizer: Tokenizer, recipe: PromptRecipe
) -> Manifest:
    made: dict[str, SplitMade] = {}
    parts: list[tuple[PartInfo, Counts]] = []
    for split in _SPLITS:
        asked = read_asked(found, sets, split)
        made[split] = SplitMade(len(asked))
        chosen = wanted(asked, tokenizer, recipe) if split == "train" else asked
        if chosen:
            name = f"part-{len(parts):05}"
            parts.append(_write_part(directory, name, found, split, chosen, tokenizer, recipe, made[split]))
    counts = add_counts([counts for _, counts in parts])
    infos = [info for info, _ in parts]
    _require_usable(counts, made, recipe)
    lengths = {split: np.array(one.lengths, np.int64) for split, one in made.items()}
    tokens = np.concatenate(list(lengths.values()))
    firsts = np.cumsum([0, *(info.documents for info in infos)])[:-1]
    of_split = np.repeat(np.arange(len(lengths)), [len(one) for one in lengths.values()])
    decided = {
        f"{name}.npy": split_file(tokens, of_split == number, firsts)
        for number, name in enumerate(_SPLITS.values())
    }
    decided["reasons.npy"] = array_file(np.zeros(len(tokens), np.uint8))
    contents = {"prompts.json": to_json(_description(found, sets, recipe, made))}
    if recipe.loss == "answer":
        answers = np.concatenate([np.array(one.answers, np.int64) for one in made.values()])
        contents["loss_starts.npy"] = array_file(np.cumsum(tokens) - tokens + answers)
    contents["rejected.jsonl"] = b"".join(
        (directory / "parts" / f"{info.name}.rejected.jsonl").read_bytes() for info in infos
    )
    files = {name: _file_info(content) for name, content in {**decided, **contents}.items()}
    manifest = Manifest(
        tokenizer=TokenizerInfo(
            tokenizer.sha256,
            tokenizer.vocab_size,
            tokenizer.bos,
            tokenizer.eos,
            tokenizer.unk,
            tokenizer.file_name,
        ),
        dtype=tokenizer.dtype.name,
        rules_version=RULES_VERSION,
        recipe=Recipe(require_pmc_id=False, rules=[], decisions=Decisions(heldout=0.0)),
        counts=counts,
        decisions=[Decision(reason, 0, 0) for reason in REASONS],
        splits={
            name: SplitInfo(len(lengths[split]), int(lengths[split].sum()), files.pop(f"{name}.npy"))
            for split, name in _SPLITS.items()
        },
        files=files,
        parts=infos,
    )
    write_published(directory / tokenizer.file_name, tokenizer.model)
    for name, content in {**decided, **contents}.items():
        write_published(manifest.path(directory, name), content)
    write_manifest(directory, manifest)
    return manifest


def _write_part(
    directory: Path,
    name: str,
    found: QuestionSets,
    split: str,
    asked: Sequence[Asked],
    tokenizer: Tokenizer,
    recipe: PromptRecipe,
    made: SplitMade,
) -> tuple[PartInfo, Counts]:
    """Write a part and its record; lengths and answers of its documents are added to `made`."""
    parts = directory / "parts"
    inputs = _inputs(found, list(dict.fromkeys(one.set for one in asked)), split)
    counts = Counts(read=len(asked))
    with (
        TokenFileWriter(parts / name, tokenizer.dtype) as tokens,
        DocumentTable(table_path(directory, name)) as table,
        RejectedFile(parts / f"{name}.rejected.jsonl") as set_aside,
        Progress(inputs.bytes, "questions", quiet=_QUIET) as progress,
    ):
        for number, one in enumerate(asked, start=1):
            # Bytes stand for work here, so that there is a rate.
            progress.report(0, number, inputs.bytes * number // len(asked))
            source = Source(f"{one.set}.{split}.jsonl", one.line)
            document = document_of(one.question, tokenizer, recipe)
            if isinstance(document, NotUsable):
                _leave_out(counts, Rejected(document.reason, source, document.detail))
                set_aside.add(Rejected(document.reason, source, f"{one.question.id}: {document.detail}"))
                continue
            if not made.lengths:
                tokenizer.check(document.text, document.tokens[int(tokenizer.bos >= 0) :], source)
            tokens.add(document.tokens)
            table.add(_row(found, one, document, source))
            made.lengths.append(len(document.tokens))
            made.answers.append(document.answer)
            made.cut += document.cut > 0
    files = {
        "bin": FileInfo(tokens.tokens * tokenizer.dtype.itemsize, tokens.bin_checksum),
        "idx": FileInfo(idx_path(parts / name).stat().st_size, tokens.idx_checksum),
        "documents.parquet": _file_of(table_path(directory, name)),
        "rejected.jsonl": FileInfo(set_aside.bytes, set_aside.checksum),
    }
    info = PartInfo(name, len(made.lengths), tokens.tokens, inputs, files)
    counts = replace(counts, kept=len(made.lengths))
    record = {"made_with": asdict(recipe), "part": asdict(info), "counts": asdict(counts)}
    write_published(parts / f"{name}.json", to_json(record))
    return info, counts


def _row(found: QuestionSets, one: Asked, document: PromptDocument, source: Source) -> Row:
    """The document in the part's table: the file and line of its question, and the set's licence."""
    return Row(
        pmc_id=None,
        corpus_id=None,
        doi=None,
        pubmed_id=None,
        license=found.manifest.sets[one.set].license,
        retracted=False,
        year=None,
        journal=None,
        source_file=source.file,
        source_position=source.position,
        tokens=len(document.tokens),
        text_bytes=len(document.text.encode()),
        text_hash=text_hash(document.text),
        signature=None,
        overlaps=(),
    )


def _require_usable(counts: Counts, made: dict[str, SplitMade], recipe: PromptRecipe) -> None:
    """Refuse to make a corpus of nothing, or one without its long questions when those may not be missing.

    Raises:
        UserError: with the numbers.
    """
    too_long = counts.left_out.get("too_long", 0)
    if too_long and recipe.overlong == "refuse":
        raise UserError(
            f"{too_long:,} of {counts.read:,} questions are longer than --max-tokens {recipe.max_tokens}, "
            f"first {counts.examples['too_long'][0]}; raise it, or give --overlong cut_context or drop."
        )
    if not made["train"].lengths:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(counts.left_out.items()))
        raise UserError(f"No question is left to train on: {counts.read:,} read, left out {reasons}.")


def _leave_out(counts: Counts, rejected: Rejected) -> None:
    counts.left_out[rejected.reason] = counts.left_out.get(rejected.reason, 0) + 1
    examples = counts.examples.setdefault(rejected.reason, [])
    if len(examples) < EXAMPLES:
        examples.append(f"{rejected.source} {rejected.detail}")


def _description(
    found: QuestionSets, sets: list[str], recipe: PromptRecipe, made: dict[str, SplitMade]
) -> dict[str, Any]:
    """The content of prompts.json."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "recipe": {**asdict(recipe), "sets": sets},
        "questions": found.manifest.fingerprint,
        "licenses": {name: found.manifest.sets[name].license for name in sets},
        "splits": {
            split: {"questions": one.questions, "documents": len(one.lengths), "context_cut": one.cut}
            for split, one in made.items()
        },
    }


def _inputs(found: QuestionSets, sets: Sequence[str], split: str) -> Inputs:
    infos = [found.manifest.sets[name].splits[split] for name in sets]
    sums = [info.checksum for info in infos]
    together = sums[0] if len(sums) == 1 else xxhash.xxh3_128_hexdigest("".join(sums).encode())
    return Inputs(f"{sets[0]}.{split}.jsonl", len(sets), sum(info.bytes for info in infos), together)


def _file_of(path: Path) -> FileInfo:
    return FileInfo(path.stat().st_size, checksum(path))


def _file_info(content: bytes) -> FileInfo:
    return FileInfo(len(content), xxhash.xxh3_128_hexdigest(content))
