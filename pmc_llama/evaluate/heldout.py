"""The papers that a corpus holds out, as the tokens of the model that is judged and as bytes of text."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.tokenizer import Tokenizer
from pmc_llama.evaluate.weights import ModelSource

Prefix = Literal["bos", "eod"]
_READ_AT_ONCE = 256  # papers


@dataclass(frozen=True)
class Papers:
    """Texts to predict.

    Attributes:
        numbers: int64 `[papers]`, their places in the held-out split.
        tokens: of each an int32 array `[tokens + 1]`: the token that stands before every text, then the
            text's, without an end.
        bytes: int64 `[papers]`, of each text in UTF-8.
        held_out: how many papers the corpus holds out.
        tokenizer: `corpus`, or `own` where the texts were encoded anew with the model's own.
        prefix: the token before every text.
    """

    numbers: NDArray[np.int64]
    tokens: list[NDArray[np.int32]]
    bytes: NDArray[np.int64]
    held_out: int
    tokenizer: str
    prefix: int

    @property
    def targets(self) -> NDArray[np.int64]:
        """Tokens to predict of each, `[papers]`."""
        return np.array([len(tokens) - 1 for tokens in self.tokens], np.int64)


def read_heldout(corpus: Corpus, source: ModelSource, most: int, prefix: Prefix = "bos") -> Papers:
    """Held-out papers of a corpus, for a model.

    A model whose tokenizer is the corpus' gets the ids of the corpus; for another one the text is decoded,
    and encoded by its own tokenizer. Either way the end-of-document token is no part of the text.

    Args:
        corpus: whose papers.
        source: the model, with its tokenizer beside its weights.
        most: papers; of more that are held out as many are taken, evenly spread.
        prefix: the token before every text: `bos`, or `eod`, which stands before every paper in training
            here. Of a tokenizer without BOS it is its end token in either case.

    Raises:
        UserError: no paper is held out, the model has no tokenizer, or no row for a token.
    """
    split = corpus.split("heldout")
    if not split.documents:
        raise UserError(f"The corpus {corpus.location} holds no papers out; see `pmc-data finalize --help`.")
    numbers = np.unique(np.linspace(0, split.documents - 1, min(most, split.documents)).round().astype(int))
    theirs = Tokenizer(corpus.tokenizer_path)
    own = theirs if theirs.sha256 in source.tokenizers() else source.tokenizer()
    first_token = own.bos if prefix == "bos" and own.bos >= 0 else own.eos
    tokens, sizes = [], []
    for first in range(0, len(numbers), _READ_AT_ONCE):
        chosen = numbers[first : first + _READ_AT_ONCE]
        bounds = np.stack([split.starts[chosen], split.starts[chosen + 1] - 1], axis=1)
        for ids in split.read([(int(begin), int(end)) for begin, end in bounds]):
            text = theirs.decode(ids)
            sizes.append(len(text.encode()))
            kept = ids if own is theirs else own.encode(text)
            tokens.append(np.concatenate([[first_token], kept]).astype(np.int32))
    tokenizer = "corpus" if own is theirs else "own"
    papers = Papers(numbers, tokens, np.array(sizes, np.int64), split.documents, tokenizer, first_token)
    _check_rows(papers, source)
    return papers


def _check_rows(papers: Papers, source: ModelSource) -> None:
    largest = max(int(tokens.max()) for tokens in papers.tokens)
    if largest >= source.config.vocab_size:
        raise UserError(
            f"The model {source.path} has {source.config.vocab_size} tokens, but its tokenizer makes the id "
            f"{largest}; give the model the tokenizer that it was trained with."
        )
