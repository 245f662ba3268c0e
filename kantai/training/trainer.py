"""The training loop: batches in, steps done, metrics and checkpoints out."""

import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from kantai.cluster.environment import RankInfo
from kantai.cluster.signals import wait_to_be_ended
from kantai.data.batches import Stage
from kantai.data.loader import MicroBatch, Prefetcher, stream
from kantai.distributed.engine import Engine, StepResult
from kantai.errors import UserError
from kantai.evaluation.held_out import fill_masks, held_out_score
from kantai.model.roberta import MaskedRoberta, build_model
from kantai.optim.schedule import learning_rate
from kantai.storage.atomic import Damaged, digest, verify
from kantai.training.checkpointer import Checkpointer
from kantai.training.loss_monitor import MONITORED, LossMonitor
from kantai.training.run_dir import RunDir
from kantai.training.run_logger import RunLogger
from kantai.training.skipped_data import SkippedData
from kantai.training.stopping import Decision, StopCoordinator, stopped_message
from kantai.training.throughput import Throughput, peak_memory_gib
from kantai.training.watchdog import Watchdog

_MAX_ROLLBACKS = 3  # within so many steps:
_ROLLBACK_STEPS = 100
_MARGIN_SECONDS = 30.0  # before the job's end
_SECONDS_TO_DUMP_STACKS = 60.0
_SECONDS_FOR_THE_LAUNCHER = 60.0


def train(run_dir: RunDir, rank_info: RankInfo) -> bool:
    """Train from the newest valid checkpoint, or from scratch, to the end or until asked to stop.

    Returns whether all steps are done.
    """
    try:
        return Trainer(run_dir, rank_info).train()
    except UserError:
        raise
    except Exception as error:
        if rank_info.world_size > 1 and _is_lost_rank(error):
            # The lost rank's own error is the one to be shown.
            wait_to_be_ended(_SECONDS_FOR_THE_LAUNCHER)
        raise


def _is_lost_rank(error: Exception) -> bool:
    """Whether another rank is gone. Gloo and NCCL raise RuntimeError, and say so in the text."""
    return "connection" in str(error).lower()


def _read_checkpoint(path: Path, *, hashes: bool) -> tuple[str, str]:
    """The digest of a checkpoint's manifest, and what is wrong with its files."""
    try:
        return digest(verify(path, hashes=hashes)), ""
    except (Damaged, OSError) as error:
        return "", str(error)


class Trainer:
    """One start of a run."""

    def __init__(self, run_dir: RunDir, rank_info: RankInfo) -> None:
        """Join the other ranks and build everything that a run needs."""
        config = run_dir.config
        data = run_dir.data
        failures = config.failures
        self.run_dir = run_dir
        self.data = data
        self.max_steps = data.max_steps
        self.schedule = config.optimizer
        self.evaluate_every = config.evaluation.every_steps
        self.compare_every = failures.compare_replicas_every
        self.watchdog = Watchdog(failures.hang_seconds)
        self.engine = Engine(
            rank_info,
            self._new_model(),
            config.optimizer,
            config.training,
            seed=data.seed,
            # The watchdog is to speak first.
            timeout_seconds=failures.hang_seconds + _SECONDS_TO_DUMP_STACKS,
            in_common=run_dir.in_common,
        )
        self.engine.heartbeat = self.watchdog.kick
        self.store = run_dir.store
        self.batches = data.training_batches(rank_info.world_size)
        self.throughput = Throughput(self.engine.matmul_flops_per_second())
        self.checkpointer = Checkpointer(self.engine, self.store, config.checkpoint)
        self.stopping = StopCoordinator(run_dir.path, self.engine, self.store)
        self.monitor = LossMonitor(failures.spike_factor, failures.max_skipped)
        self.skipped_data = SkippedData.of(run_dir.path)
        self.stage: Stage | None = None
        self.evaluation_seconds = 0.0
        self.trains_since = time.monotonic()

    def train(self) -> bool:
        """The loop. Returns whether all steps are done."""
        done = self.resume()
        self.trains_since = time.monotonic()
        stops = False
        while done < self.max_steps and not stops:
            for step, micro_batches, waited_seconds in self.batches_from(done):
                self.train_step(step, micro_batches, waited_seconds)
                done = step + 1
                decision = self.agree(done)
                if self.monitor.has_gone_bad or not decision.is_finite:
                    done = self.roll_back(done)
                    break
                if decision.all_written:
                    self.publish()
                # Never save or stop in the middle of a bad streak: the last good step may have
                # caused it, and the streak ends within a few steps.
                is_good = self.monitor.skipped_in_a_row == 0
                stops = decision.stop and is_good
                if (decision.save and is_good) or stops or done == self.max_steps:
                    self.save(done, stops=stops)
                if done == self.max_steps or (done % self.evaluate_every == 0 and not stops):
                    self.evaluate(done)
                if stops:
                    break
        self.finish(done)
        return done == self.max_steps

    def resume(self) -> int:
        """Supersede earlier starts and load the newest valid checkpoint. Returns the steps done."""
        done = self.engine.on_main(self.run_dir.take_over)
        if done:
            self._load(done)
        self.logger = RunLogger(
            self.run_dir.path,
            self.store,
            self.throughput,
            done=done,
            max_steps=self.max_steps,
            log_every=self.run_dir.config.training.log_every_steps,
            is_main=self.engine.rank_info.is_main,
        )
        self._restart_from(done)
        parameters = self.engine.raw_model.parameters()
        count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
        self.logger.say(f"model: {count:,} parameters; {self.max_steps} steps, {done} done")
        self.logger.say(f"on {self.engine.description}")
        stacks = self.run_dir.path / "stacks"
        if self.watchdog.dump_to(stacks / f"rank-{self.engine.rank_info.rank:05d}.txt"):
            self.logger.say(f"an earlier start hung: see {stacks}")
        if done and done % self.evaluate_every == 0:
            # An earlier start may have been asked to stop before it evaluated.
            if self.engine.from_main(self.logger.lacks(done, "held_out/loss")):
                self.evaluate(done)
        return done

    def batches_from(self, first_step: int) -> Iterator[tuple[int, list[MicroBatch], float]]:
        """See :func:`stream`. Shards that come from elsewhere are fetched ahead."""
        rank = self.engine.rank_info.rank
        data_step = self.skipped_data.data_step
        prefetcher = Prefetcher(self.data, self.batches, rank, data_step(first_step))
        prefetcher.advance(data_step(first_step))
        batches = stream(
            self.batches,
            rank,
            first_step,
            self.max_steps,
            self.data.workers,
            at=data_step,
            pin_memory=self.engine.device.type == "cuda",
        )
        for step, micro_batches, waited_seconds in batches:
            prefetcher.advance(data_step(step))
            yield step, micro_batches, waited_seconds

    def train_step(
        self, step: int, micro_batches: list[MicroBatch], waited_seconds: float
    ) -> StepResult:
        """Do one step and log it."""
        self._enter_stage(step)
        rate = learning_rate(self.schedule, step, self.max_steps)
        start = time.perf_counter()
        result = self.engine.train_step(step, micro_batches, rate, *self.monitor.limits())
        seconds = time.perf_counter() - start + waited_seconds
        self.monitor.observe(result)
        self.logger.log_step(
            step + 1, result, rate, step_seconds=seconds, data_wait_seconds=waited_seconds
        )
        if result.skipped:
            self.logger.say(
                f"a step was skipped: loss {result.loss:.3g}, gradient norm {result.grad_norm:.3g}"
            )
        self.watchdog.kick()
        return result

    def agree(self, done: int) -> Decision:
        """Have all ranks know what one of them knows: the one exchange after every step.

        Raises:
            UserError: a later start of the run has superseded this one, or ranks that should have
                the same weights do not.
        """
        saving_seconds = self.checkpointer.stall_seconds + self.checkpointer.write_seconds
        decision = self.stopping.agree(
            seconds_needed=2 * (self.throughput.seconds_per_step + saving_seconds)
            + self.evaluation_seconds
            + _MARGIN_SECONDS,
            save_is_due=self.checkpointer.is_due(done, is_scored=done % self.evaluate_every == 0),
            is_written=self.checkpointer.is_written(),
        )
        if self.compare_every is not None:
            saves = decision.save or decision.stop or done == self.max_steps
            if saves or done % self.compare_every == 0:  # what is saved is to be good
                self.publish()
                self.engine.compare_replicas()
        return decision

    def roll_back(self, done: int) -> int:
        """Go back before the bad steps that ended now, and skip their data.

        What is skipped follows from the bad steps alone, wherever the checkpoints are.

        Returns:
            The step that the run goes on from.
        """
        self.publish()
        bad = done - max(1, self.monitor.skipped_in_a_row)
        back, first = self.engine.on_main(lambda: self._skip_data(bad, done))
        if back:
            self._load(back)
        else:
            self.engine.begin_anew(self._new_model())
        self._restart_from(back)
        self.logger.say(f"back to step {back}; the data of steps {first} to {done - 1} is skipped")
        return back

    def evaluate(self, done: int) -> None:
        """Score the held-out split and fill in the prompts, on all ranks together."""
        start = time.perf_counter()
        engine = self.engine
        score = held_out_score(
            engine.model,
            *self.data.held_out_batches(engine.rank_info.world_size),
            rank=engine.rank_info.rank,
            device=engine.device,
            sum_over_ranks=engine.sum_over_ranks,
            after_batch=self.watchdog.kick,
        )
        prompts = self.data.prompts
        words = fill_masks(engine.model, self.data.vocabulary, prompts, self.data.seq_len)
        # Before the metrics: the next start evaluates again what they lack.
        self.checkpointer.score(done, score.loss)
        self.logger.log_evaluation(
            done,
            score,
            list(zip(prompts, words, strict=True)),
            unigram_entropy=self.data.unigram_entropy,
            peak_memory_gib=self._peak_memory_gib(),
        )
        self.evaluation_seconds = time.perf_counter() - start
        self.watchdog.kick()

    def save(self, done: int, *, stops: bool) -> None:
        """Copy the state; it is written while training goes on."""
        self.publish()
        start = time.monotonic()
        self.logger.flush()  # a checkpoint must not know of steps that the metrics have lost
        self.stopping.acknowledge(stop=stops)
        lineage = {}
        if self.engine.rank_info.is_main:
            windows = self.skipped_data.before(done)
            lineage = {**self.run_dir.lineage, "skipped_data": windows}
        recent = self.monitor.history()
        self.checkpointer.save(done, since=start, lineage=lineage, recent=recent)
        self.watchdog.kick()

    def publish(self) -> None:
        """Put the checkpoint that is being written, if there is one, into its place."""
        checkpointer = self.checkpointer
        if checkpointer.publish():
            self.logger.log_checkpoint(
                checkpointer.step, checkpointer.stall_seconds, checkpointer.write_seconds
            )
        self.watchdog.kick()

    def finish(self, done: int) -> None:
        """Publish the last checkpoint, flush the metrics and leave the other ranks."""
        self.publish()
        if done < self.max_steps:
            trained = time.monotonic() - self.trains_since
            reason = self.stopping.reason()
            self.logger.say(stopped_message(reason, trained, done=done, max_steps=self.max_steps))
        self.logger.finish()
        self.watchdog.stop()
        self.engine.leave()

    def _load(self, step: int) -> None:
        """Load a checkpoint, if every node reads what rank 0 has verified.

        Raises:
            UserError: a rank reads other bytes; the message names it and its node.
        """
        path = self.store.path(step)
        # Once a node, as for shards; rank 0 has read all bytes already.
        hashes = self.engine.rank_info.local_rank == 0 and not self.engine.rank_info.is_main
        found = self.engine.from_all((platform.node(), *_read_checkpoint(path, hashes=hashes)))
        for rank, (node, manifest, damage) in enumerate(found):
            if damage or manifest != found[0][1]:
                fault = damage or "its manifest is another than rank 0's"
                raise UserError(
                    f"rank {rank} ({node}) reads another checkpoint {path} than rank 0: {fault}. "
                    "All ranks must see one run directory; if they do, the node's memory or disk "
                    "is faulty: leave it out"
                )
        self.engine.load_state(path)

    def _restart_from(self, done: int) -> None:
        """Take up metrics, their history and the skipped data as they are behind a checkpoint."""
        engine = self.engine
        self.checkpointer.step = done
        engine.on_main(lambda: self.logger.open(done))
        losses, grad_norms = engine.from_main([self._recent(name, done) for name in MONITORED])
        self.monitor.restart(losses, grad_norms)
        windows = engine.on_main(lambda: SkippedData.of(self.run_dir.path).windows)
        known = [(from_step, first, stop) for from_step, first, stop in windows]
        self.skipped_data = SkippedData(self.skipped_data.path, known)

    def _recent(self, name: str, done: int) -> list[float]:
        """The last values of a metric; a checkpoint of earlier releases has them in the metrics."""
        if not self.engine.rank_info.is_main:
            return []
        saved = self.store.recent(name, done) if done else []
        return saved or self.logger.recent(name)

    def _enter_stage(self, step: int) -> None:
        stage = self.batches.stage_at(self.skipped_data.data_step(step))
        if stage is self.stage:
            return
        self.stage = stage
        self.engine.forget_compiled()
        tokens = stage.sequences.seq_len
        self.logger.say(f"from step {step} on: {stage.plan}, of up to {tokens} tokens")
        if self.engine.rank_info.is_main:  # it may read many shards
            unshown = self.data.describe_unshown(tokens)
            if unshown:
                self.logger.say(unshown)

    def _new_model(self) -> MaskedRoberta:
        data = self.data
        model = self.run_dir.config.model
        return build_model(model, data.vocabulary, seq_len=data.seq_len, seed=data.seed)

    def _skip_data(self, bad: int, done: int) -> tuple[int, int]:
        """Skip the data of the bad steps, from ``bad`` up to ``done``, and of the one before.

        Returns:
            The step to go back to, and the first whose data is skipped.
        """
        first = self.skipped_data.first_to_skip(bad)
        earlier = [step for step, _, _ in self.skipped_data.windows if step <= first]
        rollbacks = sum(step > first - _ROLLBACK_STEPS for step in earlier)
        if rollbacks >= _MAX_ROLLBACKS:
            raise UserError(
                f"loss, gradient or weights went bad again about step {first}, the "
                f"{rollbacks + 1}th time within {_ROLLBACK_STEPS} steps and each time on other "
                "data, so the data is not the cause: lower optimizer.learning_rate in a new run "
                "(--run_dir=...), or look for a faulty device with scripts/preflight.py"
            )
        back = self.run_dir.newest(set_aside=True, up_to=first)
        if back == 0 and first < bad and self.run_dir.newest(up_to=bad) == bad:
            # The only checkpoint is from right before the bad steps. It is not thrown away for the
            # step before them, which may have caused them.
            back = first = bad
        # Later ones saw data that is skipped now. They go first: a kill in between must not leave
        # a checkpoint that contradicts the record.
        self.store.remove_after(first)
        self.skipped_data.skip(first, done, self.store)
        return back, first

    def _peak_memory_gib(self) -> float:
        """Most memory held on this rank's device, in GiB."""
        if self.engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return peak_memory_gib()
