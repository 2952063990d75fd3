"""The life of a run: start or resume, steps, held-out loss, checkpoints, the end. All but the sharding."""

import dataclasses
import time
from collections import deque
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from pmc_llama import checkpoint, starting
from pmc_llama.backends import build_backend, check_sharding
from pmc_llama.checkpoint import FileTable, Manifest
from pmc_llama.compatibility import check_model
from pmc_llama.config import Recipe, plain
from pmc_llama.data import Source, TrainingData, heldout, open_sources
from pmc_llama.distributed import Ranks, connect, disconnect, discover
from pmc_llama.dry_run import dry_run
from pmc_llama.flops import model_flops_per_token, model_flops_utilization
from pmc_llama.garbage import GarbageCollection
from pmc_llama.guards import Guard, check_skip_steps
from pmc_llama.huggingface_tokenizer import check_tokenizer
from pmc_llama.in_flight import Numbers, StepClock
from pmc_llama.lora import peft_version
from pmc_llama.metrics import Metrics, peak_memory
from pmc_llama.profiling import StepProfiler
from pmc_llama.provenance import describe_start
from pmc_llama.rank_log import rank_log
from pmc_llama.read_ahead import ReadAhead
from pmc_llama.records import StepRecord
from pmc_llama.run_lock import only_writer
from pmc_llama.saving import CheckpointSaver, SaveOutcome
from pmc_llama.schedule import learning_rate
from pmc_llama.startup import StartUp
from pmc_llama.stopping import REQUEUE, StopRequests
from pmc_llama.watchdog import Watchdog, collective_timeout


def train(recipe: Recipe, resume: str | None, started: float) -> int:
    """Run a recipe on the ranks that the launcher made, or alone.

    Args:
        recipe: what to run.
        resume: None starts afresh and refuses a directory that has checkpoints; `latest` goes on from the
            newest sound checkpoint of the run's directory, or starts afresh where there is none; anything
            else is the directory of the checkpoint to go on from.
        started: `time.time()` at the start of the process, from which the first step is timed.

    Returns:
        Exit status: 0 when the last step is made, `stopping.REQUEUE` when the run was asked to stop before.

    Raises:
        UserError: what the recipe names cannot be had, or does not fit what it is resumed from.
    """
    check_skip_steps(recipe.guards.skip_steps)
    startup = StartUp(started)
    startup.reached("imports")
    ranks = discover()
    check_sharding(recipe, ranks.world_size)
    device = connect(ranks, collective_timeout(recipe.hangs.start_seconds))
    startup.reached("meeting the other ranks")
    sources = open_sources(recipe.data)
    startup.reached("corpus")
    logs = recipe.output / "logs"
    with only_writer(recipe.output, ranks.rank), rank_log(logs, ranks.rank) as console:
        trainer = Trainer(recipe, sources, ranks, device, started, console)
        with trainer.stopping, trainer.watchdog, trainer.garbage:
            trainer.start(resume, startup)
            finished = trainer.run(startup)
            trainer.close()
        disconnect()
    return 0 if finished else REQUEUE


UNPROFILED_STEPS = 5
"""Steps of a process before those that `logging.profile_steps` profiles: they allocate and fill caches."""


@dataclass(frozen=True)
class Taken:
    """What a run has taken of its data when a step is made, whatever came of it.

    Attributes:
        step: steps made.
        samples: sequences consumed.
        tokens: inputs consumed, padding included; in `whole` mode those of the documents.
        covered: tokens of each corpus that were targets.
    """

    step: int
    samples: int
    tokens: int
    covered: tuple[int, ...]


@dataclass(frozen=True)
class Place(Taken):
    """Where a run stands after a step.

    Attributes:
        updates: of the steps made, how many changed the weights.
        guard: what the numerical guard remembers.
    """

    updates: int
    guard: dict[str, Any]


@dataclass(frozen=True)
class Sent:
    """A step that was sent to the device.

    Attributes:
        taken: when it is made.
        tokens: inputs of its batch.
        targets: of its batch, over all ranks.
        rate: learning rate.
        numbers: its summed loss over all ranks, gradient norm, refusal, requests to stop, failed saves.
        clock: its times.
    """

    taken: Taken
    tokens: int
    targets: int
    rate: float
    numbers: Numbers
    clock: StepClock


class Trainer:
    """One run on one rank.

    Attributes:
        place: where the run stands, as far as the host has learned.
        sent: steps that the host has sent and not learned of yet; one at most when the next is sent.
        steps: of the whole run.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: list[Source],
        ranks: Ranks,
        device: torch.device,
        started: float,
        console: int,
    ) -> None:
        self.recipe, self.ranks, self.device, self.started = recipe, ranks, device, started
        used = ("pmc-llama", "torch", "transformers", *(["deepspeed"] * (recipe.backend == "deepspeed")))
        self.versions = {name: version(name) for name in used}
        if recipe.lora:
            self.versions["peft"] = peft_version()
        # What is said while starting goes over gloo: small Python objects, and never in the way of NCCL.
        self.group = dist.new_group(backend="gloo")
        self.sources, self.corpus = sources, sources[0].corpus
        self.tokenizer = self.corpus.tokenizer_path
        check_tokenizer(self.tokenizer)  # what could not be exported is not trained

        self.checkpoints = recipe.output / "checkpoints"
        self.saver = CheckpointSaver(
            self.checkpoints,
            recipe.checkpoint,
            self.tokenizer,
            patience=collective_timeout(recipe.hangs.save_seconds),
        )
        self.stopping = StopRequests(recipe.output / "stop", ranks.rank)
        self.watchdog = Watchdog(
            ranks, recipe.output / "logs", recipe.hangs, background=[self.saver.group], console=console
        )
        self.garbage = GarbageCollection()
        self.asked_to_stop = False
        late = recipe.speed.read_late
        self.behind = int(device.type == "cuda" if late is None else late)
        self.sent: deque[Sent] = deque()
        self.stall_seconds = 0.0  # of a checkpoint, since the last step

    # --- the life of a run -----------------------------------------------------------------------------

    def start(self, resume: str | None, startup: StartUp) -> None:
        """Build the model, load its first weights or all of a checkpoint, and open the run's records."""
        recipe = self.recipe
        source = starting.find_checkpoint(self.checkpoints, resume, self.group, self._warn)
        self.config = starting.model_config(recipe, self.corpus.vocab_size, source)
        check_model(recipe, self.config, self.corpus)
        self.base = starting.find_base(recipe, self.config, source, self.group)
        self.watchdog.enter("building the model")
        startup.reached("finding the checkpoint")
        self.backend = build_backend(recipe, self.config, self.device)
        startup.reached("model")
        self.watchdog.enter("loading the weights")
        if source:
            manifest = checkpoint.read_manifest(source)
            self._go_on_from(manifest)
            starting.load_checkpoint(recipe, source, manifest, self.backend, self.group)
        else:
            self._begin()
            starting.load_first_weights(recipe, self.config, self.backend, self.group)
        startup.reached("weights")
        self.guard = Guard(recipe.guards, self.place.guard, self.device)
        self.last_updated, self.saved_step = self.place, self.place.step
        self.batches = self.data.batches(recipe.batch, self.ranks.rank, self.ranks.world_size)
        self.reader = ReadAhead(self.batches, recipe.batch.global_size, pinned=self.device.type == "cuda")
        self.steps = recipe.schedule.steps or self.place.step + self.data.steps_left(
            recipe.schedule.epochs, self.place.samples, recipe.batch.global_size
        )
        self.metrics = Metrics(
            recipe.output,
            self.ranks.rank,
            self.place.step,
            recipe_text=yaml.safe_dump(plain(recipe), sort_keys=False),
            every_steps=recipe.logging.every_steps,
            start=describe_start(self.ranks, self.device, self.versions, self.group),
            wandb_project=recipe.logging.wandb_project,
        )
        first = self.place.step + UNPROFILED_STEPS + 1
        self.profiler = StepProfiler(
            recipe.output, range(first, first + recipe.logging.profile_steps), self.ranks.rank, self.device
        )
        self._introduce(source)
        startup.reached("records")

    def run(self, startup: StartUp) -> bool:
        """Train to the last step, or until asked to stop; publish checkpoints on the way and at the end.

        Returns:
            Whether the last step is made.
        """
        if self.place.step >= self.steps:
            self.metrics.say(
                f"finished: step {self.place.step} of {self.steps} is made, nothing is left to train"
            )
            return True
        if self.recipe.dry_run:
            self.watchdog.enter("dry run")
            self.metrics.say(dry_run(self.backend, self.recipe, self.config.vocab_size, self.device))
            startup.reached("dry run")
        self.startup, self.first_step = startup, self.place.step + 1
        while self.taken.step < self.steps and not self.asked_to_stop:
            if self.guard.passes_over(self.taken.step + 1):
                self._catch_up(0)
                self._pass_over()
                continue
            self.send_step()
            step = self.taken.step
            saves = self._due(step, self.recipe.checkpoint.every_steps)
            evaluates = step == 1 or self._due(step, self.recipe.evaluation.every_steps)
            self._catch_up(0 if saves or evaluates or step == self.first_step else self.behind)
            if saves and not self.guard.skipped_in_a_row:
                self.save_checkpoint(self.place)
        self._catch_up(0)
        if self.place.step > self.saved_step:
            self.save_checkpoint(self.place)
        self.watchdog.enter("finishing the last checkpoint", saving=True)
        self._tell(self.saver.wait())
        if self.place.step < self.steps:
            self.metrics.say(f"stopped by {self.stopping.reason}; the same command with --resume goes on")
        self.stopping.obeyed()
        return self.place.step == self.steps

    def send_step(self) -> None:
        """Send one step over one global batch to the device: an update, or none where the guard objects.

        Nothing here waits for a number of the device; `learn` reads them.
        """
        recipe, before, step = self.recipe, self.taken, self.taken.step + 1
        clock = StepClock(self.device)
        clock.turn()
        self.profiler.step_begins(step)
        self._enter("reading a batch")
        batch = self.reader.batch(before.samples)
        clock.turn()
        self._enter("forward and backward")
        targets = max(batch.targets, 1)
        summed = self.backend.forward_backward(batch.micro_batches, targets, step)
        loss, asked, failures = self._sum_over_ranks(summed)
        clock.turn()
        self._enter("the optimizer's step")
        rate = learning_rate(step, self.steps, recipe.optimizer.learning_rate, recipe.schedule)
        grad_norm = self.backend.clip(recipe.optimizer.max_grad_norm)
        refused = self.guard.judge(loss / targets, grad_norm)
        self.backend.step(rate, refused)
        clock.turn()
        taken = self._taken_after(before)
        numbers = Numbers([loss, grad_norm, refused, asked, failures])
        self.sent.append(Sent(taken, taken.tokens - before.tokens, targets, rate, numbers, clock))
        self.profiler.step_ends(step)

    def learn(self) -> StepRecord:
        """Learn what came of the first of the steps sent.

        Raises:
            UserError: too many checkpoints in a row could not be written.
        """
        self.watchdog.enter("waiting for the device")
        sent = self.sent.popleft()
        summed, grad_norm, refused, asked, failures = sent.numbers.read()
        # The ranks see the end of a save at different steps: it counts once all have.
        self.saver.stop_if_failing(int(failures) // self.ranks.world_size)
        self.asked_to_stop |= asked > 0
        loss = summed / sent.targets
        objection = self.guard.learn(loss, grad_norm, refused > 0)
        self._advance(sent.taken, updated=objection is None)
        return self._describe(sent, loss, grad_norm, objection)

    def heldout_loss(self) -> float | None:
        """Mean loss in nats a token on the held-out papers; None when the corpus keeps none."""
        ranks, recipe = self.ranks, self.recipe
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.watchdog.enter("held-out loss")
        batches = heldout(
            self.corpus.split("heldout"),
            recipe.data,
            recipe.batch.micro_size,
            ranks.rank,
            ranks.world_size,
            recipe.evaluation.max_sequences,
        )
        for batch in batches:
            totals[0] += self.backend.evaluate(batch)
            totals[1] += (batch.labels >= 0).sum()
            self.watchdog.progress()
        dist.all_reduce(totals)
        summed, targets = totals.tolist()
        return summed / targets if targets else None

    def save_checkpoint(self, place: Place) -> None:
        """Begin to publish a checkpoint of the weights as they are, at `place` of the run."""
        begin = time.perf_counter()
        self.watchdog.enter("saving a checkpoint", saving=True)
        self.metrics.synchronize()
        self.saver.save(self.backend.state(), lambda files: self._manifest(place, files))
        self.saved_step = place.step
        self.stall_seconds = time.perf_counter() - begin

    def close(self) -> None:
        """Close the records and release the model."""
        self.reader.close()
        self.profiler.close()
        self.metrics.close()
        self.backend.close()

    # --- the small parts -------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.data = TrainingData(self.sources, self.recipe.data, self.recipe.seed)
        self.place = Place(0, 0, 0, self.data.covered, updates=0, guard={})

    def _go_on_from(self, manifest: Manifest) -> None:
        recipe = self.recipe
        self.data = TrainingData(self.sources, recipe.data, recipe.seed, manifest.data, manifest.samples)
        self.place = Place(
            manifest.step,
            manifest.samples,
            manifest.tokens,
            self.data.covered,
            updates=manifest.updates,
            guard=manifest.guard,
        )

    @property
    def taken(self) -> Taken:
        """What is taken of the data by the steps sent so far."""
        return self.sent[-1].taken if self.sent else self.place

    def _taken_after(self, before: Taken) -> Taken:
        size = self.recipe.batch.global_size
        return Taken(
            step=before.step + 1,
            samples=before.samples + size,
            tokens=before.tokens + self.batches.tokens(before.samples),
            covered=self.data.covered_after(before.covered, before.samples, size),
        )

    def _catch_up(self, behind: int) -> None:
        """Learn of the steps sent, and tell of them, until the host is no more than `behind` steps behind."""
        while len(self.sent) > behind:
            record = self.learn()
            if record.step == self.first_step:
                self.startup.reached("step")
                self.metrics.say(str(self.startup))
            if record.step == 1 or self._due(record.step, self.recipe.evaluation.every_steps):
                record = dataclasses.replace(record, heldout_loss=self.heldout_loss())
            self.metrics.record(record)
            self.watchdog.step_made(record.step)
            self.garbage.step_made(record.step)
            self._tell(self.saver.poll())
            if self.guard.must_stop:
                self._give_up(str(record.skipped))

    def _sum_over_ranks(self, summed: Tensor) -> Tensor:
        """What the ranks tell one another in a step, in one all-reduce: losses, requests to stop, failures.

        Returns:
            fp64 [3], each summed over the ranks.
        """
        told = torch.tensor([self.stopping.asked, self.saver.failures], dtype=torch.float64)
        totals = torch.cat([summed.view(1), told.to(self.device, non_blocking=True)])
        dist.all_reduce(totals)
        return totals

    def _enter(self, phase: str) -> None:
        """A step enters a phase: told to those who watch it."""
        self.watchdog.enter(phase)
        self.profiler.phase(phase)

    def _advance(self, taken: Taken, updated: bool) -> None:
        """Note that a step is made; one without an update has taken its batch all the same."""
        updates = self.place.updates + updated
        self.place = Place(**vars(taken), updates=updates, guard=self.guard.state())
        if updated:
            self.last_updated = self.place

    def _pass_over(self) -> None:
        self._advance(self._taken_after(self.place), updated=False)
        self.metrics.say(f"step {self.place.step} is passed over (guards.skip_steps)")

    def _give_up(self, reason: str) -> None:
        """Publish the state before the updates that were skipped, and end the run.

        A step sent meanwhile has changed nothing: the guard refuses it on the device.
        """
        good = self.last_updated
        if good.step > self.saved_step:
            self.save_checkpoint(good)
        self.watchdog.enter("finishing the last checkpoint", saving=True)
        self._tell(self.saver.wait())
        raise self.guard.stop(good.step, self.place.step, reason)

    def _due(self, step: int, every: int) -> bool:
        return step == self.steps or step % every == 0

    def _manifest(self, place: Place, files: FileTable) -> Manifest:
        return Manifest(
            step=place.step,
            updates=place.updates,
            samples=place.samples,
            tokens=place.tokens,
            data=self.data.history(place.covered),
            guard=place.guard,
            recipe=plain(self.recipe),
            model_config=self.config.to_dict(),
            corpus=self.corpus.fingerprint,
            versions=self.versions,
            files=files,
            base=self.base,
            format=checkpoint.ADAPTERS if self.base else checkpoint.ALL_WEIGHTS,
        )

    # --- telling ---------------------------------------------------------------------------------------

    def _introduce(self, resumed: Path | None) -> None:
        recipe, say = self.recipe, self.metrics.say
        say(
            f"{recipe.backend}, {recipe.precision.compute}, on {self.ranks.world_size} x {self.device.type} "
            f"(started by {self.ranks.launcher}); {self._parameters()}"
        )
        for source in self.sources:
            split = source.split
            say(f"corpus {source.corpus.location}: {split.documents:,} papers, {split.tokens:,} tokens")
        for note in self.data.notes:
            say(note)
        whole, length = recipe.data.mode == "whole", recipe.data.sequence_length
        taken = f"documents, in rows of up to {length}" if whole else f"x {length}"
        say(f"{self.steps:,} steps of {recipe.batch.global_size} {taken} tokens")
        origin = resumed or recipe.model.initialize_from or f"random weights of seed {recipe.seed}"
        say(f"starting after step {self.place.step} from {origin}")

    def _warn(self, text: str) -> None:
        if self.ranks.rank == 0:
            print(f"warning: {text}", flush=True)

    def _tell(self, saves: list[SaveOutcome]) -> None:
        for outcome in saves:
            self.metrics.say(str(outcome))

    def _parameters(self) -> str:
        trained = sum(t.numel() for name, t in self.backend.state().items() if name.startswith("model."))
        frozen = sum(tensor.numel() for tensor in self.backend.frozen().values())
        of_all = f" trained, of {trained + frozen:,}" if frozen else ""
        return f"{trained:,} parameters{of_all}"

    def _describe(self, sent: Sent, loss: float, grad_norm: float, skipped: str | None) -> StepRecord:
        place, times, tokens = self.place, sent.clock.times(), sent.tokens
        speed = tokens / times.step_seconds
        length = round(tokens / self.recipe.batch.global_size)  # of whole documents the mean
        stall_seconds, self.stall_seconds = self.stall_seconds, 0.0
        return StepRecord(
            step=place.step,
            steps=self.steps,
            updates=place.updates,
            samples=place.samples,
            tokens=place.tokens,
            epoch=self.data.epoch(place.samples),
            coverage=self.data.coverage(place.covered),
            loss=loss,
            grad_norm=grad_norm,
            skipped=skipped,
            learning_rate=sent.rate,
            step_seconds=times.step_seconds,
            data_seconds=times.data_seconds,
            forward_backward_seconds=times.forward_backward_seconds,
            optimizer_seconds=times.optimizer_seconds,
            checkpoint_seconds=stall_seconds,
            seconds_since_start=time.time() - self.started,
            tokens_per_second=speed,
            tokens_per_second_per_device=speed / self.ranks.world_size,
            peak_memory_bytes=peak_memory(self.device),
            mfu=model_flops_utilization(
                speed / self.ranks.world_size * model_flops_per_token(self.config, length, self.recipe.lora),
                self.device,
            ),
        )
