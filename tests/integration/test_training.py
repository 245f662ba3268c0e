"""One run, whatever it runs on and whatever happens to it: real launchers, real gloo ranks, real
kills.

Runs that only have to end are done several in one launch, by the fixtures ``alone`` and
``together``; what is killed, hangs or is refused has its own.
"""

import contextlib
import functools
import http.server
import json
import platform
import re
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
    run_program,
    several,
    wait_until,
)
from tests.helpers.runs import assert_same_run, metrics

pytestmark = pytest.mark.slow

STEPS = 6
NO_DROPOUT = ["--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0"]
STAGED = [*NO_DROPOUT, "--stages=[{until_step: 3, seq_len: 16}]", "--model.num_hidden_layers=1"]
PACKINGS = ("isolated", "contiguous")


@dataclass(frozen=True)
class Done:
    """Runs that were done in one launch, by name; what each printed, and which files it asked a
    server for.
    """

    folder: Path
    printed: dict[str, str]
    asked: dict[str, list[str]]

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


def done(
    launcher: str | None,
    folder: Path,
    jobs: list[dict[str, Any]],
    asked: dict[str, list[str]] | None = None,
) -> Done:
    names = [Path(each["run_dir"]).name for each in jobs]
    return Done(
        folder, dict(zip(names, several(launcher, 2, folder, jobs), strict=True)), asked or {}
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
def how(data_arguments: list[str]) -> list[str]:
    return ["--config=configs/quickstart.yaml", *TINY, *data_arguments]


@pytest.fixture(scope="module")
def by_packing(how: list[str], many_shards_dir: Path) -> dict[str, list[str]]:
    """Settings for many shards, of which a window holds a few."""
    settings = [
        *how,
        *NO_DROPOUT,
        "--masking.unit=word",
        "--data.shuffle_window=4",
        f"--data.shards={many_shards_dir}",
    ]
    return {packing: [*settings, f"--data.packing={packing}"] for packing in PACKINGS}


@pytest.fixture(scope="module")
def alone(
    how: list[str], by_packing: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Done:
    """Runs of one process, without a launcher."""
    folder = tmp_path_factory.mktemp("alone")
    whole, reference = (
        [*how, *NO_DROPOUT, "--batch.micro_batch_size=10", "--checkpoint.keep=9"],
        folder / "reference",
    )
    return done(
        None,
        folder,
        [
            job(reference, *whole),
            job(folder / "workers", *whole, "--data.workers=3"),
            job(folder / "finished", *whole, source=reference, until=STEPS),
            job(folder / "damaged", *whole, source=reference, until=STEPS, damaged=STEPS),
            job(folder / "staged", *how, *STAGED),
            *(job(folder / packing, *settings) for packing, settings in by_packing.items()),
        ],
    )


@pytest.fixture(scope="module")
def flipped(
    how: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of three ranks, in the weights of one of which a bit changes."""
    folder = tmp_path_factory.mktemp("flipped") / "flipped"
    arguments = [*how, "--failures.compare_replicas_every=100", f"--run_dir={folder}"]
    return folder, run_program(
        launch_command("cpu", 3, "tests/helpers/faults.py", "flipped_bit", "pretrain", *arguments)
    )


@pytest.fixture(scope="module")
def together(
    how: list[str],
    by_packing: dict[str, list[str]],
    flipped: tuple[Path, object],
    many_shards_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Done:
    """Runs of two ranks."""
    folder, asked = (
        tmp_path_factory.mktemp("together"),
        {packing: list[str]() for packing in PACKINGS},
    )
    bad = [*how, "--training.max_steps=12", "--checkpoint.keep=9"]
    shutil.copytree(flipped[0], folder / "flipped")
    with contextlib.ExitStack() as servers:
        remote = {
            packing: [
                *settings,
                f"--data.shards={servers.enter_context(served(many_shards_dir, asked[packing]))}",
                f"--data.cache_dir={folder / f'cache-{packing}'}",
                "--data.workers=2",
            ]
            for packing, settings in by_packing.items()
        }
        jobs = [
            job(folder / "straight", *how),
            job(folder / "flipped", *how, "--failures.compare_replicas_every=100"),
            job(folder / "bad", *bad, poisoned=[5, 6, 7, 9, 10, 11]),
            job(folder / "replayed", *bad, source=folder / "bad", until=2),
            job(folder / "one_rank", *how, fault="bad_gradient"),
            job(folder / "stopped", *how, fault="bad_gradient_and_stop", code=75),
            job(
                folder / "exploded",
                *how,
                "--training.max_steps=106",
                "--checkpoint.every_steps=50",
                fault="exploding_loss",
            ),
            *(job(folder / packing, *settings) for packing, settings in remote.items()),
        ]
        return done("cpu", folder, jobs, asked)


@contextlib.contextmanager
def served(folder: Path, asked: list[str]) -> Iterator[str]:
    """A folder behind a URL of this machine; the names of the files that are asked for are noted."""

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


def test_compiled_a_run_is_the_same_and_each_stage_has_code_for_its_own_sizes(
    alone: Done, data_arguments: list[str], tmp_path: Path
) -> None:
    """Code for sizes that vary would be slower; PyTorch makes it when it sees a second size."""
    command = pretrain_command(
        None, *data_arguments, *STAGED, "--training.compile=true", f"--run_dir={tmp_path / 'run'}"
    )
    done = run_program(command, code=0, TORCH_LOGS="dynamic")
    assert_same_run(tmp_path / "run", alone["staged"], norm=1e-4)
    assert "create_env" in done.stderr  # of each piece of code
    assert "create_symbol" not in done.stderr  # of each size that may vary


def test_killed_anywhere_and_started_again_is_the_same_to_the_last_bit(
    together: Done, how: list[str], data_arguments: list[str], tmp_path: Path
) -> None:
    """With dropout, two ranks, SIGKILL of launcher and ranks at several moments, in a save among
    them.
    """
    straight, killed = together["straight"], tmp_path / "killed"
    checkpoints = killed / "checkpoints"
    plain = pretrain_command("cpu", *data_arguments, f"--run_dir={killed}")
    in_a_save = launch_command(
        "cpu", 2, "tests/helpers/faults.py", "endless_save", "pretrain", *how, f"--run_dir={killed}"
    )
    moments = [
        (plain, (killed / "metrics.jsonl").exists),  # before the first checkpoint
        (in_a_save, lambda: any(checkpoints.glob(".attempt-*/step-*/state-*"))),
        (plain, (checkpoints / "step-00000004").exists),  # just after one
    ]
    start = time.time()
    for command, moment in moments:
        program = Program(command)
        wait_until(moment, program, poll_seconds=0.001)
        program.kill_all()
    pretrain("cpu", *data_arguments, f"--run_dir={killed}")
    for name in ("train/loss", "train/grad_norm", "held_out/loss"):
        assert metrics(killed, name) == metrics(straight, name)
    before, after = CheckpointStore(straight).path(STEPS), CheckpointStore(killed).path(STEPS)
    assert verify(before)["files"] == verify(after)["files"]
    assert len(CheckpointStore(killed).steps()) == 3
    allocated = sum(metrics(killed, "speed/step_seconds")) / metrics(killed, "speed/goodput")[-1]
    starts = [json.loads(line) for line in (killed / "starts.jsonl").read_text().splitlines()]
    before_each = [start["seconds_before"] for start in starts]
    assert before_each == sorted(before_each)
    assert 0 < before_each[-1] < allocated < time.time() - start
    assert not list(checkpoints.glob(".attempt-*/*"))


@contextlib.contextmanager
def endless(
    launcher: str | None, run: Path, *arguments: str, **environment: str
) -> Iterator[Program]:
    """A run without an end that has done its first step."""
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


def test_sigterm_to_the_launcher_saves_and_the_run_goes_on(
    data_arguments: list[str], tmp_path: Path
) -> None:
    """The launcher sends it to every process of a rank, to those that load its data, too."""
    run = tmp_path / "run"
    with endless("cpu", run, *data_arguments, "--data.workers=2") as program:
        program.terminate()
        program.ended()
    (saved,) = CheckpointStore(run).steps()
    assert f"asked to stop (SIGTERM came): saved step {saved}" in program.out
    assert len(metrics(run, "train/loss")) == saved


def assert_stopped(program: Program, run: Path) -> None:
    """It has saved, and says so by its exit code."""
    assert program.ended() == 75
    saved = CheckpointStore(run).steps()[-1]
    assert f"saved step {saved} of 100000; the same command goes on" in program.out
    assert len(metrics(run, "train/loss")) == saved
    assert not {"SAVE", "STOP"} & {path.name for path in run.iterdir()}


@pytest.mark.parametrize("how", ["file", "end of the job"])
def test_a_run_that_is_asked_to_stop_saves_and_says_so_by_its_exit_code(
    how: str, data_arguments: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # It stops half a minute before, or at its first step if that comes later.
    environment = (
        {"SLURM_JOB_END_TIME": str(int(time.time()) + 40)} if how == "end of the job" else {}
    )
    with endless(None, run, *data_arguments, **environment) as program:
        if how == "file":
            (run / "SAVE").touch()
            wait_until(lambda: CheckpointStore(run).steps(), program)
            assert program.poll() is None
            (run / "STOP").touch()
        assert_stopped(program, run)


def test_a_run_that_was_taken_over_writes_nothing_more(
    data_arguments: list[str], tmp_path: Path
) -> None:
    """Two starts of one run at once, as after a node was cut off; the later one stops at a signal."""
    run = tmp_path / "run"
    with (
        endless(None, run, *data_arguments) as first,
        endless(None, run, *data_arguments) as second,
    ):
        assert first.ended() == 2
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
    """Whether a signal has been sent and has not reached any of a process's threads."""
    masks = re.findall(
        r"^S(?:ig|hd)Pnd:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE
    )
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_a_second_signal_ends_at_once_and_harms_nothing(
    data_arguments: list[str], tmp_path: Path
) -> None:
    """Also while the rank waits for another one that hangs: then the first can do nothing."""
    run = tmp_path / "run"
    with endless("cpu", run, *data_arguments) as program:
        first, other = ranks_of(program)
        other.suspend()
        first.send_signal(signal.SIGINT)
        wait_until(lambda: not is_pending(first, signal.SIGINT))
        with pytest.raises(psutil.TimeoutExpired):
            first.wait(3)
        first.send_signal(signal.SIGINT)
        wait_until(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE)
        other.kill()
        program.ended()
    assert "asked to stop again: ending at once" in program.err
    for step in CheckpointStore(run).steps():
        verify(CheckpointStore(run).path(step))


def test_a_rank_that_dies_ends_all(data_arguments: list[str], tmp_path: Path) -> None:
    with endless("cpu", tmp_path / "run", *data_arguments) as program:
        ranks = ranks_of(program)
        ranks[-1].kill()
        assert program.ended() != 0
    said = program.out + program.err
    assert "Signal 9" in said and "Connection closed" not in said
    assert (
        "forcefully" not in said
    )  # as the launcher does with those that do not end within half a minute
    assert not any(rank.is_running() for rank in ranks)


def test_a_rank_that_hangs_ends_all_and_every_rank_says_where_it_was(
    how: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # Long enough for a rank to wait for the other at the start, on a machine with much else to do.
    arguments = [*how, "--failures.hang_seconds=30", f"--run_dir={folder}"]
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


def test_bad_numbers_are_skipped_rolled_back_and_passed_over_in_a_way_that_replays(
    together: Done,
) -> None:
    """Three NaNs in a row on one of two ranks, then the same again; a run that knows what to skip
    has the same bits without them.
    """
    assert together.printed["bad"].count("back to step 4; the data of steps 4 to 7 is skipped") == 2
    windows = [
        json.loads(line)
        for line in (together["bad"] / "skipped_data.jsonl").read_text().splitlines()
    ]
    assert windows == [{"from_step": 4, "first": first, "stop": first + 4} for first in (4, 8)]
    assert (
        "12 steps, 2 done" in together.printed["replayed"]
        and "back to" not in together.printed["replayed"]
    )
    files = [
        verify(CheckpointStore(together[name]).path(12))["files"] for name in ("bad", "replayed")
    ]
    assert files[0] == files[1]


def test_a_bit_that_changes_in_one_ranks_weights_is_noticed(
    flipped: tuple[Path, subprocess.CompletedProcess[str]], together: Done
) -> None:
    """Before the checkpoint in which it would have been; the run goes on from the one before."""
    folder, ended = flipped
    assert ended.returncode != 0
    assert f"rank 2 ({platform.node()}) has other weights than the rest" in ended.stderr
    assert CheckpointStore(folder).steps() == [2, 4]
    assert f"{STEPS} steps, 4 done" in together.printed["flipped"]
    assert len(metrics(together["flipped"], "train/loss")) == STEPS


def test_what_one_rank_alone_finds_bad_all_skip(together: Done) -> None:
    assert metrics(together["one_rank"], "train/skipped") == [0, 0, 0, 1, 0, 0]
    assert CheckpointStore(together["one_rank"]).steps() == [2, 6]


def test_a_loss_that_explodes_is_skipped(together: Done) -> None:
    assert metrics(together["exploded"], "train/skipped") == [*[0] * 103, 1, 0, 0]


def test_a_run_stops_and_saves_behind_bad_numbers_and_not_within_them(together: Done) -> None:
    """Else it would go on without knowing how many had been skipped."""
    assert f"saved step 5 of {STEPS}" in together.printed["stopped"]
    assert metrics(together["stopped"], "train/skipped") == [0, 0, 0, 1, 0]
    assert CheckpointStore(together["stopped"]).steps() == [2, 5]
    assert not (together["stopped"] / "STOP").exists()


def test_all_checkpoints_damaged_is_an_error_and_not_a_new_beginning(
    alone: Done, data_arguments: list[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(alone["reference"], tmp_path / "run")
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = run_program(pretrain_command(None, *data_arguments, *NO_DROPOUT, f"--run_dir={folder}"))
    assert done.returncode == 2 and "all of the 3 checkpoints" in done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_full_disk_ends_a_run_and_leaves_what_was_saved(
    data_arguments: list[str], tmp_path: Path
) -> None:
    """Of 3 MB there is room for four checkpoints. And a limit that no look at the free space shows,
    as a quota is: one file ends half-way.
    """
    disk, kept = tmp_path / "disk", tmp_path / "kept"
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
        r"^error: .* GB free and a checkpoint takes 0\.0: free .* GB more, or lower checkpoint.keep",
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


def test_a_finished_run_is_left_as_it_is(alone: Done) -> None:
    assert f"{STEPS} of {STEPS} steps done" in alone.printed["finished"]
    finished, reference = ({path.relative_to(each): path.read_bytes() for path in each.rglob("*") if path.is_file()} for each in (alone["finished"], alone["reference"]))  # fmt: skip
    assert finished == reference


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(alone: Done) -> None:
    assert f"checkpoint {STEPS} is damaged" in alone.printed["damaged"]
    assert f"{STEPS} steps, 4 done" in alone.printed["damaged"]
    assert metrics(alone["damaged"], "train/loss") == metrics(alone["reference"], "train/loss")


def test_loader_processes_change_nothing(alone: Done) -> None:
    assert_same_run(alone["workers"], alone["reference"], loss=0, norm=0, weights=0)


@pytest.mark.parametrize("packing", PACKINGS)
def test_shards_behind_a_url_train_alike_and_are_fetched_once_a_node(
    packing: str, alone: Done, together: Done
) -> None:
    assert_same_run(together[packing], alone[packing], norm=1e-4)
    shards = [name for name in together.asked[packing] if name.endswith(".arrow")]
    assert len(shards) == len(set(shards)) > 2


def test_a_launcher_that_starts_one_process_for_two_is_refused(
    data_arguments: list[str], tmp_path: Path
) -> None:
    command = pretrain_command("cpu", *data_arguments, f"--run_dir={tmp_path / 'run'}")
    place = command.index("--config_file")
    command[place : place + 2] = ["--cpu"]  # accelerate launch --cpu --num_processes 2
    done = run_program(command)
    assert done.returncode != 0
    assert "asked for several processes but started one" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_backend_that_the_launcher_did_not_ask_for_is_refused(
    data_arguments: list[str], tmp_path: Path
) -> None:
    """With ACCELERATE_USE_CPU, Accelerate leaves DeepSpeed out without a word."""
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
