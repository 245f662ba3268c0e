"""Tests of training runs with real launchers, real gloo ranks and real kills.

The fixtures ``one_process_runs`` and ``two_rank_runs`` do all runs that end normally, several in
one launch. A run that is killed, hangs or is refused has a launch of its own.
"""

import contextlib
import functools
import http.server
import json
import platform
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from kantai.checkpoint.store import CheckpointStore
from kantai.storage.atomic import verify
from tests.helpers.commands import (
    TINY,
    Program,
    job,
    launch_command,
    pretrain,
    pretrain_command,
    run_jobs,
    run_program,
    wait_until,
)
from tests.helpers.files import file_contents
from tests.helpers.runs import assert_same_run, metrics

pytestmark = pytest.mark.slow

STEPS = 6
NO_DROPOUT = ["--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0"]
STAGED = [*NO_DROPOUT, "--stages=[{until_step: 3, seq_len: 16}]", "--model.num_hidden_layers=1"]
PACKINGS = ("isolated", "contiguous")


@dataclass(frozen=True)
class FinishedRuns:
    """Runs of one launch by name, with the output of each and the files it requested by HTTP."""

    folder: Path
    printed: dict[str, str]
    asked: dict[str, list[str]]

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


def do_runs(
    launcher: str | None,
    folder: Path,
    jobs: list[dict[str, Any]],
    asked: dict[str, list[str]] | None = None,
) -> FinishedRuns:
    names = [Path(each["run_dir"]).name for each in jobs]
    return FinishedRuns(
        folder, dict(zip(names, run_jobs(launcher, 2, folder, jobs), strict=True)), asked or {}
    )


@pytest.fixture(scope="module")
def data_arguments(shards_dir: Path, tokenizer_dir: Path) -> list[str]:
    return [
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        f"--training.max_steps={STEPS}",
        "--checkpoint.every_steps=2",
    ]


@pytest.fixture(scope="module")
def run_arguments(data_arguments: list[str]) -> list[str]:
    return ["--config=configs/quickstart.yaml", *TINY, *data_arguments]


@pytest.fixture(scope="module")
def arguments_by_packing(run_arguments: list[str], many_shards_dir: Path) -> dict[str, list[str]]:
    """Return arguments for many shards and a shuffle window of four, by packing."""
    settings = [
        *run_arguments,
        *NO_DROPOUT,
        "--masking.unit=word",
        "--data.shuffle_window=4",
        f"--data.shards={many_shards_dir}",
    ]
    return {packing: [*settings, f"--data.packing={packing}"] for packing in PACKINGS}


@pytest.fixture(scope="module")
def one_process_runs(
    run_arguments: list[str],
    arguments_by_packing: dict[str, list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> FinishedRuns:
    """Do runs of one process without a launcher."""
    folder = tmp_path_factory.mktemp("alone")
    reference = folder / "reference"
    whole = [*run_arguments, *NO_DROPOUT, "--batch.micro_batch_size=10", "--checkpoint.keep=9"]
    return do_runs(
        None,
        folder,
        [
            job(reference, *whole),
            job(folder / "workers", *whole, "--data.workers=3"),
            job(folder / "finished", *whole, source=reference, until=STEPS),
            job(folder / "damaged", *whole, source=reference, until=STEPS, damaged=STEPS),
            job(folder / "staged", *run_arguments, *STAGED),
            *(
                job(folder / packing, *settings)
                for packing, settings in arguments_by_packing.items()
            ),
        ],
    )


@pytest.fixture(scope="module")
def flipped_run(
    run_arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Do a run of three ranks where a bit flips in the weights of the last rank."""
    folder = tmp_path_factory.mktemp("flipped") / "flipped"
    arguments = [*run_arguments, "--failures.compare_replicas_every=100", f"--run_dir={folder}"]
    return folder, run_program(
        launch_command("cpu", 3, "tests/helpers/faults.py", "flipped_bit", "pretrain", *arguments)
    )


@pytest.fixture(scope="module")
def two_rank_runs(
    run_arguments: list[str],
    arguments_by_packing: dict[str, list[str]],
    flipped_run: tuple[Path, object],
    many_shards_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> FinishedRuns:
    """Do runs of two ranks."""
    folder = tmp_path_factory.mktemp("together")
    asked = {packing: list[str]() for packing in PACKINGS}
    bad = [*run_arguments, "--training.max_steps=12", "--checkpoint.keep=9"]
    shutil.copytree(flipped_run[0], folder / "flipped")
    with contextlib.ExitStack() as servers:
        urls = {
            packing: servers.enter_context(serve_folder(many_shards_dir, asked[packing]))
            for packing in arguments_by_packing
        }
        remote = {
            packing: [
                *settings,
                f"--data.shards={urls[packing]}",
                f"--data.cache_dir={folder / f'cache-{packing}'}",
                "--data.workers=2",
            ]
            for packing, settings in arguments_by_packing.items()
        }
        jobs = [
            job(folder / "straight", *run_arguments),
            job(folder / "flipped", *run_arguments, "--failures.compare_replicas_every=100"),
            job(folder / "bad", *bad, nan_calls=[5, 6, 7, 9, 10, 11]),
            job(folder / "replayed", *bad, source=folder / "bad", until=2),
            job(folder / "one_rank", *run_arguments, fault="bad_gradient"),
            job(folder / "stopped", *run_arguments, fault="bad_gradient_and_stop", code=75),
            job(
                folder / "exploded",
                *run_arguments,
                "--training.max_steps=106",
                "--checkpoint.every_steps=50",
                fault="exploding_loss",
            ),
            *(job(folder / packing, *settings) for packing, settings in remote.items()),
        ]
        return do_runs("cpu", folder, jobs, asked)


@contextlib.contextmanager
def serve_folder(folder: Path, asked: list[str]) -> Iterator[str]:
    """Serve a folder by HTTP on this machine; append each requested file name to ``asked``."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path.removeprefix("/"))
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_compiled_run_matches_and_has_static_shapes(
    one_process_runs: FinishedRuns, data_arguments: list[str], tmp_path: Path
) -> None:
    """PyTorch compiles slower code for varying sizes when it sees a second size."""
    command = pretrain_command(
        None, *data_arguments, *STAGED, "--training.compile=true", f"--run_dir={tmp_path / 'run'}"
    )
    done = run_program(command, code=0, TORCH_LOGS="dynamic")
    assert_same_run(tmp_path / "run", one_process_runs["staged"], norm=1e-4)
    assert "create_env" in done.stderr  # logged for each compiled graph
    assert "create_symbol" not in done.stderr  # logged for each varying size


def test_killed_run_resumes_to_the_same_bits(
    two_rank_runs: FinishedRuns, run_arguments: list[str], data_arguments: list[str], tmp_path: Path
) -> None:
    """SIGKILL ends a launcher and its two ranks at three moments, one of them within a save.

    The run has dropout.
    """
    straight = two_rank_runs["straight"]
    killed = tmp_path / "killed"
    checkpoints = killed / "checkpoints"
    plain = pretrain_command("cpu", *data_arguments, f"--run_dir={killed}")
    in_a_save = launch_command(
        "cpu",
        2,
        "tests/helpers/faults.py",
        "endless_save",
        "pretrain",
        *run_arguments,
        f"--run_dir={killed}",
    )
    moments = [
        (plain, (killed / "metrics.jsonl").exists),  # before the first checkpoint
        (in_a_save, lambda: any(checkpoints.glob(".attempt-*/step-*/state-*"))),
        (plain, (checkpoints / "step-00000004").exists),  # just after a checkpoint
    ]
    start = time.time()
    for command, moment in moments:
        program = Program(command)
        wait_until(moment, program, poll_seconds=0.001)
        program.kill_all()
    pretrain("cpu", *data_arguments, f"--run_dir={killed}")

    for name in ("train/loss", "train/grad_norm", "held_out/loss"):
        assert metrics(killed, name) == metrics(straight, name)
    straight_checkpoint = CheckpointStore(straight).path(STEPS)
    killed_checkpoint = CheckpointStore(killed).path(STEPS)
    assert verify(straight_checkpoint)["files"] == verify(killed_checkpoint)["files"]
    assert len(CheckpointStore(killed).steps()) == 3

    allocated = sum(metrics(killed, "speed/step_seconds")) / metrics(killed, "speed/goodput")[-1]
    starts = [json.loads(line) for line in (killed / "starts.jsonl").read_text().splitlines()]
    before_each = [start["seconds_before"] for start in starts]
    assert before_each == sorted(before_each)
    assert 0 < before_each[-1] < allocated < time.time() - start
    assert not list(checkpoints.glob(".attempt-*/*"))


@contextlib.contextmanager
def endless_run(
    launcher: str | None, run: Path, *arguments: str, **environment: str
) -> Iterator[Program]:
    """Yield a run of 100,000 steps that has done its first step; kill it afterwards."""
    long = [
        "--training.max_steps=100000",
        "--checkpoint.every_steps=100000",
        "--evaluation.every_steps=100000",
    ]
    record = run / "metrics.jsonl"
    program = Program(
        pretrain_command(launcher, *arguments, *long, f"--run_dir={run}"), **environment
    )
    try:
        wait_until(lambda: record.exists() and record.stat().st_size > 0, program)
        yield program
    finally:
        program.kill_all()


def test_sigterm_to_launcher_saves_the_run(data_arguments: list[str], tmp_path: Path) -> None:
    """The launcher passes SIGTERM to all processes of a rank, including its loader processes."""
    run = tmp_path / "run"
    with endless_run("cpu", run, *data_arguments, "--data.workers=2") as program:
        program.terminate()
        assert program.wait_for_end() != 0
    (saved,) = CheckpointStore(run).steps()
    assert re.search(
        rf"asked to stop \(SIGTERM came\) after \d+ s of training: saved step {saved}", program.out
    )
    assert len(metrics(run, "train/loss")) == saved


def assert_stopped(program: Program, run: Path) -> None:
    """Fail unless the run has saved its last step and exited with code 75."""
    assert program.wait_for_end() == 75
    saved = CheckpointStore(run).steps()[-1]
    assert f"saved step {saved} of 100000; the same command goes on" in program.out
    assert len(metrics(run, "train/loss")) == saved
    assert not {"SAVE", "STOP"} & {path.name for path in run.iterdir()}


@pytest.mark.parametrize("how", ["file", "end of the job"])
def test_stop_request_saves_and_exits_with_75(
    how: str, data_arguments: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # The run stops 30 seconds before the job's end, or at its first step if that is later.
    environment = (
        {"SLURM_JOB_END_TIME": str(int(time.time()) + 40)} if how == "end of the job" else {}
    )
    with endless_run(None, run, *data_arguments, **environment) as program:
        if how == "file":
            (run / "SAVE").touch()
            wait_until(lambda: CheckpointStore(run).steps(), program)
            assert program.poll() is None
            (run / "STOP").touch()
        assert_stopped(program, run)


def test_superseded_run_ends_without_a_checkpoint(
    data_arguments: list[str], tmp_path: Path
) -> None:
    """Two starts of one run overlap, as after a network failure; a signal stops the later one."""
    run = tmp_path / "run"
    with (
        endless_run(None, run, *data_arguments) as first,
        endless_run(None, run, *data_arguments) as second,
    ):
        assert first.wait_for_end() == 2
        assert "has been superseded by a later start of the run: this one ends" in first.err
        second.send_signal(signal.SIGUSR1)
        assert_stopped(second, run)
    assert len(CheckpointStore(run).steps()) == 1


def ranks_of(program: Program) -> list[psutil.Process]:
    found = [
        each
        for each in psutil.Process(program.pid).children(recursive=True)
        if "scripts/pretrain.py" in each.cmdline()
    ]
    return sorted(found, key=lambda rank: int(rank.environ()["RANK"]))


def is_pending(process: psutil.Process, number: signal.Signals) -> bool:
    """Return whether a sent signal has not yet reached a thread of the process."""
    masks = re.findall(
        r"^S(?:ig|hd)Pnd:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE
    )
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_second_signal_ends_waiting_rank_at_once(data_arguments: list[str], tmp_path: Path) -> None:
    """The rank waits for another rank that hangs, so that the first signal has no effect."""
    run = tmp_path / "run"
    with endless_run("cpu", run, *data_arguments) as program:
        first, other = ranks_of(program)
        (run / "SAVE").touch()
        wait_until(lambda: CheckpointStore(run).steps(), program)
        other.suspend()
        first.send_signal(signal.SIGINT)
        wait_until(lambda: not is_pending(first, signal.SIGINT))
        with pytest.raises(psutil.TimeoutExpired):
            first.wait(3)
        first.send_signal(signal.SIGINT)
        wait_until(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE)
        other.kill()
        program.wait_for_end()
    assert "asked to stop again: ending at once" in program.err
    (saved,) = CheckpointStore(run).steps()
    verify(CheckpointStore(run).path(saved))


def test_dead_rank_ends_all_ranks(data_arguments: list[str], tmp_path: Path) -> None:
    with endless_run("cpu", tmp_path / "run", *data_arguments) as program:
        ranks = ranks_of(program)
        ranks[-1].kill()
        assert program.wait_for_end() != 0
    said = program.out + program.err
    assert "Signal 9" in said and "Connection closed" not in said
    # The launcher kills forcefully what does not end within 30 seconds.
    assert "forcefully" not in said
    assert not any(rank.is_running() for rank in ranks)


def test_hanging_rank_ends_run_with_stacks_of_all_ranks(
    run_arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # 30 seconds cover the time that one rank waits for the other at the start on a busy machine.
    arguments = [*run_arguments, "--failures.hang_seconds=30", f"--run_dir={folder}"]
    assert (
        run_program(
            launch_command(
                "cpu", 2, "tests/helpers/faults.py", "hanging_rank", "pretrain", *arguments
            )
        ).returncode
        != 0
    )
    stacks = [(folder / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "in sum_over_ranks" in stacks[0] and "in hanging" in stacks[1], stacks


def test_rolled_back_run_replays_to_the_same_bits(
    two_rank_runs: FinishedRuns,
) -> None:
    """One of two ranks has three NaNs in a row, twice. The run rolls back and skips their data.

    A second run that starts with the record of skipped data gives the same bits without the NaNs.
    """
    assert (
        two_rank_runs.printed["bad"].count("back to step 4; the data of steps 4 to 7 is skipped")
        == 2
    )
    windows = [
        json.loads(line)
        for line in (two_rank_runs["bad"] / "skipped_data.jsonl").read_text().splitlines()
    ]
    assert windows == [{"from_step": 4, "first": first, "stop": first + 4} for first in (4, 8)]
    assert (
        "12 steps, 2 done" in two_rank_runs.printed["replayed"]
        and "back to" not in two_rank_runs.printed["replayed"]
    )
    files = [
        verify(CheckpointStore(two_rank_runs[name]).path(12))["files"]
        for name in ("bad", "replayed")
    ]
    assert files[0] == files[1]


def test_flipped_bit_in_one_rank_ends_the_run(
    flipped_run: tuple[Path, subprocess.CompletedProcess[str]], two_rank_runs: FinishedRuns
) -> None:
    """The run ends before it saves the flipped bit, and resumes from the checkpoint before it."""
    folder, ended = flipped_run
    assert ended.returncode != 0
    assert f"rank 2 ({platform.node()}) has other weights than the rest" in ended.stderr
    assert CheckpointStore(folder).steps() == [2, 4]
    assert f"{STEPS} steps, 4 done" in two_rank_runs.printed["flipped"]
    assert len(metrics(two_rank_runs["flipped"], "train/loss")) == STEPS


def test_all_ranks_skip_step_bad_on_one_rank(two_rank_runs: FinishedRuns) -> None:
    assert metrics(two_rank_runs["one_rank"], "train/skipped") == [0, 0, 0, 1, 0, 0]
    assert CheckpointStore(two_rank_runs["one_rank"]).steps() == [2, 6]


def test_exploding_loss_is_skipped(two_rank_runs: FinishedRuns) -> None:
    assert metrics(two_rank_runs["exploded"], "train/skipped") == [*[0] * 103, 1, 0, 0]


def test_run_stops_after_bad_steps_not_within_them(two_rank_runs: FinishedRuns) -> None:
    """A resume within bad steps would not know run_arguments many the run has skipped in a row."""
    assert f"saved step 5 of {STEPS}" in two_rank_runs.printed["stopped"]
    assert metrics(two_rank_runs["stopped"], "train/skipped") == [0, 0, 0, 1, 0]
    assert CheckpointStore(two_rank_runs["stopped"]).steps() == [2, 5]
    assert not (two_rank_runs["stopped"] / "STOP").exists()


def test_run_with_only_damaged_checkpoints_is_refused(
    one_process_runs: FinishedRuns, data_arguments: list[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(one_process_runs["reference"], tmp_path / "run")
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = run_program(pretrain_command(None, *data_arguments, *NO_DROPOUT, f"--run_dir={folder}"))
    assert done.returncode == 2 and "all of the 3 checkpoints" in done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_full_disk_ends_run_and_keeps_checkpoints(
    data_arguments: list[str], tmp_path: Path
) -> None:
    """A disk of 3 MB holds four checkpoints.

    A second run has a file-size limit, which free space does not show, as a quota: a file breaks
    off half-way.
    """
    disk = tmp_path / "disk"
    kept = tmp_path / "kept"
    disk.mkdir()
    mine = pretrain_command(
        None,
        *data_arguments,
        "--checkpoint.every_steps=1",
        "--checkpoint.keep=9",
        f"--run_dir={disk / 'run'}",
    )
    mount = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=3m disk $0 && { "$@"; code=$?; cp -r $0 $KEPT; exit $code; }',
    ]
    full = run_program([*mount, disk, *mine], KEPT=str(kept))
    assert full.returncode == 2, full.stderr
    assert re.search(
        r"^error: .* GB free and a checkpoint takes 0\.0: free .* GB more, "
        r"or lower checkpoint.keep",
        full.stderr,
    )
    store = CheckpointStore(kept / "run")
    assert store.steps() == [1, 2, 3, 4]
    assert store.newest_valid() is not None

    folder = tmp_path / "run"
    limited = run_program(
        [
            "prlimit",
            "--fsize=300000",
            *pretrain_command(None, *data_arguments, f"--run_dir={folder}"),
        ]
    )
    assert limited.returncode == 2, limited.stderr
    assert (
        "checkpoint 2 could not be written by rank 0" in limited.stderr
        and "the one before is good" in limited.stderr
    )
    assert CheckpointStore(folder).steps() == []


def test_finished_run_is_left_unchanged(one_process_runs: FinishedRuns) -> None:
    assert f"{STEPS} of {STEPS} steps done" in one_process_runs.printed["finished"]
    assert file_contents(one_process_runs["finished"]) == file_contents(
        one_process_runs["reference"]
    )


def test_run_falls_back_from_damaged_checkpoint(one_process_runs: FinishedRuns) -> None:
    assert f"checkpoint {STEPS} is damaged" in one_process_runs.printed["damaged"]
    assert f"{STEPS} steps, 4 done" in one_process_runs.printed["damaged"]
    assert metrics(one_process_runs["damaged"], "train/loss") == metrics(
        one_process_runs["reference"], "train/loss"
    )


def test_loader_processes_do_not_change_the_run(one_process_runs: FinishedRuns) -> None:
    assert_same_run(
        one_process_runs["workers"], one_process_runs["reference"], loss=0, norm=0, weights=0
    )


@pytest.mark.parametrize("packing", PACKINGS)
def test_remote_shards_train_alike_and_are_fetched_once(
    packing: str, one_process_runs: FinishedRuns, two_rank_runs: FinishedRuns
) -> None:
    assert_same_run(two_rank_runs[packing], one_process_runs[packing], norm=1e-4)
    shards = [name for name in two_rank_runs.asked[packing] if name.endswith(".arrow")]
    assert len(shards) == len(set(shards)) > 2


def test_launcher_with_too_few_processes_is_refused(
    data_arguments: list[str], tmp_path: Path
) -> None:
    command = pretrain_command("cpu", *data_arguments, f"--run_dir={tmp_path / 'run'}")
    place = command.index("--config_file")
    command[place : place + 2] = ["--cpu"]  # accelerate launch --cpu --num_processes 2
    done = run_program(command)
    assert done.returncode != 0
    assert "asked for several processes but started one" in done.stderr
    assert not (tmp_path / "run").exists()


def test_backend_other_than_requested_is_refused(data_arguments: list[str], tmp_path: Path) -> None:
    """With ACCELERATE_USE_CPU, Accelerate silently leaves DeepSpeed out."""
    done = run_program(
        pretrain_command("zero1", *data_arguments, f"--run_dir={tmp_path / 'run'}"),
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode != 0
    assert (
        "announced rank 0 of 2 under DEEPSPEED, but Accelerate sees rank 0 of 2 under MULTI_CPU"
        in done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_run_goes_on_when_reader_of_its_output_is_gone(
    run_arguments: list[str], tmp_path: Path
) -> None:
    command = pretrain_command(None, *run_arguments, f"--run_dir={tmp_path / 'run'}")
    run_program(["bash", "-c", f"{shlex.join(map(str, command))} | head -1"])
    assert len(metrics(tmp_path / "run", "train/loss")) == STEPS
    assert CheckpointStore(tmp_path / "run").steps()[-1] == STEPS
