"""The life of a run: start or resume, steps, held-out loss, checkpoints, the end. All but the sharding."""

import dataclasses
import math
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from pmc_llama import checkpoint, starting
from pmc_llama.backends import build_backend
from pmc_llama.compatibility import check_model, check_resumable
from pmc_llama.config import Recipe, plain
from pmc_llama.data import TrainingBatches, heldout_batches, sample_order
from pmc_llama.distributed import Ranks, connect, disconnect, discover
from pmc_llama.flops import model_flops_per_token, model_flops_utilization
from pmc_llama.huggingface_tokenizer import exact_tokenizer
from pmc_llama.metrics import Metrics, StepRecord, peak_memory
from pmc_llama.run_lock import only_writer
from pmc_llama.schedule import learning_rate, total_steps

# Longest wait for another rank: above the slowest thing that one rank does while the others wait.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


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
    device = connect(ranks, COLLECTIVE_TIMEOUT)
    trainer = Trainer(recipe, ranks, device, started)
    with only_writer(recipe.output, ranks.rank):
        trainer.start(resume)
        trainer.run()
        trainer.close()
    disconnect()


class Trainer:
    """One run on one rank.

    Attributes:
        step: optimizer steps made so far.
        steps: optimizer steps of the whole run.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, device: torch.device, started: float) -> None:
        self.recipe, self.ranks, self.device, self.started = recipe, ranks, device, started
        used = ("pmc-llama", "torch", "transformers", *(["deepspeed"] * (recipe.backend == "deepspeed")))
        self.versions = {name: version(name) for name in used}
        # Checkpoints gather their plans over gloo: small Python objects, and never in the way of NCCL.
        self.checkpoint_group = dist.new_group(backend="gloo")
        self.corpus = Corpus.open(recipe.data.corpus)
        self.training, self.heldout = self.corpus.split("train"), self.corpus.split("heldout")
        exact_tokenizer(self.corpus.tokenizer_path)  # what could not be exported is not trained

        data, batch = recipe.data, recipe.batch
        self.order = sample_order(self.training, data.mode, data.sequence_length, recipe.seed)
        self.batches = TrainingBatches(
            self.training, self.order, batch.global_size, batch.micro_size, ranks.rank, ranks.world_size
        )
        self.checkpoints = recipe.output / "checkpoints"
        self.step = 0
        self.steps = total_steps(recipe.schedule, self.order.samples_per_epoch, batch.global_size)

    # --- the life of a run -----------------------------------------------------------------------------

    def start(self, resume: str | None) -> None:
        """Build the model, load its first weights or all of a checkpoint, and open the run's records."""
        source = starting.find_checkpoint(self.checkpoints, resume, self.checkpoint_group, self._warn)
        self.config = starting.model_config(self.recipe, self.corpus.vocab_size, source)
        check_model(self.recipe, self.config, self.corpus)
        self.backend = build_backend(self.recipe, self.config, self.device)
        if source:
            manifest = checkpoint.read_manifest(source)
            check_resumable(self.recipe, self.corpus, manifest)
            starting.load_checkpoint(source, manifest, self.backend, self.checkpoint_group)
            self.step = manifest.step
        else:
            starting.load_first_weights(self.recipe, self.config, self.backend, self.checkpoint_group)
        text = yaml.safe_dump(plain(self.recipe), sort_keys=False)
        every = self.recipe.logging.every_steps
        self.metrics = Metrics(self.recipe.output, self.ranks.rank, self.step, text, every)
        self._introduce(source)

    def run(self) -> None:
        """Train to the last step; publish checkpoints on the way and at the end."""
        if self.step >= self.steps:
            self.metrics.say(f"finished: step {self.step} of {self.steps} is made, nothing is left to train")
        while self.step < self.steps:
            record = self.train_step()
            if self._due(self.recipe.evaluation.every_steps) or self.step == 1:
                record = dataclasses.replace(record, heldout_loss=self.heldout_loss())
            self.metrics.record(record)
            _stop_unless_finite(record)
            if self._due(self.recipe.checkpoint.every_steps):
                self.save_checkpoint()

    def train_step(self) -> StepRecord:
        """One optimizer step over one global batch."""
        recipe, begin = self.recipe, time.perf_counter()
        batch = self.batches.batch(self.step * recipe.batch.global_size)
        have_data = time.perf_counter()
        targets = max(batch.targets, 1)
        loss = self.backend.forward_backward(batch.micro_batches, targets)
        dist.all_reduce(loss)
        rate = learning_rate(self.step + 1, self.steps, recipe.optimizer.learning_rate, recipe.schedule)
        grad_norm = self.backend.clip(recipe.optimizer.max_grad_norm)
        self.backend.step(rate)
        self.step += 1
        return self._describe(float(loss) / targets, grad_norm, rate, begin, have_data)

    def heldout_loss(self) -> float | None:
        """Mean loss in nats a token on the held-out papers; None when the corpus keeps none."""
        length, most = self.recipe.data.sequence_length, self.recipe.evaluation.max_sequences
        ranks, micro_size = self.ranks, self.recipe.batch.micro_size
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in heldout_batches(self.heldout, length, micro_size, ranks.rank, ranks.world_size, most):
            totals[0] += self.backend.evaluate(batch)
            totals[1] += (batch.labels >= 0).sum()
        dist.all_reduce(totals)
        summed, targets = totals.tolist()
        return summed / targets if targets else None

    def save_checkpoint(self) -> None:
        """Publish a checkpoint of this step, then remove those that the recipe does not keep."""
        begin, keep = time.perf_counter(), self.recipe.checkpoint
        self.metrics.synchronize()
        state, tokenizer = self.backend.state(), self.corpus.tokenizer_path
        path = checkpoint.save(state, self.checkpoints, self._manifest, tokenizer, self.checkpoint_group)
        if self.ranks.rank == 0:
            checkpoint.prune(self.checkpoints, keep.keep_last, keep.keep_every)
        self.metrics.say(f"checkpoint {path} in {time.perf_counter() - begin:.1f} s")

    def close(self) -> None:
        """Close the records and release the model."""
        self.metrics.close()
        self.backend.close()

    def _introduce(self, source: Path | None) -> None:
        recipe, say = self.recipe, self.metrics.say
        say(
            f"{recipe.backend}, {recipe.precision.compute}, on {self.ranks.world_size} x {self.device.type} "
            f"(started by {self.ranks.launcher}); {self._parameters():,} parameters"
        )
        say(
            f"corpus {recipe.data.corpus}: {self.training.documents:,} papers, "
            f"{self.training.tokens:,} tokens; {self.steps:,} steps of "
            f"{recipe.batch.global_size} x {recipe.data.sequence_length} tokens"
        )
        origin = source or recipe.model.initialize_from or f"random weights of seed {recipe.seed}"
        say(f"starting after step {self.step} from {origin}")

    def _warn(self, text: str) -> None:
        if self.ranks.rank == 0:
            print(f"warning: {text}", flush=True)

    # --- describing --------------------------------------------------------------------------------------

    def _due(self, every: int) -> bool:
        return self.step == self.steps or self.step % every == 0

    def _parameters(self) -> int:
        return sum(t.numel() for name, t in self.backend.state().items() if name.startswith("model."))

    def _describe(
        self, loss: float, grad_norm: float, rate: float, begin: float, have_data: float
    ) -> StepRecord:
        seconds = time.perf_counter() - begin
        samples, length = self.step * self.recipe.batch.global_size, self.recipe.data.sequence_length
        speed = self.recipe.batch.global_size * length / seconds
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
            seconds_since_start=time.time() - self.started,
            tokens_per_second=speed,
            tokens_per_second_per_device=speed / self.ranks.world_size,
            peak_memory_bytes=peak_memory(self.device),
            mfu=model_flops_utilization(
                speed / self.ranks.world_size * model_flops_per_token(self.config, length), self.device
            ),
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
            versions=self.versions,
            files=files,
        )


def _stop_unless_finite(record: StepRecord) -> None:
    if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
        raise UserError(
            f"Step {record.step} has loss {record.loss} and gradient norm {record.grad_norm}; the run stops "
            "before it publishes broken weights: lower optimizer.learning_rate and go on with --resume."
        )
