"""One run, whatever it runs on and whatever happens to it: real launchers, real gloo ranks, real kills."""

import contextlib
import functools
import http.server
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ENVIRONMENT, ROOT, kill_at_once, metrics, pretrain, pretrain_command
from safetensors.numpy import load_file

from kantai.checkpoint import CheckpointStore, verify

UPDATES = 6
NO_DROPOUT = ["--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0"]


@pytest.fixture(scope="module")
def data_arguments(shards_dir: Path, tokenizer_dir: Path) -> list[str]:
    return [
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        f"--training.total_updates={UPDATES}",
        "--checkpoint.every_updates=2",
    ]


@pytest.fixture(scope="module")
def reference(data_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, no launcher, no dropout, the whole batch at once."""
    run = tmp_path_factory.mktemp("reference") / "run"
    pretrain(None, *data_arguments, *NO_DROPOUT, f"--run_dir={run}", "--batch.micro_batch_size=10", "--checkpoint.keep=9")
    return run


def state(run: Path, update: int) -> dict[str, object]:
    """All tensors of a checkpoint by name, whatever files they are in."""
    folder = CheckpointStore(run).path(update)
    verify(folder)
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_run(run: Path, reference: Path, tolerance: float) -> None:
    """Losses and gradient norms of all updates, and the last weights and moments."""
    assert metrics(run, "train/loss") == pytest.approx(metrics(reference, "train/loss"), abs=tolerance)
    assert metrics(run, "train/grad_norm") == pytest.approx(metrics(reference, "train/grad_norm"), abs=10 * tolerance)
    assert metrics(run, "held_out/loss") == pytest.approx(metrics(reference, "held_out/loss"), abs=tolerance)
    ours, theirs = state(run, UPDATES), state(reference, UPDATES)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert abs(tensor - theirs[name]).max() <= 10 * tolerance, name


# Sums of fp32 numbers in another order: 1e-6 of a loss of 7.
@pytest.mark.parametrize(("launcher", "processes"), [("cpu", 2), ("cpu", 3), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)])
def test_any_backend_and_world_trains_as_one_process_does(
    launcher: str, processes: int, reference: Path, data_arguments: list[str], tmp_path: Path
) -> None:
    """With 10 rows in micro-batches of 4: accumulation everywhere, and rows that are empty."""
    printed = pretrain(launcher, *data_arguments, *NO_DROPOUT, f"--run_dir={tmp_path / 'run'}", processes=processes)
    assert f"{processes} ranks x" in printed
    assert_same_run(tmp_path / "run", reference, 1e-5)


@pytest.mark.parametrize("launcher", ["ddp", "zero2", "zero3"])
def test_a_checkpoint_goes_on_under_another_backend(launcher: str, reference: Path, data_arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    for update in range(4, UPDATES + 1):
        shutil.rmtree(CheckpointStore(run).path(update), ignore_errors=True)
    printed = pretrain(launcher, *data_arguments, *NO_DROPOUT, f"--run_dir={run}")
    assert f"{UPDATES} updates, 2 done" in printed
    assert_same_run(run, reference, 1e-5)


def test_killed_anywhere_and_started_again_is_the_same_to_the_last_bit(data_arguments: list[str], tmp_path: Path) -> None:
    """With dropout, two ranks, SIGKILL of launcher and ranks at several moments, in a save among them."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    pretrain("cpu", *data_arguments, f"--run_dir={straight}")
    checkpoints = killed / "checkpoints"
    moments = [
        (killed / "metrics.jsonl").exists,  # before the first checkpoint
        lambda: any(checkpoints.glob(".update-*.partial")),  # within a save
        (checkpoints / "update-00000004").exists,  # just after one
    ]
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
    before, after = CheckpointStore(straight).path(UPDATES), CheckpointStore(killed).path(UPDATES)
    assert verify(before)["files"] == verify(after)["files"]
    assert len(CheckpointStore(killed).updates()) == 3
    assert not list(checkpoints.glob(".*"))


def test_sigterm_to_the_launcher_saves_and_the_run_goes_on(data_arguments: list[str], tmp_path: Path) -> None:
    run, long = tmp_path / "run", ["--training.total_updates=100000", "--checkpoint.every_updates=100000"]
    process = subprocess.Popen(
        pretrain_command("cpu", *data_arguments, *long, f"--run_dir={run}"),
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    (saved,) = CheckpointStore(run).updates()
    assert f"asked to stop: saved update {saved}" in printed
    assert len(metrics(run, "train/loss")) == saved


def test_a_finished_run_is_left_as_it_is(reference: Path, data_arguments: list[str]) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    printed = pretrain(None, *data_arguments, *NO_DROPOUT, f"--run_dir={reference}")
    assert f"{UPDATES} of {UPDATES} updates done" in printed
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(reference: Path, data_arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (damaged,) = CheckpointStore(run).path(UPDATES).glob("*.safetensors")
    damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    printed = pretrain(None, *data_arguments, *NO_DROPOUT, f"--run_dir={run}", "--batch.micro_batch_size=10")
    assert f"checkpoint {UPDATES} is damaged" in printed
    assert f"{UPDATES} updates, 4 done" in printed
    assert metrics(run, "train/loss") == metrics(reference, "train/loss")


def test_loader_processes_change_nothing(reference: Path, data_arguments: list[str], tmp_path: Path) -> None:
    workers = ["--data.workers=3", "--batch.micro_batch_size=10"]
    pretrain(None, *data_arguments, *NO_DROPOUT, f"--run_dir={tmp_path / 'run'}", *workers)
    assert_same_run(tmp_path / "run", reference, 0.0)


def test_bf16_follows_fp32(reference: Path, data_arguments: list[str], tmp_path: Path) -> None:
    pretrain("cpu", *data_arguments, *NO_DROPOUT, f"--run_dir={tmp_path / 'run'}", "--training.precision=bf16")
    losses = metrics(tmp_path / "run", "train/loss")
    assert losses == pytest.approx(metrics(reference, "train/loss"), abs=0.02)
    assert any(round(loss * 32) != loss * 32 for loss in losses)  # computed in fp32, not in steps of 1/32


def test_padded_rows_of_different_length_train_alike_on_one_rank_and_two(data_arguments: list[str], tmp_path: Path) -> None:
    for launcher, run in ((None, "one"), ("cpu", "two")):
        pretrain(launcher, *data_arguments, *NO_DROPOUT, "--data.packing=padded", f"--run_dir={tmp_path / run}")
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-5)


@pytest.mark.parametrize("launcher", ["ddp", "zero2", "zero3"])
def test_stages_train_alike_on_one_rank_and_two_and_over_a_resume(launcher: str, data_arguments: list[str], tmp_path: Path) -> None:
    """Three stages, of 2, 1 and 3 micro-steps on two ranks; the second run is stopped at the end of the second."""
    stages = "--stages=[{until_update: 2, seq_len: 16, global_batch_size: 20}, {until_update: 4, global_batch_size: 6}]"
    how = [*data_arguments, *NO_DROPOUT, stages, "--batch.global_batch_size=18", "--batch.micro_batch_size=3", "--masking.final_ratio=0.3"]
    pretrain(None, *how, f"--run_dir={tmp_path / 'one'}")
    printed = pretrain(launcher, *how, f"--run_dir={tmp_path / 'two'}")
    assert "from update 0 on: 20 sequences an update = 2 ranks x 2 micro-steps x 5" in printed
    assert "from update 4 on: 18 sequences an update = 2 ranks x 3 micro-steps x 3" in printed
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-5)

    shutil.rmtree(CheckpointStore(tmp_path / "two").path(UPDATES))
    printed = pretrain("cpu", *how, f"--run_dir={tmp_path / 'two'}", processes=3)
    assert f"{UPDATES} updates, 4 done" in printed
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
