"""What a run says of itself: metrics, TensorBoard and the terminal."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from kantai.checkpoint.store import CheckpointStore
from kantai.cluster.environment import allocated_since
from kantai.distributed.engine import StepResult
from kantai.evaluation.held_out import Score
from kantai.output import plain
from kantai.training.loss_monitor import LossMonitor
from kantai.training.metrics import USEFUL_SECONDS, Metrics
from kantai.training.progress import Progress
from kantai.training.throughput import Throughput

Fills = Sequence[tuple[str, Sequence[tuple[str, float]]]]  # prompts, and words with probabilities


class StepMeans:
    """The steps since the last record.

    Attributes:
        steps: their number.
        last_step: counted from 1.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.last_step = 0
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._last: dict[str, float] = {}

    def add(
        self,
        step: int,
        result: StepResult,
        learning_rate: float,
        step_seconds: float,
        data_wait_seconds: float,
    ) -> None:
        """Take note of a step."""
        self.steps += 1
        self.last_step = step
        self._sums["train/loss"] += result.loss
        self._sums["train/accuracy"] += result.accuracy
        self._sums["train/grad_norm"] += result.grad_norm
        self._sums["speed/step_seconds"] += step_seconds
        self._sums["speed/data_wait_seconds"] += data_wait_seconds
        self._last = {
            "train/learning_rate": learning_rate,
            "train/skipped": float(result.skipped),
            "train/loss_scale": result.loss_scale,
        }

    def values(self) -> dict[str, float]:
        """Means; but learning rate and loss scale as they were at the last step."""
        means = {name: value / self.steps for name, value in self._sums.items()}
        perplexity = math.exp(min(means["train/loss"], 700.0))
        return {**means, "train/perplexity": perplexity, **self._last}


class RunLogger:
    """Writes metrics and progress on rank 0, and nothing on other ranks.

    Attributes:
        throughput: known on all ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        store: CheckpointStore,
        throughput: Throughput,
        *,
        done: int,
        max_steps: int,
        log_every: int,
        is_main: bool,
    ) -> None:
        """Show where the run is: ``done`` steps are done already.

        Args:
            log_every: steps between records of metrics.
        """
        self.throughput = throughput
        self._log_every = log_every
        self._means = StepMeans()
        self._run_dir = run_dir
        self._store = store
        self._progress = Progress(done, max_steps, show=is_main)
        self._metrics: Metrics | None = None

    def open(self, done: int) -> None:
        """Open the metrics behind step ``done``; for rank 0."""
        if self._metrics is not None:
            self._metrics.finish()
        self._means = StepMeans()
        self._metrics = Metrics(self._run_dir, self._store, done + 1, allocated_since())

    def recent(self, name: str) -> list[float]:
        """The last values of a metric that a loss monitor remembers; none on other ranks."""
        if self._metrics is None:
            return []
        return self._metrics.last(name, LossMonitor.HISTORY)

    def lacks(self, step: int, name: str) -> bool:
        """Whether a metric of a step is missing; never so on other ranks."""
        return self._metrics is not None and not self._metrics.has(step, name)

    def log_step(
        self,
        step: int,
        result: StepResult,
        learning_rate: float,
        *,
        step_seconds: float,
        data_wait_seconds: float,
    ) -> None:
        """Log a step, counted from 1; ``step_seconds`` includes the wait for data."""
        throughput = self.throughput
        throughput.observe(step_seconds, result.tokens, result.flops)
        if self._metrics is not None:
            self._metrics.goodput.after_step(0.0 if result.skipped else step_seconds)
            if result.skipped:  # it has a record of its own
                self._log_means()
            self._means.add(step, result, learning_rate, step_seconds, data_wait_seconds)
            if result.skipped or step % self._log_every == 0:
                self._log_means()
        self._progress.show_step(
            step, result.loss, throughput.tokens_per_second, throughput.seconds_per_step
        )

    def _log_means(self) -> None:
        """Log the steps that have no record yet, as one."""
        means = self._means
        self._means = StepMeans()
        if self._metrics is None or not means.steps or self._store.is_superseded():
            return
        goodput = self._metrics.goodput
        speed = {
            "speed/tokens_per_second": self.throughput.tokens_per_second,
            "speed/mfu": self.throughput.mfu,
            "speed/goodput": goodput.share(),
            USEFUL_SECONDS: goodput.useful_seconds,
        }
        self._metrics.log(means.last_step, {**means.values(), **speed})

    def log_evaluation(
        self,
        step: int,
        score: Score,
        fills: Fills,
        *,
        unigram_entropy: float,
        peak_memory_gib: float,
    ) -> None:
        """Log a score of the held-out split, and the words that fill the prompts' masks."""
        self.say(
            f"step {step}: held-out loss {score.loss:.3f} (unigram entropy {unigram_entropy:.3f}), "
            f"accuracy {score.accuracy:.1%}, perplexity {score.perplexity:,.1f}"
        )
        if self._metrics is None or self._store.is_superseded():
            return
        self._metrics.log(
            step,
            {
                "held_out/loss": score.loss,
                "held_out/accuracy": score.accuracy,
                "held_out/perplexity": score.perplexity,
                "held_out/unigram_entropy": unigram_entropy,
                "memory/peak_gib": peak_memory_gib,
            },
        )
        lines = [f"{prompt}: {', '.join(word for word, _ in words)}" for prompt, words in fills]
        # A corpus may hold HTML and Markdown, whose images TensorBoard would load: as code, they
        # are text.
        markdown = "\n".join(f"    {plain(' '.join(line.split()))}" for line in lines)
        self._metrics.log_text(step, "fill_mask", markdown)

    def log_checkpoint(self, step: int, stall_seconds: float, write_seconds: float) -> None:
        """Log what a checkpoint cost: time that training stood still, and time to write it."""
        if self._metrics is not None:
            costs = {
                "checkpoint/stall_seconds": stall_seconds,
                "checkpoint/write_seconds": write_seconds,
            }
            self._metrics.log(step, costs)

    def say(self, text: str) -> None:
        """Print a line."""
        self._progress.say(text)

    def flush(self) -> None:
        """Have on the disk what is known of the steps so far."""
        self._log_means()
        if self._metrics is not None:
            self._metrics.flush()

    def finish(self) -> None:
        """Flush, and log no more."""
        self._log_means()
        self._progress.finish()
        if self._metrics is not None:
            self._metrics.finish()
