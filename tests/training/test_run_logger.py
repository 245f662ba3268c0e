"""What a run logs: means of every N steps, and text as text, whatever the corpus holds."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kantai.checkpoint.store import CheckpointStore
from kantai.distributed.engine import StepResult
from kantai.evaluation.held_out import Score
from kantai.training.run_logger import RunLogger
from kantai.training.throughput import Throughput

MEANS = ("loss", "accuracy", "grad_norm")


def result(step: int, *, skipped: bool = False) -> StepResult:
    loss = float("nan") if skipped else 10.0 - step / 4
    return StepResult(loss, step / 100, step / 2, 1000, 10**9, skipped, 1.0)


@pytest.fixture
def loggers(tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield a run directory, and a function that makes a logger of it."""
    made: list[RunLogger] = []

    def make(log_every: int, done: int = 0) -> RunLogger:
        store = CheckpointStore(tmp_path)
        store.supersede()
        throughput = Throughput(1e12)
        logger = RunLogger(
            *(tmp_path, store, throughput),
            done=done,
            max_steps=100,
            log_every=log_every,
            is_main=False,
        )
        logger.open(done)
        made.append(logger)
        return logger

    yield tmp_path, make
    for logger in made:
        logger.finish()


def log(logger: RunLogger, *steps: int, skipped: bool = False) -> None:
    for step in steps:
        logger.log_step(
            step,
            result(step, skipped=skipped),
            step / 1000,
            step_seconds=step / 10,
            data_wait_seconds=step / 100,
        )


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_record_has_means_of_steps_since_last(loggers: tuple[Path, Any]) -> None:
    run, make = loggers
    log(make(4), *range(1, 10))
    first, second = records(run)
    assert (first["step"], second["step"]) == (4, 8)
    for record, steps in ((first, range(1, 5)), (second, range(5, 9))):
        for name in MEANS:
            mean = sum(getattr(result(step), name) for step in steps) / 4
            assert record[f"train/{name}"] == pytest.approx(mean), name
        assert record["speed/step_seconds"] == pytest.approx(sum(steps) / 40)
        assert record["train/learning_rate"] == record["step"] / 1000
        assert record["speed/useful_seconds"] == pytest.approx(sum(range(steps[-1] + 1)) / 10)


def test_skipped_step_has_record_of_its_own(loggers: tuple[Path, Any]) -> None:
    run, make = loggers
    logger = make(10)
    log(logger, 1, 2, 3)
    log(logger, 4, skipped=True)
    log(logger, *range(5, 11))
    before, skipped, after = records(run)
    assert [before["step"], skipped["step"], after["step"]] == [3, 4, 10]
    assert before["train/loss"] == result(2).loss and before["train/skipped"] == 0.0
    assert skipped["train/loss"] is None and skipped["train/skipped"] == 1.0
    assert after["train/loss"] == pytest.approx(10 - 7.5 / 4)
    assert after["speed/useful_seconds"] == pytest.approx(5.1)  # without step 4


def test_checkpoint_has_record_of_its_steps(loggers: tuple[Path, Any]) -> None:
    """What a resumed run sums up is right, wherever the checkpoint lies."""
    run, make = loggers
    logger = make(10)
    log(logger, *range(1, 13))
    logger.flush()  # as before a checkpoint
    log(logger, *range(13, 18))
    assert [record["step"] for record in records(run)] == [10, 12]
    resumed = make(10, done=12)
    log(resumed, *range(13, 21))
    assert [record["step"] for record in records(run)] == [10, 12, 20]
    assert records(run)[-1]["train/loss"] == pytest.approx(10 - 16.5 / 4)
    assert records(run)[-1]["speed/useful_seconds"] == pytest.approx(21.0)


def test_every_step_is_logged_as_it_is(loggers: tuple[Path, Any]) -> None:
    run, make = loggers
    log(make(1), 1, 2, 3)
    found = records(run)
    assert [record["train/loss"] for record in found] == [9.75, 9.5, 9.25]
    assert [record["train/perplexity"] for record in found] == [
        pytest.approx(math.exp(result(step).loss)) for step in (1, 2, 3)
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard's own HTML library
def test_tensorboard_shows_filled_prompts_as_text(tmp_path: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    store = CheckpointStore(tmp_path)
    store.supersede()
    throughput = Throughput(1.0)
    logger = RunLogger(tmp_path, store, throughput, done=0, max_steps=1, log_every=1, is_main=False)
    logger.open(0)
    fills = [
        ("![x](http://evil/x.png) <img src='http://evil/y.png'> <mask>", [("<b>", 0.5)]),
        ("\n\n# head\n[a](http://evil/z) \x1b[2J <mask>", [("`code`", 0.5)]),
    ]
    score = Score(1.0, 0.5, 2)
    logger.log_evaluation(1, score, fills, unigram_entropy=2.0, peak_memory_gib=0.0)
    logger.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("fill_mask/text_summary")
    html = markdown_to_safe_html(event.tensor_proto.string_val[0])
    assert "<img" not in html and "<a" not in html and "<h1" not in html and "\x1b" not in html
    assert "![x](http://evil/x.png)" in html
    assert "&lt;mask&gt;: &lt;b&gt;" in html
    assert html.count("&lt;mask&gt;") == 2
