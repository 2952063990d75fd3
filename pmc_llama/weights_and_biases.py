"""Weights & Biases, for those who ask for it: the scalars that TensorBoard gets, under one run id."""

import importlib
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from data_tools.errors import UserError
from data_tools.files import write_published
from pmc_llama.provenance import Start
from pmc_llama.records import StepRecord
from pmc_llama.tensorboard import scalars


class WeightsAndBiases:
    """A run of a project. `WANDB_MODE=offline` keeps it on disk until `wandb sync`.

    A resumed run goes on under the id of its first start, kept in `wandb-id` in its directory. What an
    interrupted run logged after the checkpoint cannot be taken back there; the resumed run's values come
    after them, under the same `step`.

    Args:
        output_dir: the run's directory, which gets `wandb/` and `wandb-id`.
        project: its name.
        resume_step: the step of the checkpoint that the run goes on from.
        recipe_text: the recipe as YAML.
        start: this start of the run.

    Raises:
        UserError: the package is not installed, or refuses to start.
    """

    def __init__(
        self, output_dir: Path, project: str, resume_step: int, recipe_text: str, start: Start | None
    ) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(
                f"logging.wandb_project is {project}, but Weights & Biases is not installed ({error}); "
                "install pmc-llama[wandb], or set it to null."
            ) from error
        id_path = output_dir / "wandb-id"
        if resume_step == 0 or not id_path.exists():
            write_published(id_path, secrets.token_hex(4).encode())
        try:
            self._run = wandb.init(
                project=project,
                dir=str(output_dir),
                id=id_path.read_text(),
                resume="allow",
                settings=wandb.Settings(console="off", quiet=True),  # the console is the run's own
                config={"recipe": yaml.safe_load(recipe_text), "start": asdict(start) if start else None},
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"logging.wandb_project is {project}, but Weights & Biases does not start ({error}); "
                "log in, or set WANDB_MODE=offline, or the project to null."
            ) from error
        # Its own counter never goes back, a resumed run does; so the step is a value like the others.
        self._run.define_metric("*", step_metric="step")

    def record(self, record: StepRecord) -> None:
        """Log a step's scalars."""
        self._run.log({"step": record.step, **scalars(record)})

    def close(self) -> None:
        """Send, or write, what is left."""
        self._run.finish()
