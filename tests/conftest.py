"""Fixtures: a tokenizer trained on the spot, a corpus built by the real tools, the real papers."""

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import settings

from data_tools.build import build
from data_tools.recipe import Decisions, Recipe
from tests.data_tools.sources import prose, simple_article, simple_record, write_jsonl

settings.register_profile("untimed", deadline=None)  # machines differ
settings.load_profile("untimed")

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model of 400 pieces with LLaMA's settings: byte fallback, no normalization."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([prose(seed, 200) for seed in range(40)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tiny_corpus(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 documents of varied length in three parts, a tenth of them held out."""
    papers = tmp_path_factory.mktemp("papers")
    for shard in range(2):
        records = [simple_record(number, words=10 + 7 * number) for number in range(shard, 40, 2)]
        write_jsonl(papers / f"shard-{shard}.jsonl", records)
    for number in range(20):
        (papers / f"PMC{5000 + number}.xml").write_text(simple_article(number, words=20 + 9 * number))
    directory = tmp_path_factory.mktemp("corpora") / "tiny"
    build(
        [papers],
        tiny_tokenizer,
        directory,
        Recipe(decisions=Decisions(heldout=0.1)),
        workers=1,
    )
    return directory


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of real papers and tokenizers beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the real papers are not beside the checkout")
    return SHARED
