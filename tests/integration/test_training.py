"""One run, whatever it runs on and whatever happens to it: real launchers, real gloo ranks, real kills."""

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
from pathlib import Path

import psutil
import pytest

from kantai.checkpoint.store import CheckpointStore
from kantai.storage.atomic import verify
from tests.helpers.commands import (
    ENVIRONMENT,
    ROOT,
    TINY,
    job,
    kill_at_once,
    launch_command,
    metrics,
    pretrain,
    pretrain_command,
    several,
    state,
)

STEPS = 6
NO_DROPOUT = ["--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0"]


@pytest.fixture(scope="module")
def data_arguments(shards_dir: Path, tokenizer_dir: Path) -> list[str]:
    return [
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        f"--training.max_steps={STEPS}",
        "--checkpoint.every_steps=2",
    ]


@pytest.fixture(scope="module")
def reference(data_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, no launcher, no dropout, the whole batch at once."""
    run = tmp_path_factory.mktemp("reference") / "run"
    pretrain(None, *data_arguments, *NO_DROPOUT, f"--run_dir={run}", "--batch.micro_batch_size=10", "--checkpoint.keep=9")
    return run


def assert_same_run(run: Path, reference: Path, tolerance: float) -> None:
    """Losses and gradient norms of all steps, and the last weights and moments."""
    assert metrics(run, "train/loss") == pytest.approx(metrics(reference, "train/loss"), abs=tolerance)
    assert metrics(run, "train/grad_norm") == pytest.approx(metrics(reference, "train/grad_norm"), abs=10 * tolerance)
    assert metrics(run, "held_out/loss") == pytest.approx(metrics(reference, "held_out/loss"), abs=tolerance)
    ours, theirs = state(run, STEPS), state(reference, STEPS)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert abs(tensor - theirs[name]).max() <= 10 * tolerance, name


def test_compiled_a_run_is_the_same_and_each_stage_has_code_for_its_own_sizes(data_arguments: list[str], tmp_path: Path) -> None:
    """Code for sizes that vary would be slower; PyTorch makes it when it sees a second size."""
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    arguments = (*data_arguments, *NO_DROPOUT, "--stages=[{until_step: 3, seq_len: 16}]")
    pretrain(None, *arguments, f"--run_dir={plain}")
    done = subprocess.run(
        pretrain_command(None, *arguments, "--training.compile=true", f"--run_dir={compiled}"),
        cwd=ROOT, env={**ENVIRONMENT, "TORCH_LOGS": "dynamic"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_run(compiled, plain, 1e-5)
    assert "create_env" in done.stderr  # of each piece of code
    assert "create_symbol" not in done.stderr  # of each size that may vary


def test_killed_anywhere_and_started_again_is_the_same_to_the_last_bit(data_arguments: list[str], tmp_path: Path) -> None:
    """With dropout, two ranks, SIGKILL of launcher and ranks at several moments, in a save among them."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    pretrain("cpu", *data_arguments, f"--run_dir={straight}")
    checkpoints = killed / "checkpoints"
    moments = [
        (killed / "metrics.jsonl").exists,  # before the first checkpoint
        lambda: any(checkpoints.glob(".attempt-*/step-*/state-*")),  # within a save
        (checkpoints / "step-00000004").exists,  # just after one
    ]
    start = time.time()
    for moment in moments:
        process = subprocess.Popen(
            pretrain_command("cpu", *data_arguments, f"--run_dir={killed}"),
            cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not moment() and process.poll() is None:
            time.sleep(0.001)
        kill_at_once(process)
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
def endless(launcher: str | None, run: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A run without an end that has done its first step."""
    long = ["--training.max_steps=100000", "--checkpoint.every_steps=100000", "--evaluation.every_steps=100000"]
    with subprocess.Popen(
        pretrain_command(launcher, *arguments, *long, f"--run_dir={run}"),
        cwd=ROOT, env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill_at_once(process)


def test_sigterm_to_the_launcher_saves_and_the_run_goes_on(data_arguments: list[str], tmp_path: Path) -> None:
    """The launcher sends it to every process of a rank, to those that load its data, too."""
    run = tmp_path / "run"
    with endless("cpu", run, *data_arguments, "--data.workers=2") as process:
        process.terminate()
        printed, _ = process.communicate(timeout=120)
    (saved,) = CheckpointStore(run).steps()
    assert f"asked to stop (SIGTERM came): saved step {saved}" in printed
    assert len(metrics(run, "train/loss")) == saved


@pytest.mark.parametrize("how", ["file", "signal", "end of the job"])
def test_a_run_that_is_asked_to_stop_saves_and_says_so_by_its_exit_code(how: str, data_arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {"SLURM_JOB_END_TIME": str(int(time.time()) + 60)} if how == "end of the job" else {}
    with endless(None, run, *data_arguments, **environment) as process:
        if how == "file":
            (run / "SAVE").touch()
            while not CheckpointStore(run).steps():
                time.sleep(0.05)
            assert process.poll() is None
            (run / "STOP").touch()
        elif how == "signal":
            process.send_signal(signal.SIGUSR1)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    saved = CheckpointStore(run).steps()[-1]
    assert f"saved step {saved} of 100000; the same command goes on" in printed
    assert len(metrics(run, "train/loss")) == saved
    assert not {"SAVE", "STOP"} & {path.name for path in run.iterdir()}


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = [each for each in psutil.Process(process.pid).children(recursive=True) if "scripts/pretrain.py" in each.cmdline()]
    return sorted(found, key=lambda rank: int(rank.environ()["RANK"]))


def test_a_second_signal_ends_at_once_and_harms_nothing(data_arguments: list[str], tmp_path: Path) -> None:
    """Also while the rank waits for another one that hangs: then the first can do nothing."""
    run = tmp_path / "run"
    with endless("cpu", run, *data_arguments) as process:
        ranks = ranks_of(process)
        ranks[1].suspend()
        time.sleep(1)
        ranks[0].send_signal(signal.SIGINT)
        with pytest.raises(psutil.TimeoutExpired):
            ranks[0].wait(3)
        ranks[0].send_signal(signal.SIGINT)
        ranks[0].wait(60)
        ranks[1].kill()
        printed, _ = process.communicate(timeout=120)
    assert "asked to stop again: ending at once" in printed
    for step in CheckpointStore(run).steps():
        verify(CheckpointStore(run).path(step))


def test_a_rank_that_dies_ends_all(data_arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with endless("cpu", run, *data_arguments) as process:
        ranks = ranks_of(process)
        ranks[-1].kill()
        printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9" in printed and "Connection closed" not in printed
    assert "forcefully" not in printed  # as the launcher does with those that do not end within half a minute
    assert not any(rank.is_running() for rank in ranks)


def test_a_rank_that_hangs_ends_all_and_every_rank_says_where_it_was(data_arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    how = ["--config=configs/quickstart.yaml", *TINY, *data_arguments, "--failures.hang_seconds=12", f"--run_dir={run}"]
    command = launch_command("cpu", 2, "tests/helpers/faults.py", "hanging_rank", "pretrain", *how)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    stacks = [(run / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "in sum_over_ranks" in stacks[0] and "in hanging" in stacks[1], stacks


def test_a_run_that_was_taken_over_writes_nothing_more(data_arguments: list[str], tmp_path: Path) -> None:
    """Two starts of one run at once, as after a node was cut off."""
    run = tmp_path / "run"
    with endless(None, run, *data_arguments) as first, endless(None, run, *data_arguments) as second:
        printed, _ = first.communicate(timeout=60)
        assert first.returncode == 2 and "has been superseded by a later start of the run: this one ends" in printed
        second.terminate()
        second.communicate(timeout=60)
        assert second.returncode == 75
    (saved,) = CheckpointStore(run).steps()
    assert len(metrics(run, "train/loss")) == saved


def test_bad_numbers_are_skipped_rolled_back_and_passed_over_in_a_way_that_replays(data_arguments: list[str], tmp_path: Path) -> None:
    """Three NaNs in a row on one of two ranks, then the same again; a run that knows what to skip has the same bits without them."""
    how, replayed = (
        ["--config=configs/quickstart.yaml", *TINY, *data_arguments, "--training.max_steps=12", "--checkpoint.keep=9"],
        tmp_path / "replayed",
    )
    printed = several("cpu", 2, tmp_path, [job(tmp_path / "bad", *how, poisoned=[5, 6, 7, 9, 10, 11])])
    assert printed.count("back to step 4; the data of steps 4 to 7 is skipped") == 2
    windows = [json.loads(line) for line in (tmp_path / "bad" / "skipped_data.jsonl").read_text().splitlines()]
    assert windows == [{"from_step": 4, "first": first, "stop": first + 4} for first in (4, 8)]
    replayed.mkdir()
    shutil.copytree(CheckpointStore(tmp_path / "bad").path(2), CheckpointStore(replayed).path(2))
    shutil.copy(tmp_path / "bad" / "config.yaml", replayed)
    shutil.copy(tmp_path / "bad" / "skipped_data.jsonl", replayed)
    several("cpu", 2, tmp_path, [job(replayed, *how)])
    files = [verify(CheckpointStore(run).path(12))["files"] for run in (tmp_path / "bad", replayed)]
    assert files[0] == files[1]


def test_a_bit_that_changes_in_one_ranks_weights_is_noticed(data_arguments: list[str], tmp_path: Path) -> None:
    """Before the checkpoint in which it would have been."""
    how = [*data_arguments, "--failures.compare_replicas_every=100", f"--run_dir={tmp_path / 'run'}"]
    with_fault = launch_command("cpu", 3, "tests/helpers/faults.py", "flipped_bit", "pretrain")
    command = [*with_fault, "--config=configs/quickstart.yaml", *TINY, *how]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert f"rank 2 ({platform.node()}) has other weights than the rest" in done.stderr
    assert CheckpointStore(tmp_path / "run").steps() == [2, 4]
    pretrain("cpu", *how, processes=3)
    assert len(metrics(tmp_path / "run", "train/loss")) == STEPS


def test_what_one_rank_alone_finds_bad_all_skip(data_arguments: list[str], tmp_path: Path) -> None:
    how = ["--config=configs/quickstart.yaml", *TINY, *data_arguments, f"--run_dir={tmp_path / 'run'}"]
    command = launch_command("cpu", 2, "tests/helpers/faults.py", "bad_gradient", "pretrain", *how)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run", "train/skipped") == [0, 0, 0, 1, 0, 0]
    assert CheckpointStore(tmp_path / "run").steps() == [2, 6]


def test_a_loss_that_explodes_is_skipped(data_arguments: list[str], tmp_path: Path) -> None:
    long = ["--training.max_steps=106", "--checkpoint.every_steps=50"]
    how = ["--config=configs/quickstart.yaml", *TINY, *data_arguments, *long, f"--run_dir={tmp_path / 'run'}"]
    command = launch_command("cpu", 2, "tests/helpers/faults.py", "exploding_loss", "pretrain", *how)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run", "train/skipped") == [*[0] * 103, 1, 0, 0]


def test_a_run_stops_and_saves_behind_bad_numbers_and_not_within_them(data_arguments: list[str], tmp_path: Path) -> None:
    """Else it would go on without knowing how many had been skipped."""
    run = tmp_path / "run"
    how = ["--config=configs/quickstart.yaml", *TINY, *data_arguments, f"--run_dir={run}"]
    command = launch_command("cpu", 2, "tests/helpers/faults.py", "bad_gradient_and_stop", "pretrain", *how)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert f"saved step 5 of {STEPS}" in done.stdout
    assert metrics(run, "train/skipped") == [0, 0, 0, 1, 0]
    assert CheckpointStore(run).steps() == [2, 5]
    assert not (run / "STOP").exists()


def test_all_checkpoints_damaged_is_an_error_and_not_a_new_beginning(reference: Path, data_arguments: list[str], tmp_path: Path) -> None:
    run = shutil.copytree(reference, tmp_path / "run")
    for path in run.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = pretrain_command(None, *data_arguments, *NO_DROPOUT, f"--run_dir={run}")
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "all of the 3 checkpoints" in done.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_full_disk_ends_a_run_and_leaves_what_was_saved(data_arguments: list[str], tmp_path: Path) -> None:
    """Of 3 MB there is room for four checkpoints. And a limit that no look at the free space shows, as a quota is: one file ends half-way."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    mine = pretrain_command(None, *data_arguments, "--checkpoint.every_steps=1", "--checkpoint.keep=9", f"--run_dir={disk / 'run'}")
    mount = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=3m disk $0 && { "$@"; code=$?; cp -r $0 $KEPT; exit $code; }',
    ]
    full = subprocess.run(
        [*mount, disk, *mine], cwd=ROOT, env={**ENVIRONMENT, "KEPT": str(kept)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert full.returncode == 2, full.stderr
    assert re.search(r"^error: .* GB free and a checkpoint takes 0\.0: free .* GB more, or lower checkpoint.keep", full.stderr)
    store = CheckpointStore(kept / "run")
    assert store.steps() == [1, 2, 3, 4]
    assert store.newest_valid() is not None

    run = tmp_path / "run"
    mine = pretrain_command(None, *data_arguments, f"--run_dir={run}")
    limited = subprocess.run(
        ["prlimit", "--fsize=300000", *mine], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert limited.returncode == 2, limited.stderr
    assert "checkpoint 2 could not be written by rank 0" in limited.stderr and "the one before is good" in limited.stderr
    assert CheckpointStore(run).steps() == []


def test_a_finished_run_is_left_as_it_is(reference: Path, data_arguments: list[str]) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    printed = pretrain(None, *data_arguments, *NO_DROPOUT, f"--run_dir={reference}")
    assert f"{STEPS} of {STEPS} steps done" in printed
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(reference: Path, data_arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (damaged,) = CheckpointStore(run).path(STEPS).glob("*.safetensors")
    damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    printed = pretrain(None, *data_arguments, *NO_DROPOUT, f"--run_dir={run}", "--batch.micro_batch_size=10")
    assert f"checkpoint {STEPS} is damaged" in printed
    assert f"{STEPS} steps, 4 done" in printed
    assert metrics(run, "train/loss") == metrics(reference, "train/loss")


def test_loader_processes_change_nothing(reference: Path, data_arguments: list[str], tmp_path: Path) -> None:
    workers = ["--data.workers=3", "--batch.micro_batch_size=10"]
    pretrain(None, *data_arguments, *NO_DROPOUT, f"--run_dir={tmp_path / 'run'}", *workers)
    assert_same_run(tmp_path / "run", reference, 0.0)


def test_stages_train_alike_over_a_resume_on_more_ranks(data_arguments: list[str], tmp_path: Path) -> None:
    """Three stages, of 2, 1 and 3 micro-steps on two ranks; the second run is stopped at the end of the second."""
    stages = "--stages=[{until_step: 2, seq_len: 16, global_batch_size: 20}, {until_step: 4, global_batch_size: 6}]"
    how = [*data_arguments, *NO_DROPOUT, stages, "--batch.global_batch_size=18", "--batch.micro_batch_size=3", "--masking.final_ratio=0.3"]
    pretrain(None, *how, f"--run_dir={tmp_path / 'one'}")
    printed = pretrain("zero3", *how, f"--run_dir={tmp_path / 'two'}")
    assert "from step 0 on: 20 sequences a step = 2 ranks x 2 micro-steps x 5" in printed
    assert "from step 4 on: 18 sequences a step = 2 ranks x 3 micro-steps x 3" in printed

    shutil.rmtree(CheckpointStore(tmp_path / "two").path(STEPS))
    printed = pretrain("cpu", *how, f"--run_dir={tmp_path / 'two'}", processes=3)
    assert f"{STEPS} steps, 4 done" in printed
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-5)


@pytest.mark.parametrize("packing", ["isolated", "contiguous"])
def test_shards_behind_a_url_train_alike_and_are_fetched_once_a_node(
    packing: str, many_shards_dir: Path, data_arguments: list[str], tmp_path: Path
) -> None:
    how = [*data_arguments, *NO_DROPOUT, f"--data.packing={packing}", "--masking.unit=word", "--data.shuffle_window=4"]
    pretrain(None, *how, f"--data.shards={many_shards_dir}", f"--run_dir={tmp_path / 'here'}")
    with served(many_shards_dir) as (url, asked):
        remote = [f"--data.shards={url}", f"--data.cache_dir={tmp_path / 'cache'}", "--data.workers=2"]
        pretrain("cpu", *how, *remote, f"--run_dir={tmp_path / 'there'}")
    assert_same_run(tmp_path / "there", tmp_path / "here", 1e-5)
    shards = [name for name in asked if name.endswith(".arrow")]
    assert len(shards) == len(set(shards)) > 2


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder behind a URL of this machine, and the names of the files that were asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path.removeprefix("/"))
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_a_launcher_that_starts_one_process_for_two_is_refused(data_arguments: list[str], tmp_path: Path) -> None:
    command = pretrain_command("cpu", *data_arguments, f"--run_dir={tmp_path / 'run'}")
    place = command.index("--config_file")
    command[place : place + 2] = ["--cpu"]  # accelerate launch --cpu --num_processes 2
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "asked for several processes but started one" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_backend_that_the_launcher_did_not_ask_for_is_refused(data_arguments: list[str], tmp_path: Path) -> None:
    """With ACCELERATE_USE_CPU, Accelerate leaves DeepSpeed out without a word."""
    command = pretrain_command("zero1", *data_arguments, f"--run_dir={tmp_path / 'run'}")
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "announced rank 0 of 2 under DEEPSPEED, but Accelerate sees rank 0 of 2 under MULTI_CPU" in done.stderr
    assert not (tmp_path / "run").exists()
