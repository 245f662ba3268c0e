"""The loop: batches in, steps done, metrics and checkpoints out; and what is done when something goes wrong."""

import faulthandler
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kantai.cluster.environment import RankInfo, allocated_since
from kantai.cluster.signals import StopSignals, wait_to_be_ended
from kantai.config.batch_plan import BatchPlan
from kantai.data.batches import Stage
from kantai.data.loader import MicroBatch, Prefetcher, stream
from kantai.distributed.engine import Engine, StepResult
from kantai.errors import UserError
from kantai.evaluation.held_out import fill_masks, held_out_score
from kantai.model.roberta import build_model
from kantai.optim.schedule import learning_rate
from kantai.training.checkpointer import Checkpointer
from kantai.training.metrics import Metrics
from kantai.training.progress import Progress
from kantai.training.run_dir import RunDir
from kantai.training.skipped_data import SkippedData
from kantai.training.throughput import Speed, peak_memory_gib

_REMEMBERED = 100  # losses and gradient norms
_MAX_ROLLBACKS = 3  # to one checkpoint
_MARGIN_SECONDS = 30.0  # before the job's end
_SECONDS_TO_DUMP_STACKS = 60.0
_SECONDS_FOR_THE_LAUNCHER = 60.0


def train(run_dir: RunDir, rank_info: RankInfo) -> bool:
    """Train from the newest valid checkpoint, or from scratch, to the last step or until it is asked to stop.

    Returns:
        Whether all steps are done.
    """
    try:
        return _train(run_dir, rank_info)
    except UserError:
        raise
    except Exception as error:
        if rank_info.world_size > 1 and "connection" in str(error).lower():
            # Another rank is gone, and that is what is to be seen.
            wait_to_be_ended(_SECONDS_FOR_THE_LAUNCHER)
        raise


def _train(run_dir: RunDir, rank_info: RankInfo) -> bool:
    hang_seconds = run_dir.config.failures.hang_seconds
    faulthandler.dump_traceback_later(hang_seconds, exit=True)  # until there is a place for it in the run directory
    model = build_model(run_dir.config, run_dir.data.vocabulary)
    engine = Engine(run_dir.config, rank_info, model, timeout_seconds=hang_seconds + _SECONDS_TO_DUMP_STACKS)
    run = Run(run_dir, engine)
    done, total, stops = run.resume(), run_dir.data.max_steps, False
    while done < total and not stops:
        for step, micro_batches, waited_seconds in run.batches_from(done):
            result = run.train_step(step, micro_batches, waited_seconds)
            done = step + 1
            decision = run.agree(done)
            if run.has_gone_bad(result):
                done = run.roll_back(done)
                break
            if decision.all_written:
                run.publish()
            # Not within a series of bad numbers: what came before may be what they come from, and it ends within a few steps.
            stops, saves = decision.stop and not result.skipped, decision.save and not result.skipped
            if saves or stops or done == total:
                run.save(done, stops=stops)
            if done == total or (done % run.config.evaluation.every_steps == 0 and not stops):
                run.evaluate(done)
            if stops:
                break
    run.close(done)
    return done == total


@dataclass(frozen=True)
class Decision:
    """What all ranks know after a step that only some knew before."""

    stop: bool
    save: bool
    all_written: bool  # each rank's part of a checkpoint


class Run:
    """What rank 0 writes down, and every rank's part in saving and evaluating."""

    def __init__(self, run_dir: RunDir, engine: Engine) -> None:
        self.dir, self.engine, self.config, self.data = run_dir, engine, run_dir.config, run_dir.data
        self.batches = self.data.training_batches(engine.rank_info.world_size)
        self.is_main = engine.rank_info.is_main
        self.speed = Speed(engine.matmul_flops_per_second())
        self.store = run_dir.store
        self.checkpointer = Checkpointer(engine, self.store, self.config.checkpoint.keep)
        self.stop_signals = StopSignals(run_dir.path, watch_files=self.is_main)
        self.skipped_data = SkippedData.of(run_dir.path)
        self.losses: deque[float] = deque(maxlen=_REMEMBERED)
        self.norms: deque[float] = deque(maxlen=_REMEMBERED)
        self.skipped_in_a_row = 0
        self.evaluation_seconds = 0.0
        self.why_stop: str | None = None

    def resume(self) -> int:
        """Take the run over, take up its newest valid checkpoint and open the records. Returns the steps done so far."""
        done = self.engine.on_main(self._supersede)
        if done:
            self.engine.load_state(self.store.path(done))
        self.progress = Progress(done, self.data.max_steps, show=self.is_main)
        self._open_records(done)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.raw_model.parameters())
        self.progress.say(f"model: {parameters:,} parameters; {self.data.max_steps} steps, {done} done")
        self.stage: Stage | None = None
        self.stacks = (self.dir.path / "stacks" / f"rank-{self.engine.rank_info.rank:05d}.txt").open("a")
        if self.stacks.tell():
            self.progress.say(f"an earlier start hung: see {self.dir.path / 'stacks'}")
        self._heartbeat()
        self.engine.heartbeat = self._heartbeat
        every = self.config.evaluation.every_steps
        if done and done % every == 0 and self.engine.from_main(self.metrics is not None and not self.metrics.has(done, "held_out/loss")):
            self.evaluate(done)  # it was asked to stop before
        return done

    def batches_from(self, first_step: int) -> Iterator[tuple[int, list[MicroBatch], float]]:
        """See :func:`stream`; shards that come from elsewhere are fetched ahead."""
        rank, total, at = self.engine.rank_info.rank, self.data.max_steps, self.skipped_data.data_step
        prefetcher = Prefetcher(self.data, self.batches, rank, at(first_step))
        prefetcher.advance(at(first_step))
        on_gpu = self.engine.device.type == "cuda"
        for batch in stream(self.batches, rank, first_step, total, self.config.data.workers, at=at, pin_memory=on_gpu):
            prefetcher.advance(at(batch[0]))
            yield batch

    def train_step(self, step: int, micro_batches: list[MicroBatch], waited_seconds: float) -> StepResult:
        """Do one step and write down what happened."""
        if self.stage is not (stage := self.batches.stage_at(self.skipped_data.data_step(step))):
            if self.config.training.compile:
                torch.compiler.reset()  # or, after other sizes, what is compiled next is for sizes that change, and slower for good
            self.stage = stage
            self.progress.say(f"from step {step} on: {stage.plan}, of up to {stage.sequences.seq_len} tokens")
        rate = learning_rate(self.config.optimizer, step, self.data.max_steps)
        start = time.perf_counter()
        result = self.engine.train_step(step, micro_batches, rate, self._limit(self.losses), self._limit(self.norms))
        seconds = time.perf_counter() - start + waited_seconds
        self.checkpointer.step_took(seconds, self.speed.seconds_per_step)
        self.speed.add(seconds, result.tokens, result.flops)
        for values, value in ((self.losses, result.loss), (self.norms, result.grad_norm)):
            if not result.skipped and math.isfinite(value):  # a norm of fp16 may be none
                values.append(value)
        if self.metrics is not None and not self.store.is_superseded():
            goodput = self.metrics.goodput.add(0.0 if result.skipped else seconds)
            times = {"speed/step_seconds": seconds, "speed/data_wait_seconds": waited_seconds, "speed/goodput": goodput}
            self.metrics.write(step + 1, {**_train_record(result, rate), **self.speed.as_metrics(), **times})
        self.progress.update(step + 1, result.loss, self.speed.as_metrics()["speed/tokens_per_second"], self.speed.seconds_per_step)
        self._heartbeat()
        return result

    def agree(self, done: int) -> Decision:
        """Have all ranks know what one of them knows: the one exchange after every step.

        Raises:
            UserError: a later start of the run has superseded this one, or ranks that should have the same weights do not.
        """
        settings, checkpointer = self.config.checkpoint, self.checkpointer
        needed = (
            2 * (self.speed.seconds_per_step + checkpointer.stall_seconds + checkpointer.write_seconds)
            + self.evaluation_seconds
            + _MARGIN_SECONDS
        )
        self.why_stop = self.stop_signals.stop_reason(needed)
        save = taken_over = False
        if self.is_main:
            taken_over = self.store.is_superseded()
            if settings.every_steps is None:
                save = checkpointer.seconds_since() >= checkpointer.interval_seconds(settings.mtbf_hours, self.stop_signals.job_hours())
            save |= self.stop_signals.save_requested()
        flags = torch.tensor([self.why_stop is not None, save, checkpointer.is_written(), taken_over], dtype=torch.float32)
        stops, saves, written, taken = self.engine.sum_over_ranks(flags).tolist()
        if taken:
            raise UserError(f"{self.dir.path} has been superseded by a later start of the run: this one ends")
        save_now = bool(saves) or (settings.every_steps is not None and done % settings.every_steps == 0)
        every = self.config.failures.compare_replicas_every
        if every is not None and (done % every == 0 or save_now or stops or done == self.data.max_steps):  # what is saved is to be good
            self.publish()
            self.engine.compare_replicas()
        return Decision(bool(stops), save_now, written == self.engine.rank_info.world_size)

    def has_gone_bad(self, result: StepResult) -> bool:
        """Whether so many steps in a row were skipped that going on is no use."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if result.skipped:
            self.progress.say(f"a step was skipped: loss {result.loss:.3g}, gradient norm {result.grad_norm:.3g}")
        return self.skipped_in_a_row >= self.config.failures.max_skipped

    def roll_back(self, done: int) -> int:
        """Go back to the newest valid checkpoint, and never again to the data that came after it. Returns its step."""
        self.publish()
        back = self.engine.on_main(lambda: self._skip_data(done))
        self.skipped_data = self.engine.from_main(self.skipped_data)
        self.engine.load_state(self.store.path(back))
        if self.metrics is not None:
            self.metrics.close()
        self._open_records(back)
        self.skipped_in_a_row = 0
        self.progress.say(f"back to step {back}; the data of steps {back} to {done - 1} is skipped")
        return back

    def evaluate(self, done: int) -> None:
        """Score the held-out split and fill in the prompts, on all ranks together."""
        start = time.perf_counter()
        engine, micro, world = self.engine, self.config.batch.micro_batch_size, self.engine.rank_info.world_size
        batches, steps = self.data.held_out_batches(BatchPlan(micro * world, micro, world))
        score = held_out_score(
            engine.model,
            batches,
            steps,
            rank=engine.rank_info.rank,
            device=engine.device,
            sum_over_ranks=engine.sum_over_ranks,
            after_batch=self._heartbeat,
        )
        prompts = self.data.prompts()
        filled = fill_masks(engine.model, self.data.vocabulary, prompts, self.config.data.seq_len)
        self.progress.say(
            f"step {done}: held-out loss {score.loss:.3f} (unigram entropy {self.data.unigram_entropy:.3f}), "
            f"accuracy {score.accuracy:.1%}, perplexity {score.perplexity:,.1f}"
        )
        if self.metrics is not None and not self.store.is_superseded():
            self.metrics.write(
                done,
                {**score.as_metrics(), "held_out/unigram_entropy": self.data.unigram_entropy, "memory/peak_gib": self.peak_memory_gib()},
            )
            lines = (f"{prompt}: {', '.join(word for word, _ in words)}" for prompt, words in zip(prompts, filled, strict=True))
            self.metrics.write_text(done, "fill_mask", "\n\n".join(line.replace("<", "&lt;") for line in lines))
        self.evaluation_seconds = time.perf_counter() - start
        self._heartbeat()

    def save(self, done: int, *, stops: bool) -> None:
        """Copy the state; it is written while training goes on."""
        self.publish()
        start = time.monotonic()
        if self.metrics is not None:
            self.metrics.flush()  # a checkpoint must not know of steps that the records have lost
        if self.is_main:
            self.stop_signals.acknowledge(stop=stops)
        lineage = {**self.dir.lineage, "skipped_data": self.skipped_data.windows} if self.is_main else {}
        self.checkpointer.start(done, since=start, lineage=lineage)
        self._heartbeat()

    def publish(self) -> None:
        """Have the checkpoint that is being written, if there is one, take its place when it is done."""
        if self.checkpointer.finish() and self.metrics is not None:
            self.metrics.write(self.checkpointer.step, self.checkpointer.as_metrics())
        self._heartbeat()

    def peak_memory_gib(self) -> float:
        """Most memory held on this rank's device, in GiB."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.engine.device.type == "cuda" else peak_memory_gib()

    def close(self, done: int) -> None:
        """Publish the last checkpoint, flush the records and leave the other ranks."""
        self.publish()
        if done < self.data.max_steps:
            why = next(filter(None, self.engine.from_all(self.why_stop)))
            self.progress.say(f"asked to stop ({why}): saved step {done} of {self.data.max_steps}; the same command goes on from there")
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
        faulthandler.cancel_dump_traceback_later()
        self.stacks.close()
        Path(self.stacks.name).unlink(missing_ok=True)
        self.engine.close()

    def _supersede(self) -> int:
        self.dir.create()
        self.store.supersede()
        return self.dir.newest(set_aside=True)

    def _open_records(self, done: int) -> None:
        self.metrics: Metrics | None = None
        self.engine.on_main(lambda: self._open_metrics(done))
        for name, values in (("train/loss", self.losses), ("train/grad_norm", self.norms)):
            values.clear()
            values.extend(self.engine.from_main(self.metrics.last(name, _REMEMBERED) if self.metrics is not None else []))
        self.skipped_data = self.engine.from_main(SkippedData.of(self.dir.path))

    def _open_metrics(self, done: int) -> None:
        self.metrics = Metrics(self.dir.path, self.store, done + 1, allocated_since())

    def _skip_data(self, done: int) -> int:
        back = self.dir.newest(set_aside=True)
        if back == 0:
            raise UserError("loss or gradient are no finite numbers, and no checkpoint was saved before: lower optimizer.learning_rate")
        if [step for step, _, _ in self.skipped_data.windows].count(back) == _MAX_ROLLBACKS:
            raise UserError(
                f"loss or gradient are no finite numbers after step {back} on {_MAX_ROLLBACKS} windows of data, so it is not the data: "
                "lower optimizer.learning_rate in a new run"
            )
        self.skipped_data.add(back, done, self.store)
        return back

    def _limit(self, earlier: deque[float]) -> float:
        """From which on a loss or gradient norm is called exploding."""
        factor = self.config.failures.spike_factor
        return math.inf if factor is None or len(earlier) < _REMEMBERED else factor * statistics.median(earlier)

    def _heartbeat(self) -> None:
        """Put the moment off at which this process writes where all its threads are, and exits."""
        faulthandler.dump_traceback_later(self.config.failures.hang_seconds, exit=True, file=self.stacks)


def _train_record(result: StepResult, rate: float) -> dict[str, float]:
    return {
        "train/loss": result.loss,
        "train/accuracy": result.accuracy,
        "train/perplexity": result.perplexity,
        "train/learning_rate": rate,
        "train/grad_norm": result.grad_norm,
        "train/skipped": float(result.skipped),
        "train/loss_scale": result.loss_scale,
    }
