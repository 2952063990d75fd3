"""What a model answered: every question of every set, in the JSON file that `pmc-llama report` reads."""

from pathlib import Path
from typing import Literal

import msgspec

from data_tools.errors import UserError

FORMAT = "pmc-llama scores"
VERSION = 1

Method = Literal["likelihood", "generated"]
Setting = Literal["zero-shot", "full", "peft", "data-efficient", "peft-data-efficient"]


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a model answered to a question.

    Attributes:
        id: of the question in its set.
        right: place of the right option, from 0.
        predicted: place of the option that it chose; None when what it wrote is none of them.
        tokens: of the prompt, with the longest answer where these are scored.
        log_likelihoods: of each option as a continuation of the prompt, in nats, `[options]`.
        generated: what it wrote.
    """

    id: str
    right: int
    predicted: int | None
    tokens: int
    log_likelihoods: tuple[float, ...] = ()
    generated: str | None = None

    @property
    def correct(self) -> bool:
        """Whether it chose the right option."""
        return self.predicted == self.right


class SetScore(msgspec.Struct, frozen=True):
    """The answers to the questions of one split of a set.

    Attributes:
        set: its name.
        split: `test` or `dev`.
        checksum: XXH3-128 of the file of questions.
        majority: share of its questions that the most frequent answer is right for, over the whole split.
        unanswerable: questions whose right answer is not told; they are not asked.
        cut: questions whose prompt was longer than the model can read; their beginning was cut off.
        answers: in the order of the questions.
    """

    set: str
    split: str
    checksum: str
    majority: float
    unanswerable: int
    cut: int
    answers: tuple[Answer, ...]

    @property
    def correct(self) -> int:
        """Right answers."""
        return sum(answer.correct for answer in self.answers)

    @property
    def invalid(self) -> int:
        """Answers that are none of the options."""
        return sum(answer.predicted is None for answer in self.answers)


class Scores(msgspec.Struct, frozen=True):
    """A model on sets of questions.

    Attributes:
        name: of the model, in tables.
        setting: how it was fine-tuned, of the paper's settings, or None.
        model: as given.
        weights: the Hugging Face directory or the checkpoint.
        adapter: directory of the unmerged adapter, or None.
        questions: directory of the questions.
        fingerprint: of the questions.
        prompt: id of the template.
        method: whether the options' likelihoods were compared or an answer was generated.
        dtype: of the computation.
        device: its kind.
        ranks: that shared the questions.
        batch_size: prompts at once; `auto` as many as fitted the GPU.
        seconds: that the answers took.
        versions: of the libraries.
        sets: the answers.
    """

    format: str
    version: int
    name: str
    setting: Setting | None
    model: str
    weights: str
    adapter: str | None
    questions: str
    fingerprint: str
    prompt: str
    method: Method
    dtype: str
    device: str
    ranks: int
    batch_size: int | str
    seconds: float
    versions: dict[str, str]
    sets: tuple[SetScore, ...]


class _File(msgspec.Struct):
    scores: Scores


def read_scores(path: Path) -> Scores:
    """The scores in a file that `pmc-llama evaluate --questions` wrote.

    Raises:
        UserError: it cannot be read, or holds none, or those of another version.
    """
    try:
        scores = msgspec.json.decode(path.read_bytes(), type=_File).scores
    except OSError as error:
        raise UserError(f"The scores {path} cannot be read: {error.strerror}.") from error
    except msgspec.MsgspecError as error:
        raise UserError(
            f"{path} holds no scores ({error}); expected a file that `pmc-llama evaluate --questions "
            "--output` wrote."
        ) from error
    if (scores.format, scores.version) != (FORMAT, VERSION):
        raise UserError(
            f"{path} is {scores.format} {scores.version}, expected {FORMAT} {VERSION}; evaluate again."
        )
    return scores
