"""What a resumed run goes on with: batch and sequence length, blends, and corpora that grew."""

import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from data_tools.build import build
from data_tools.corpus import Corpus, Split
from data_tools.errors import UserError
from data_tools.growth import new_documents
from data_tools.recipe import Decisions, Recipe
from pmc_llama.config import BatchConfig, CorpusConfig, DataConfig
from pmc_llama.data import TrainingData, open_sources
from pmc_llama.recipe_file import RecipeParser
from tests.data_tools.sources import simple_record, write_jsonl
from tests.pmc_llama.test_data import rows, targets

OLD, NEW = range(20), range(9, 38)


@pytest.fixture(scope="module")
def corpora(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`old` of papers 0 to 19; `new` of 9 to 37, of the text of 7, and of 8 with another text."""
    root = tmp_path_factory.mktemp("grown")
    for name, numbers, heldout in (("old", OLD, 0.3), ("new", NEW, 0.05)):
        records = [simple_record(number, words=20 + 5 * number) for number in numbers]
        if name == "new":
            again, revised = (
                simple_record(7, words=55, pmc_id="777"),
                simple_record(500, words=55, pmc_id="1008"),
            )
            records = [cast(dict[str, Any], again) | {"corpusid": 777}, revised, *reversed(records)]
        write_jsonl(root / f"{name}.jsonl", records)
        recipe = Recipe(decisions=Decisions(heldout=heldout, near_duplicates=None))
        build([root / f"{name}.jsonl"], tiny_tokenizer, root / name, recipe, workers=1)
    return {name: str(root / name) for name in ("old", "new")}


def documents(split: Split) -> dict[bytes, int]:
    """Each document's tokens, and its number."""
    starts = split.starts.tolist()
    texts = split.read(list(itertools.pairwise(starts)))
    return {text.tobytes(): number for number, text in enumerate(texts)}


def training(
    data: DataConfig, before: TrainingData | None = None, samples: int = 0, seed: int = 3
) -> TrainingData:
    """The data of a run that begins, or goes on from `before` after so many samples."""
    history = None
    if before:
        covered = before.covered_after(before.covered, before.first_sample, samples - before.first_sample)
        history = json.loads(json.dumps(before.history(covered)))
    return TrainingData(open_sources(data), data, seed, history, samples)


def batch_rows(data: TrainingData, first: int, size: int) -> list[Any]:
    return rows(data.batches(BatchConfig(size, 1), 0, 1).batch(first).micro_batches)


# --- a corpus that grew ---


def test_new_papers_are_those_that_share_neither_text_nor_identifier_with_the_old_ones(
    corpora: dict[str, str],
) -> None:
    old, new = Corpus.open(corpora["old"]), Corpus.open(corpora["new"])
    split = new.split("train")
    kept = documents(split.only(new_documents(split, old)))
    known = {**documents(old.split("train")), **documents(old.split("heldout"))}
    identified = set(documents(split)) & set(known)
    assert len(identified) >= 10
    assert len(kept) == split.documents - len(identified) - 1  # the revised paper 8 is known by its PMC id
    assert set(kept) <= set(documents(split)) - identified
    assert not set(kept) & set(documents(new.split("heldout")))


def test_a_narrowed_split_reads_as_its_documents_and_travels_to_other_processes(tiny_corpus: Path) -> None:
    split = Corpus.open(tiny_corpus).split("train")
    chosen = np.array([0, 1, 2, 9, 17, 18, 40, split.documents - 1])
    narrow = pickle.loads(pickle.dumps(split.only(chosen)))
    whole = split.read([(int(split.starts[n]), int(split.starts[n + 1])) for n in chosen])
    assert (narrow.documents, narrow.tokens) == (8, sum(map(len, whole)))
    assert np.array_equal(narrow.read([(0, narrow.tokens)])[0], np.concatenate(whole))
    assert np.array_equal(np.diff(narrow.starts), [len(text) for text in whole])
    assert np.array_equal(narrow.read([(5, 9)])[0], np.concatenate(whole)[5:9])


def test_a_corpus_that_grew_is_gone_on_with_only_as_the_recipe_says(corpora: dict[str, str]) -> None:
    old = training(DataConfig(corpora["old"], sequence_length=16, mode="packed"))
    grown = DataConfig(corpora["new"], sequence_length=16, mode="packed")
    with pytest.raises(UserError, match=r"fingerprint.*data\.grown all, or new"):
        training(grown, old, 4)
    everything = training(replace(grown, grown="all"), old, 4)
    new = Corpus.open(corpora["new"]).split("train")
    assert f"all {new.documents} papers" in everything.notes[0]
    assert everything.covered == (0,)
    only_new = training(replace(grown, grown="new", grown_from=corpora["old"]), old, 4)
    chosen = only_new.sources[0].split
    assert f"the new {chosen.documents} papers" in only_new.notes[0]
    assert only_new.steps_left(1.0, 4, 1) == -(-chosen.tokens // 16)
    one_pass = batch_rows(only_new, 4, only_new.steps_left(1.0, 4, 1))
    assert sum(label >= 0 for _, labels in one_pass for label in labels) == chosen.tokens
    again = training(replace(grown, grown="new", grown_from=corpora["old"]), only_new, 10)
    assert again.notes == []
    assert batch_rows(again, 10, 3) == batch_rows(only_new, 10, 3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"grown": "new"}, "needs grown_from"),
        ({"grown": "all", "grown_from": "old"}, "nothing else does"),
        ({"grown": "new", "grown_from": "new"}, "lacks"),
    ],
)
def test_what_cannot_be_said_of_a_grown_corpus_is_refused(
    corpora: dict[str, str], change: dict[str, Any], expected: str
) -> None:
    change = {
        key: corpora.get(value, value) if key == "grown_from" else value for key, value in change.items()
    }
    with pytest.raises(UserError, match=expected):
        open_sources(DataConfig(corpora["new"], **change))


def test_growth_from_another_corpus_than_the_checkpoints_is_refused(
    corpora: dict[str, str], tiny_corpus: Path
) -> None:
    other = training(DataConfig(str(tiny_corpus)))
    with pytest.raises(UserError, match=r"data\.grown_from"):
        training(DataConfig(corpora["new"], grown="new", grown_from=corpora["old"]), other, 4)


# --- what else changes ---


def test_another_seed_is_refused(tiny_corpus: Path) -> None:
    data = DataConfig(str(tiny_corpus))
    with pytest.raises(UserError, match="seed is 4, but the checkpoint was made with 3"):
        training(data, training(data), 4, seed=4)


def test_another_batch_size_goes_on_with_the_next_sample(tiny_corpus: Path) -> None:
    data = DataConfig(str(tiny_corpus), sequence_length=16)
    before = training(data)
    after = training(data, before, 24)
    assert after.notes == []
    assert batch_rows(before, 0, 8) + batch_rows(before, 8, 16) + batch_rows(after, 24, 6) == batch_rows(
        before, 0, 30
    )
    assert after.covered == before.covered_after((0,), 0, 24)


def test_after_a_new_length_the_rest_of_the_epoch_has_each_token_that_was_left_once(
    tiny_corpus: Path,
) -> None:
    data = DataConfig(str(tiny_corpus), mode="packed", sequence_length=24, isolate_documents=True)
    before = training(data)
    tokens = before.sources[0].split.tokens
    steps = before.steps_left(1.0, 0, 1)
    assert steps == -(-tokens // 24)
    after = training(replace(data, sequence_length=56), before, steps // 3)
    assert "from packed sequences of 24 tokens to packed ones of 56" in after.notes[0]
    left = after.steps_left(1.0, steps // 3, 1)
    made = before.batches(BatchConfig(steps // 3, 1), 0, 1).batch(0)
    rest = after.batches(BatchConfig(left, 1), 0, 1).batch(steps // 3)
    assert len(targets(made.micro_batches)) + len(targets(rest.micro_batches)) == tokens
    assert after.covered_after(after.covered, steps // 3, left) == (tokens,)
    assert after.epoch(steps // 3 + left) == pytest.approx(1.0)
    assert list(after.coverage((tokens,)).values()) == [1.0]


def test_a_blend_is_resumed_with_other_weights_and_each_corpus_in_its_own_epoch(
    corpora: dict[str, str], tiny_corpus: Path
) -> None:
    def blend(first: int, second: int) -> DataConfig:
        both = [CorpusConfig(str(tiny_corpus), first), CorpusConfig(corpora["old"], second)]
        return DataConfig(corpora=both, sequence_length=16)

    before = training(blend(3, 1))
    after = training(blend(1, 1), before, 40)
    assert "from weights [3, 1] to [1, 1]" in after.notes[0]
    first, second = before.sources[0].split.documents, before.sources[1].split.documents
    visits = after.order.spans(np.arange(2 * second))  # beyond the end of the second corpus' epoch
    in_second = visits.begin[visits.begin > before.sources[0].split.tokens] - before.sources[0].split.tokens
    visited = np.searchsorted(before.sources[1].split.starts, in_second - 1, side="right") - 1
    assert len(set(visited[: second - 10].tolist())) == second - 10  # 10 of its papers were visited before
    assert after.epoch(40) == pytest.approx(30 / first)


@pytest.mark.shared
def test_corpora_of_different_tokenizers_make_no_blend(
    tiny_corpus: Path, tmp_path: Path, shared: Path, corpora: dict[str, str]
) -> None:
    write_jsonl(tmp_path / "papers.jsonl", [simple_record(number, words=60) for number in range(4)])
    other = next(shared.rglob("*.model"))
    build([tmp_path / "papers.jsonl"], other, tmp_path / "other", Recipe(), workers=1)
    both = [CorpusConfig(str(tiny_corpus)), CorpusConfig(str(tmp_path / "other"))]
    with pytest.raises(UserError, match="another tokenizer"):
        open_sources(DataConfig(corpora=both))


def test_a_blend_is_written_as_a_list_in_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data:\n  corpora:\n  - {path: books, weight: 15}\n  - {path: 's3://bucket/papers', weight: 4}\n"
    )
    recipe, _ = RecipeParser("train", path, "").read([str(path)])
    assert recipe.data.corpora == [CorpusConfig("books", 15), CorpusConfig("s3://bucket/papers", 4)]
