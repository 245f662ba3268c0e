"""Only the latest start of a run writes metrics. A failed write is an error."""

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from kantai.checkpoint.store import CheckpointStore
from kantai.errors import UserError
from kantai.storage import json_lines
from kantai.training.metrics import Metrics
from tests.helpers.commands import run_python


def superseding_start(run: Path) -> CheckpointStore:
    store = CheckpointStore(run)
    store.supersede()
    return store


def test_superseded_start_leaves_metrics_alone(tmp_path: Path) -> None:
    """A start that loads its checkpoint slowly opens the metrics late."""
    stale = superseding_start(tmp_path)
    latest = superseding_start(tmp_path)
    metrics = Metrics(tmp_path, latest, 1, 0.0)
    metrics.log(1, {"train/loss": 7.0})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="has been superseded by a later start"):
        Metrics(tmp_path, stale, 1, 0.0)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    metrics.log(2, {"train/loss": 6.0})
    metrics.finish()
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2]


def test_last_values_omit_skipped_steps(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, superseding_start(tmp_path), 1, 0.0)
    for step, (loss, skipped) in enumerate(
        [(7.0, 0.0), (999.0, 1.0), (float("nan"), 1.0), (6.0, 0.0), (5.0, 0.0)], 1
    ):
        metrics.log(step, {"train/loss": loss, "train/skipped": skipped})
    metrics.finish()
    assert metrics.last("train/loss", 2) == [6.0, 5.0]
    assert metrics.last("train/loss", 9) == [7.0, 6.0, 5.0]


@pytest.mark.parametrize("what", ["metrics", "TensorBoard"])
def test_failed_write_ends_program(what: str, tmp_path: Path) -> None:
    code = f"""
import resource
from pathlib import Path
from kantai.checkpoint.store import CheckpointStore
from kantai.training.metrics import Metrics, TensorBoard

run = Path({str(tmp_path)!r})
store = CheckpointStore(run)
store.supersede()
metrics = Metrics(run, store, 1, 0.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for step in range(1, 1000):
    if {what!r} == "metrics":
        metrics.log(step, {{"train/loss": 7.0}})
    else:
        metrics.log_text(step, "fill_mask", "x" * 1000)
"""
    done = run_python(code)
    assert done.returncode == 1 and "File too large" in done.stderr, done


def step_record(step: int, time: float = 1.7e9, **values: float) -> str:
    record = {"step": step, "time": time, "train/loss": 5.0, "train/skipped": 0.0, **values}
    return json.dumps(record) + "\n"


def steps_of(run: Path) -> list[int]:
    """Return the steps of all records; each line must be one."""
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_records_after_checkpoint_and_torn_line_are_dropped(tmp_path: Path) -> None:
    """A checkpoint's own record comes when it is published, behind those of later steps."""
    late = json.dumps({"step": 3, "time": 1.7e9, "checkpoint/stall_seconds": 1.0}) + "\n"
    text = "".join(map(step_record, range(1, 6)))
    for end in (step_record(6)[:-9], step_record(6)[:-1], "\0\0\0\n", "\0" * 5000, ""):
        (tmp_path / "metrics.jsonl").write_text(text + late + end)
        Metrics(tmp_path, superseding_start(tmp_path), 4, 0.0).finish()
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(
            [*map(step_record, range(1, 4)), late]
        )
    Metrics(tmp_path, superseding_start(tmp_path), 1, 0.0).finish()
    assert steps_of(tmp_path) == []


def test_last_whole_record_without_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(step_record(1) + step_record(2)[:-1])
    metrics = Metrics(tmp_path, superseding_start(tmp_path), 3, 0.0)
    metrics.log(3, {"train/loss": 4.0})
    metrics.finish()
    assert steps_of(tmp_path) == [1, 2, 3]


def test_resume_reads_only_end_of_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(step_record(n, **{"speed/useful_seconds": n / 2}) for n in range(1, 20_001))
    (tmp_path / "metrics.jsonl").write_text(text)
    parsed: list[bytes] = []
    parse = json_lines._record
    monkeypatch.setattr(json_lines, "_record", lambda line: parsed.append(line) or parse(line))
    metrics = Metrics(tmp_path, superseding_start(tmp_path), 19_991, 0.0)
    assert metrics.goodput.useful_seconds == 9995.0
    assert len(metrics.last("train/loss", 100)) == 100
    assert metrics.has(19_990, "train/loss") and not metrics.has(19_990, "held_out/loss")
    metrics.finish()
    assert len(parsed) < 200
    assert steps_of(tmp_path) == list(range(1, 19_991))


def test_useful_seconds_of_earlier_releases_are_summed_up(tmp_path: Path) -> None:
    lines = [step_record(n, **{"speed/step_seconds": 2.0}) for n in range(1, 6)]
    skipped = step_record(3, **{"speed/step_seconds": 2.0, "train/skipped": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join([*lines[:2], skipped, *lines[3:]]))
    metrics = Metrics(tmp_path, superseding_start(tmp_path), 5, 0.0)
    assert metrics.goodput.useful_seconds == 6.0  # of steps 1, 2 and 4
    metrics.finish()


def scalars(run: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("train/loss")
    return [(event.step, event.value) for event in events]


def wall_times(run: Path) -> list[float]:
    """Return the wall times of all events, in the order in which TensorBoard reads the files."""
    files = sorted((run / "tensorboard").iterdir())
    return [event.wall_time for path in files for event in EventFileLoader(str(path)).Load()]


def test_earlier_clock_of_later_start_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node's clock may be behind; an NTP client may set a clock back."""
    clock = 1_800_000_000.0
    monkeypatch.setattr(time, "time", lambda: clock)
    loss = 9.0
    starts = ((1, 4, 0.0), (3, 6, -3600.0), (5, 8, 7200.0), (7, 10, -20_000_000.0), (9, 12, 0.0))
    for first, stop, change in starts:
        clock += change
        metrics = Metrics(tmp_path, superseding_start(tmp_path), first, clock)
        for step in range(first, stop):
            clock += 1.0 if step % 2 else -30.0
            loss -= 0.25
            metrics.log(step, {"train/loss": loss})
        metrics.finish()
    assert steps_of(tmp_path) == list(range(1, 12))
    assert [step for step, _ in scalars(tmp_path)] == list(range(1, 12))
    assert scalars(tmp_path)[-1] == (11, loss)
    assert wall_times(tmp_path) == sorted(wall_times(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines]
    assert times == sorted(times)


def test_start_without_records_counts_for_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start ahead of time is killed before its first step; two starts follow in one second."""
    for clock, first in ((1_800_000_000.0, 1), (1_700_000_000.0, 1), (1_700_000_000.0, 2)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        metrics = Metrics(tmp_path, superseding_start(tmp_path), first, clock)
        if clock < 1_800_000_000.0:
            metrics.log(first, {"train/loss": float(first)})
        metrics.finish()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    assert scalars(tmp_path) == [(1, 1.0), (2, 2.0)]
    assert wall_times(tmp_path) == sorted(wall_times(tmp_path))


def test_goodput_is_share_under_earlier_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 1_800_000_000.0
    monkeypatch.setattr(time, "time", lambda: clock)
    for first, change in ((1, 0.0), (2, -3600.0)):
        clock += change
        metrics = Metrics(tmp_path, superseding_start(tmp_path), first, clock)
        clock += 10.0
        metrics.goodput.after_step(5.0)
        share = metrics.goodput.share()
        seconds = metrics.goodput.useful_seconds
        metrics.log(first, {"train/loss": 5.0, "speed/useful_seconds": seconds})
        metrics.finish()
    assert share == pytest.approx(0.5, abs=0.01)  # 10 useful seconds of 20
