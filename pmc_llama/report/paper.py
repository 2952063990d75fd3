"""Published accuracies, to stand beside ours.

PMC-LLaMA's are those of the first version of the paper (arXiv 2304.14454) as the authors' repository prints
them (github.com/chaoyi-wu/PMC-LLaMA, README of 2023), LLaMA's zero-shot ones LMFlow's
(github.com/OptimalScale/LMFlow, README). Full and parameter-efficient fine-tuning were on PubMedQA and
MedMCQA, so their USMLE column is out of the domain; data-efficient fine-tuning was on USMLE's train split.
Neither prompts nor logs are published; MedMCQA's are on its dev split, as its test answers are hidden.
"""

from dataclasses import dataclass

from pmc_llama.evaluate.results import Setting

LLAMA, PMC_LLAMA = "LLaMA-7B", "PMC-LLaMA-7B"


@dataclass(frozen=True)
class Published:
    """An accuracy in print.

    Attributes:
        model: whose.
        setting: how it was fine-tuned.
        set: on which questions, by our name.
        split: of the set.
        accuracy: a share, from 0 to 1.
    """

    model: str
    setting: Setting
    set: str
    split: str
    accuracy: float


_SPLITS = {"medqa_4options": "test", "medmcqa": "dev", "pubmedqa": "test"}
_PERCENT: dict[tuple[str, Setting], dict[str, float]] = {
    (LLAMA, "zero-shot"): {"medqa_4options": 27.1, "medmcqa": 24.3, "pubmedqa": 5.2},
    (LLAMA, "full"): {"medqa_4options": 44.55, "medmcqa": 48.15, "pubmedqa": 73.41},
    (PMC_LLAMA, "full"): {"medqa_4options": 44.70, "medmcqa": 50.54, "pubmedqa": 69.53},
    (LLAMA, "peft"): {"medqa_4options": 29.38, "medmcqa": 32.37, "pubmedqa": 65.81},
    (PMC_LLAMA, "peft"): {"medqa_4options": 30.64, "medmcqa": 34.33, "pubmedqa": 68.23},
    (LLAMA, "data-efficient"): {"medqa_4options": 35.66},
    (PMC_LLAMA, "data-efficient"): {"medqa_4options": 40.61},
    (LLAMA, "peft-data-efficient"): {"medqa_4options": 27.34},
    (PMC_LLAMA, "peft-data-efficient"): {"medqa_4options": 28.52},
}

PUBLISHED = tuple(
    Published(model, setting, name, _SPLITS[name], round(percent / 100, 4))
    for (model, setting), figures in _PERCENT.items()
    for name, percent in figures.items()
)


def published(setting: Setting | None, name: str, split: str) -> dict[str, float]:
    """The accuracies printed for a setting on a split of a set, by model."""
    wanted = (setting, name, split)
    return {one.model: one.accuracy for one in PUBLISHED if (one.setting, one.set, one.split) == wanted}
