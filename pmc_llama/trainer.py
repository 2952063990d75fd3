"""The life of a run: start or resume, steps, held-out loss, checkpoints, the end. All but the sharding."""

import dataclasses
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from pmc_llama import checkpoint, huggingface
from pmc_llama.backends import build_backend
from pmc_llama.config import Recipe
from pmc_llama.data import TrainingBatches, heldout_batches, sample_order
from pmc_llama.distributed import Ranks, connect, disconnect, discover
from pmc_llama.initialize import RandomWeights
from pmc_llama.metrics import Metrics, StepRecord, model_flops_per_token, model_flops_utilization, peak_memory
from pmc_llama.model import llama_config
from pmc_llama.schedule import learning_rate, total_steps

# A checkpoint's count of samples means something only while these stay what they were.
_ORDER_KEYS = ("seed", "data.mode", "data.sequence_length", "batch.global_size")
_SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def train(recipe: Recipe, resume: str | None, started: float) -> None:
    """Run a recipe on the ranks that the launcher made, or alone.

    Args:
        recipe: what to run.
        resume: None starts afresh and refuses a directory that has checkpoints; `latest` goes on from the
            newest sound checkpoint of the run's directory, or starts afresh where there is none; anything
            else is the directory of the checkpoint to go on from.
        started: `time.time()` at the start of the process, from which the first step is timed.

    Raises:
        UserError: what the recipe names cannot be had, or does not fit what it is resumed from.
    """
    ranks = discover()
    device = connect(ranks)
    trainer = Trainer(recipe, ranks, device)
    trainer.start(resume, started)
    trainer.run()
    trainer.close()
    disconnect()


class Trainer:
    """One run on one rank.

    Attributes:
        step: optimizer steps made so far.
        steps: optimizer steps of the whole run.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, device: torch.device) -> None:
        self.recipe = recipe
        self.ranks = ranks
        self.device = device
        # Checkpoints gather their plans over gloo: small Python objects, and never in the way of NCCL.
        self.checkpoint_group = dist.new_group(backend="gloo")

        self.corpus = Corpus.open(recipe.data.corpus)
        self.config = llama_config(recipe.model, self._vocabulary())
        self._check_shapes()
        self.order = sample_order(
            self.corpus.split("train"), recipe.data.mode, recipe.data.sequence_length, recipe.seed
        )
        self.batches = TrainingBatches(
            self.corpus.split("train"),
            self.order,
            recipe.batch.global_size,
            recipe.batch.micro_size,
            ranks.rank,
            ranks.world_size,
        )
        self.step = 0
        self.steps = total_steps(recipe.schedule, self.order.samples_per_epoch, recipe.batch.global_size)
        self.backend = build_backend(recipe, self.config, device)
        self.parameters = sum(t.numel() for n, t in self.backend.state().items() if n.startswith("model."))

    # --- the life of a run ---------------------------------------------------------------------------

    def start(self, resume: str | None, started: float) -> None:
        """Load the first weights, or everything from a checkpoint, and open the run's records."""
        self.started = started
        self.first_step_seconds: float | None = None
        source = self._find_checkpoint(resume)
        manifest = self._check_manifest(checkpoint.read_manifest(source)) if source else None
        self.step = manifest.step if manifest else 0
        self.metrics = Metrics(
            self.recipe.output, self.ranks.rank, self.step, self.recipe_text(), self.recipe.logging.every_steps
        )
        self._introduce(source)
        if source:
            checkpoint.load(self.backend.state(), source, self.checkpoint_group)
        else:
            self._load_first_weights()
        self.backend.state_loaded()

    def run(self) -> None:
        """Train to the last step; publish checkpoints on the way and at the end."""
        if self.step >= self.steps:
            self.metrics.say(f"finished: step {self.step} of {self.steps} is done, nothing is left to train")
            return
        while self.step < self.steps:
            record = self.train_step()
            if self._due(self.recipe.evaluation.every_steps, first=True):
                record = dataclasses.replace(record, heldout_loss=self.heldout_loss())
            self.metrics.record(record)
            self._stop_unless_finite(record)
            if self._due(self.recipe.checkpoint.every_steps):
                self.save_checkpoint()

    def train_step(self) -> StepRecord:
        """One optimizer step over one global batch."""
        begin = time.perf_counter()
        batch = self.batches.batch(self.step * self.recipe.batch.global_size)
        have_data = time.perf_counter()
        rate = learning_rate(
            self.step + 1, self.steps, self.recipe.optimizer.learning_rate, self.recipe.schedule
        )
        targets = max(batch.targets, 1)
        loss = self.backend.forward_backward(batch.micro_batches, targets)
        dist.all_reduce(loss)
        grad_norm = self.backend.clip_and_step(rate, self.recipe.optimizer.max_grad_norm)
        self.step += 1
        return self._describe_step(float(loss) / targets, grad_norm, rate, begin, have_data)

    def heldout_loss(self) -> float | None:
        """Mean loss in nats a token on the held-out papers; None when the corpus keeps none."""
        recipe = self.recipe
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in heldout_batches(
            self.corpus.split("heldout"),
            recipe.data.sequence_length,
            recipe.batch.micro_size,
            self.ranks.rank,
            self.ranks.world_size,
            recipe.evaluation.max_sequences,
        ):
            totals[0] += self.backend.evaluate(batch)
            totals[1] += (batch.labels >= 0).sum()
        dist.all_reduce(totals)
        summed, targets = totals.tolist()
        return summed / targets if targets else None

    def save_checkpoint(self) -> None:
        """Publish a checkpoint of this step, then remove those that the recipe does not keep."""
        begin = time.perf_counter()
        path = checkpoint.save(
            self.backend.state(),
            self.checkpoints,
            self._manifest,
            self.corpus.tokenizer_path,
            self.checkpoint_group,
        )
        if self.ranks.rank == 0:
            checkpoint.prune(
                self.checkpoints, self.recipe.checkpoint.keep_last, self.recipe.checkpoint.keep_every
            )
        self.metrics.say(f"checkpoint {path} in {time.perf_counter() - begin:.1f} s")

    def close(self) -> None:
        """Close the records and release the model."""
        self.metrics.close()
        self.backend.close()

    # --- starting --------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.recipe.output / "checkpoints"

    def recipe_text(self) -> str:
        """The recipe as YAML, as resolved."""
        return yaml.safe_dump(plain(self.recipe), sort_keys=False)

    def _vocabulary(self) -> int:
        source = self.recipe.model.initialize_from
        return huggingface.check_directory(source).vocab_size if source else self.corpus.vocab_size

    def _check_shapes(self) -> None:
        source, length = self.recipe.model.initialize_from, self.recipe.data.sequence_length
        if source:
            self._same_shape(huggingface.check_directory(source).to_dict(), str(source))
        if self.config.vocab_size < self.corpus.vocab_size:
            raise UserError(
                f"model.vocab_size is {self.config.vocab_size}, but the tokenizer of {self.corpus.directory} "
                f"makes {self.corpus.vocab_size} different ids; the model needs at least as many"
            )
        if length > self.config.max_position_embeddings:
            raise UserError(
                f"data.sequence_length is {length}, but the model has {self.config.max_position_embeddings} "
                "positions; shorten the sequences or choose a model with more"
            )

    def _same_shape(self, other: dict[str, Any], where: str) -> None:
        for key in _SHAPE_KEYS:
            ours, theirs = getattr(self.config, key), other.get(key)
            if ours != theirs:
                raise UserError(
                    f"{where} has {key} {theirs}, but the recipe's model (model.size {self.recipe.model.size}) "
                    f"has {ours}; name the size that those weights have"
                )

    def _find_checkpoint(self, resume: str | None) -> Path | None:
        if resume is None:
            if checkpoint.list_checkpoints(self.checkpoints):
                raise UserError(
                    f"{self.checkpoints} already holds checkpoints; add --resume to go on from them, or choose "
                    "another --output"
                )
            return None
        if resume == "latest":
            return checkpoint.newest_sound(self.checkpoints, self.checkpoint_group, self._warn)
        damage = checkpoint.verify_together(Path(resume), self.checkpoint_group)
        if damage:
            raise UserError(damage)
        return Path(resume)

    def _check_manifest(self, manifest: checkpoint.Manifest) -> checkpoint.Manifest:
        self._same_shape(manifest.model_config, "the checkpoint")
        if manifest.corpus != self.corpus.fingerprint:
            raise UserError(
                f"the checkpoint was trained on a corpus with fingerprint {manifest.corpus[:12]}, but "
                f"{self.corpus.directory} has {self.corpus.fingerprint[:12]}; give the corpus that it was "
                "trained on, or export the checkpoint and start from its weights"
            )
        ours = plain(self.recipe)
        for key in _ORDER_KEYS:
            before, now = _lookup(manifest.recipe, key), _lookup(ours, key)
            if before != now:
                raise UserError(
                    f"{key} is {now}, but the checkpoint was made with {before}, and its place in the data "
                    f"counts in these; set {key} to {before}"
                )
        return manifest

    def _load_first_weights(self) -> None:
        weights = {
            name.removeprefix("model."): tensor
            for name, tensor in self.backend.state().items()
            if name.startswith("model.")
        }
        source = self.recipe.model.initialize_from
        if source:
            reader = huggingface.weights_reader(source)
        else:
            shapes = {name: tensor.shape for name, tensor in weights.items()}
            reader = RandomWeights(shapes, self.recipe.seed, self.config.initializer_range)
        checkpoint.read_weights(weights, reader, self.checkpoint_group)

    def _introduce(self, source: Path | None) -> None:
        recipe, split = self.recipe, self.corpus.split("train")
        if self.ranks.rank == 0:
            (recipe.output / "recipe.yaml").write_text(self.recipe_text())
        self.metrics.say(
            f"{recipe.backend} on {self.ranks.world_size} x {self.device.type} "
            f"(by {self.ranks.launcher}), {self.parameters:,} parameters, {recipe.precision.compute}"
        )
        self.metrics.say(
            f"corpus {recipe.data.corpus}: {split.documents:,} papers, {split.tokens:,} tokens; "
            f"{self.steps:,} steps of {recipe.batch.global_size} x {recipe.data.sequence_length} tokens"
        )
        origin = source or recipe.model.initialize_from or f"random weights, seed {recipe.seed}"
        self.metrics.say(f"starting after step {self.step} from {origin}")

    def _warn(self, text: str) -> None:
        if self.ranks.rank == 0:
            print(f"warning: {text}", flush=True)

    # --- describing ------------------------------------------------------------------------------------

    def _due(self, every: int, first: bool = False) -> bool:
        return self.step == self.steps or self.step % every == 0 or (first and self.step == 1)

    def _describe_step(
        self, loss: float, grad_norm: float, rate: float, begin: float, have_data: float
    ) -> StepRecord:
        seconds = time.perf_counter() - begin
        samples = self.step * self.recipe.batch.global_size
        length = self.recipe.data.sequence_length
        speed = self.recipe.batch.global_size * length / seconds
        first = self.first_step_seconds is None
        if first:
            self.first_step_seconds = time.time() - self.started
        return StepRecord(
            step=self.step,
            steps=self.steps,
            samples=samples,
            tokens=samples * length,
            epoch=samples / self.order.samples_per_epoch,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            step_seconds=seconds,
            data_seconds=have_data - begin,
            tokens_per_second=speed,
            tokens_per_second_per_device=speed / self.ranks.world_size,
            peak_memory_bytes=peak_memory(self.device),
            mfu=model_flops_utilization(
                model_flops_per_token(self.config, self.parameters, length),
                speed / self.ranks.world_size,
                self.device,
            ),
            seconds_to_first_step=self.first_step_seconds if first else None,
        )

    def _stop_unless_finite(self, record: StepRecord) -> None:
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            raise UserError(
                f"step {record.step}: the loss is {record.loss} and the gradient norm {record.grad_norm}; the "
                "run stops before it publishes broken weights; lower optimizer.learning_rate and --resume"
            )

    def _manifest(self, files: checkpoint.FileTable) -> checkpoint.Manifest:
        samples = self.step * self.recipe.batch.global_size
        return checkpoint.Manifest(
            step=self.step,
            samples=samples,
            tokens=samples * self.recipe.data.sequence_length,
            recipe=plain(self.recipe),
            model_config=self.config.to_dict(),
            corpus=self.corpus.fingerprint,
            versions={name: version(name) for name in ("pmc-llama", "torch", "transformers", "deepspeed")},
            files=files,
        )


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dictionaries of strings and numbers, as YAML and JSON hold it."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: simple(entry) for key, entry in value.items()}
        return str(value) if isinstance(value, Path) else value

    result: dict[str, Any] = simple(dataclasses.asdict(recipe))
    return result


def _lookup(tree: dict[str, Any], dotted: str) -> Any:
    value: Any = tree
    for key in dotted.split("."):
        value = value[key]
    return value
