"""The loop: batches in, updates done, metrics and checkpoints out; and what is done when something goes wrong."""

import faulthandler
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kantai.cluster.environment import Place, allocated_since
from kantai.cluster.signals import Requests, wait_to_be_ended
from kantai.config.batch_plan import BatchPlan
from kantai.data.batches import Stage
from kantai.data.loader import MicroBatch, Prefetcher, stream
from kantai.distributed.engine import Engine, Outcome
from kantai.errors import UserError
from kantai.evaluation.held_out import fill_masks, held_out_score
from kantai.model.roberta import build_model
from kantai.optim.schedule import learning_rate
from kantai.training.checkpointer import Saver
from kantai.training.metrics import Metrics
from kantai.training.progress import Progress
from kantai.training.run_dir import RunDir
from kantai.training.skipped_data import PassedOver
from kantai.training.throughput import Speed, peak_memory_gib

_REMEMBERED = 100  # losses and gradient norms
_MOST_ROLLBACKS = 3  # to one checkpoint
_MARGIN_SECONDS = 30.0  # before the job's end
_SECONDS_TO_DUMP_STACKS = 60.0
_SECONDS_FOR_THE_LAUNCHER = 60.0


def train(run_dir: RunDir, place: Place) -> bool:
    """Train from the newest valid checkpoint, or from scratch, to the last update or until it is asked to stop.

    Returns:
        Whether all updates are done.
    """
    try:
        return _train(run_dir, place)
    except UserError:
        raise
    except Exception as error:
        if place.world_size > 1 and "connection" in str(error).lower():
            # Another rank is gone, and that is what is to be seen.
            wait_to_be_ended(_SECONDS_FOR_THE_LAUNCHER)
        raise


def _train(run_dir: RunDir, place: Place) -> bool:
    hang_seconds = run_dir.config.failures.hang_seconds
    faulthandler.dump_traceback_later(hang_seconds, exit=True)  # until there is a place for it in the run directory
    model = build_model(run_dir.config, run_dir.data.vocabulary)
    engine = Engine(run_dir.config, place, model, timeout_seconds=hang_seconds + _SECONDS_TO_DUMP_STACKS)
    run = Run(run_dir, engine)
    done, total, stops = run.resume(), run_dir.data.total_updates, False
    while done < total and not stops:
        for update, micro_batches, waited_seconds in run.batches_from(done):
            outcome = run.update(update, micro_batches, waited_seconds)
            done = update + 1
            agreed = run.agree(done)
            if run.has_gone_bad(outcome):
                done = run.roll_back(done)
                break
            if agreed.all_written:
                run.publish()
            # Not within a series of bad numbers: what came before may be what they come from, and it ends within a few updates.
            stops, saves = agreed.stop and not outcome.skipped, agreed.save and not outcome.skipped
            if saves or stops or done == total:
                run.save(done, stops=stops)
            if done == total or (done % run.config.evaluation.every_updates == 0 and not stops):
                run.evaluate(done)
            if stops:
                break
    run.close(done)
    return done == total


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after an update that only some knew before."""

    stop: bool
    save: bool
    all_written: bool  # each rank's part of a checkpoint


class Run:
    """What rank 0 writes down, and every rank's part in saving and evaluating."""

    def __init__(self, run_dir: RunDir, engine: Engine) -> None:
        self.dir, self.engine, self.config, self.data = run_dir, engine, run_dir.config, run_dir.data
        self.batches = self.data.training_batches(engine.place.world_size)
        self.is_main = engine.place.is_main
        self.speed = Speed(engine.matmul_flops_per_second())
        self.store = run_dir.store
        self.saver = Saver(engine, self.store, self.config.checkpoint.keep)
        self.requests = Requests(run_dir.path, looks=self.is_main)
        self.passed_over = PassedOver.of(run_dir.path)
        self.losses: deque[float] = deque(maxlen=_REMEMBERED)
        self.norms: deque[float] = deque(maxlen=_REMEMBERED)
        self.skipped_in_a_row = 0
        self.evaluation_seconds = 0.0
        self.why_stop: str | None = None

    def resume(self) -> int:
        """Take the run over, take up its newest valid checkpoint and open the records. Returns the updates done so far."""
        done = self.engine.on_main(self._take_over)
        if done:
            self.engine.load_state(self.store.path(done))
        self.progress = Progress(done, self.data.total_updates, show=self.is_main)
        self._open_records(done)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.raw_model.parameters())
        self.progress.say(f"model: {parameters:,} parameters; {self.data.total_updates} updates, {done} done")
        self.stage: Stage | None = None
        self.stacks = (self.dir.path / "stacks" / f"rank-{self.engine.place.rank:05d}.txt").open("a")
        if self.stacks.tell():
            self.progress.say(f"an earlier start hung: see {self.dir.path / 'stacks'}")
        self._still_alive()
        self.engine.still_alive = self._still_alive
        every = self.config.evaluation.every_updates
        if done and done % every == 0 and self.engine.from_main(self.metrics is not None and not self.metrics.has(done, "held_out/loss")):
            self.evaluate(done)  # it was asked to stop before
        return done

    def batches_from(self, first_update: int) -> Iterator[tuple[int, list[MicroBatch], float]]:
        """See :func:`stream`; shards that come from elsewhere are fetched ahead."""
        rank, total, at = self.engine.place.rank, self.data.total_updates, self.passed_over.data_update
        prefetcher = Prefetcher(self.data, self.batches, rank, at(first_update))
        prefetcher.advance(at(first_update))
        on_gpu = self.engine.device.type == "cuda"
        for batch in stream(self.batches, rank, first_update, total, self.config.data.workers, at=at, pin_memory=on_gpu):
            prefetcher.advance(at(batch[0]))
            yield batch

    def update(self, update: int, micro_batches: list[MicroBatch], waited_seconds: float) -> Outcome:
        """Do one update and write down what happened."""
        if self.stage is not (stage := self.batches.stage(self.passed_over.data_update(update))):
            if self.config.training.compile:
                torch.compiler.reset()  # or, after other sizes, what is compiled next is for sizes that change, and slower for good
            self.stage = stage
            self.progress.say(f"from update {update} on: {stage.plan}, of up to {stage.sequences.seq_len} tokens")
        rate = learning_rate(self.config.optimizer, update, self.data.total_updates)
        start = time.perf_counter()
        outcome = self.engine.update(update, micro_batches, rate, self._limit(self.losses), self._limit(self.norms))
        seconds = time.perf_counter() - start + waited_seconds
        self.saver.update_took(seconds, self.speed.seconds_per_update)
        self.speed.add(seconds, outcome.tokens, outcome.flops)
        for values, value in ((self.losses, outcome.loss), (self.norms, outcome.grad_norm)):
            if not outcome.skipped and math.isfinite(value):  # a norm of fp16 may be none
                values.append(value)
        if self.metrics is not None and not self.store.is_taken_over():
            goodput = self.metrics.goodput.add(0.0 if outcome.skipped else seconds)
            times = {"speed/update_seconds": seconds, "speed/data_wait_seconds": waited_seconds, "speed/goodput": goodput}
            self.metrics.write(update + 1, {**_train_record(outcome, rate), **self.speed.record(), **times})
        self.progress.update(update + 1, outcome.loss, self.speed.record()["speed/tokens_per_second"], self.speed.seconds_per_update)
        self._still_alive()
        return outcome

    def agree(self, done: int) -> Agreement:
        """Have all ranks know what one of them knows: the one exchange after every update.

        Raises:
            UserError: another start of the run has taken over, or ranks that should have the same weights do not.
        """
        settings, saver = self.config.checkpoint, self.saver
        needed = 2 * (self.speed.seconds_per_update + saver.stall_seconds + saver.write_seconds) + self.evaluation_seconds + _MARGIN_SECONDS
        self.why_stop = self.requests.to_stop(needed)
        save = taken_over = False
        if self.is_main:
            taken_over = self.store.is_taken_over()
            if settings.every_updates is None:
                save = saver.seconds_since() >= saver.interval_seconds(settings.mtbf_hours, self.requests.job_hours())
            save |= self.requests.to_save()
        flags = torch.tensor([self.why_stop is not None, save, saver.is_written(), taken_over], dtype=torch.float32)
        stops, saves, written, taken = self.engine.sum_over_ranks(flags).tolist()
        if taken:
            raise UserError(f"{self.dir.path} has been taken over by a later start of the run: this one ends")
        save_now = bool(saves) or (settings.every_updates is not None and done % settings.every_updates == 0)
        every = self.config.failures.compare_replicas_every
        if every is not None and (done % every == 0 or save_now or stops or done == self.data.total_updates):  # what is saved is to be good
            self.publish()
            self.engine.compare_replicas()
        return Agreement(bool(stops), save_now, written == self.engine.place.world_size)

    def has_gone_bad(self, outcome: Outcome) -> bool:
        """Whether so many updates in a row were skipped that going on is no use."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if outcome.skipped else 0
        if outcome.skipped:
            self.progress.say(f"an update was skipped: loss {outcome.loss:.3g}, gradient norm {outcome.grad_norm:.3g}")
        return self.skipped_in_a_row >= self.config.failures.max_skipped

    def roll_back(self, done: int) -> int:
        """Go back to the newest valid checkpoint, and never again to the data that came after it. Returns its update."""
        self.publish()
        back = self.engine.on_main(lambda: self._pass_over(done))
        self.passed_over = self.engine.from_main(self.passed_over)
        self.engine.load_state(self.store.path(back))
        if self.metrics is not None:
            self.metrics.close()
        self._open_records(back)
        self.skipped_in_a_row = 0
        self.progress.say(f"back to update {back}; the data of updates {back} to {done - 1} is passed over")
        return back

    def evaluate(self, done: int) -> None:
        """Score the held-out split and fill in the prompts, on all ranks together."""
        start = time.perf_counter()
        engine, micro, world = self.engine, self.config.batch.micro_batch_size, self.engine.place.world_size
        batches, steps = self.data.held_out_batches(BatchPlan(micro * world, micro, world))
        score = held_out_score(
            engine.model,
            batches,
            steps,
            rank=engine.place.rank,
            device=engine.device,
            sum_over_ranks=engine.sum_over_ranks,
            after_batch=self._still_alive,
        )
        prompts = self.data.prompts()
        filled = fill_masks(engine.model, self.data.vocabulary, prompts, self.config.data.seq_len)
        self.progress.say(
            f"update {done}: held-out loss {score.loss:.3f} (unigram entropy {self.data.unigram_entropy:.3f}), "
            f"accuracy {score.accuracy:.1%}, perplexity {score.perplexity:,.1f}"
        )
        if self.metrics is not None and not self.store.is_taken_over():
            self.metrics.write(
                done, {**score.record(), "held_out/unigram_entropy": self.data.unigram_entropy, "memory/peak_gib": self.peak_memory_gib()}
            )
            lines = (f"{prompt}: {', '.join(word for word, _ in words)}" for prompt, words in zip(prompts, filled, strict=True))
            self.metrics.write_text(done, "fill_mask", "\n\n".join(line.replace("<", "&lt;") for line in lines))
        self.evaluation_seconds = time.perf_counter() - start
        self._still_alive()

    def save(self, done: int, *, stops: bool) -> None:
        """Copy the state; it is written while training goes on."""
        self.publish()
        start = time.monotonic()
        if self.metrics is not None:
            self.metrics.flush()  # a checkpoint must not know of updates that the records have lost
        if self.is_main:
            self.requests.answer(stop=stops)
        lineage = {**self.dir.lineage, "passed_over": self.passed_over.windows} if self.is_main else {}
        self.saver.start(done, since=start, lineage=lineage)
        self._still_alive()

    def publish(self) -> None:
        """Have the checkpoint that is being written, if there is one, take its place when it is done."""
        if self.saver.finish() and self.metrics is not None:
            self.metrics.write(self.saver.update, self.saver.record())
        self._still_alive()

    def peak_memory_gib(self) -> float:
        """Most memory held on this rank's device, in GiB."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.engine.device.type == "cuda" else peak_memory_gib()

    def close(self, done: int) -> None:
        """Publish the last checkpoint, flush the records and leave the other ranks."""
        self.publish()
        if done < self.data.total_updates:
            why = next(filter(None, self.engine.from_all(self.why_stop)))
            self.progress.say(
                f"asked to stop ({why}): saved update {done} of {self.data.total_updates}; the same command goes on from there"
            )
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
        faulthandler.cancel_dump_traceback_later()
        self.stacks.close()
        Path(self.stacks.name).unlink(missing_ok=True)
        self.engine.close()

    def _take_over(self) -> int:
        self.dir.create()
        self.store.take_over()
        return self.dir.newest(set_aside=True)

    def _open_records(self, done: int) -> None:
        self.metrics: Metrics | None = None
        self.engine.on_main(lambda: self._open_metrics(done))
        for name, values in (("train/loss", self.losses), ("train/grad_norm", self.norms)):
            values.clear()
            values.extend(self.engine.from_main(self.metrics.last(name, _REMEMBERED) if self.metrics is not None else []))
        self.passed_over = self.engine.from_main(PassedOver.of(self.dir.path))

    def _open_metrics(self, done: int) -> None:
        self.metrics = Metrics(self.dir.path, self.store, done + 1, allocated_since())

    def _pass_over(self, done: int) -> int:
        back = self.dir.newest(set_aside=True)
        if back == 0:
            raise UserError("loss or gradient are no finite numbers, and no checkpoint was saved before: lower optimizer.learning_rate")
        if [update for update, _, _ in self.passed_over.windows].count(back) == _MOST_ROLLBACKS:
            raise UserError(
                f"loss or gradient are no finite numbers after update {back} on {_MOST_ROLLBACKS} windows of data, so it is not the data: "
                "lower optimizer.learning_rate in a new run"
            )
        self.passed_over.add(back, done, self.store)
        return back

    def _limit(self, earlier: deque[float]) -> float:
        """From which on a loss or gradient norm is called exploding."""
        factor = self.config.failures.spike_factor
        return math.inf if factor is None or len(earlier) < _REMEMBERED else factor * statistics.median(earlier)

    def _still_alive(self) -> None:
        """Put the moment off at which this process writes where all its threads are, and exits."""
        faulthandler.dump_traceback_later(self.config.failures.hang_seconds, exit=True, file=self.stacks)


def _train_record(outcome: Outcome, rate: float) -> dict[str, float]:
    return {
        "train/loss": outcome.loss,
        "train/accuracy": outcome.accuracy,
        "train/perplexity": outcome.perplexity,
        "train/learning_rate": rate,
        "train/grad_norm": outcome.grad_norm,
        "train/skipped": float(outcome.skipped),
        "train/loss_scale": outcome.loss_scale,
    }
