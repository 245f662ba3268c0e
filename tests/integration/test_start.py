"""How a run starts: which ranks may join, what a start may change, and what is refused.

The commands are those that a user gives: two of torchrun on two "nodes", or one of a launcher.
"""

import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest

from kantai.checkpoint.store import CheckpointStore
from tests.helpers.commands import Program, pretrain_command, run_program, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def arguments(shards_dir: Path, tokenizer_dir: Path) -> list[str]:
    return [
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        "--training.max_steps=2",
        "--checkpoint.every_steps=1",
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_two_nodes(
    program: list[object], first: list[object], second: list[object]
) -> tuple[Program, Program]:
    """Start two torchrun commands as on two nodes, and wait for the end of both."""
    port = free_port()
    nodes = []
    for number, own in enumerate((first, second)):
        launcher = f"--nnodes=2 --node_rank={number} --nproc_per_node=1 --master_addr=127.0.0.1"
        command = [sys.executable, "-m", "torch.distributed.run", *launcher.split()]
        nodes.append(Program([*command, f"--master_port={port}", *program, *own]))
    for node in nodes:
        node.wait_for_end()
    return nodes[0], nodes[1]


def pretrain_program(*arguments: object) -> list[object]:
    return pretrain_command(None, *arguments)[1:]  # without Python


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("--optimizer.learning_rate=1e-5", "optimizer.learning_rate is 0.001 on rank 0 and 1e-05"),
        ("--model.hidden_size=64", "model.hidden_size is 32 on rank 0 and 64 on rank 1"),
        ("--data.shards=OTHER", "digest of data.shards is "),
    ],
)
def test_ranks_of_other_run_are_refused(
    other: str, difference: str, arguments: list[str], many_shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    other = other.replace("OTHER", str(many_shards_dir))
    program = pretrain_program(*arguments, f"--run_dir={run}")
    first, second = start_two_nodes(program, [], [other])
    assert first.returncode != 0 and second.returncode != 0
    assert "error: the ranks do not agree on the run: " in first.err
    assert difference in first.err
    assert "a device may be faulty" not in first.err
    assert not run.exists()


def test_nodes_may_have_shards_in_folders_of_their_own(
    arguments: list[str], shards_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(shards_dir, tmp_path / "copy")
    program = pretrain_program(*arguments, f"--run_dir={tmp_path / 'run'}")
    own = [f"--data.shards={tmp_path / 'copy'}", "--data.workers=1"]
    first, second = start_two_nodes(program, [], own)
    assert (first.returncode, second.returncode) == (0, 0), first.report()
    assert "on 2 x CPU: PyTorch DDP over gloo, precision fp32" in first.out


def test_every_node_verifies_its_shards(
    arguments: list[str], shards_dir: Path, tmp_path: Path
) -> None:
    garbage = tmp_path / "garbage"
    shutil.copytree(shards_dir, garbage)
    shard = sorted(garbage.rglob("*.arrow"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    program = pretrain_program(
        *arguments, f"--run_dir={tmp_path / 'run'}", "--failures.hang_seconds=5"
    )
    first, second = start_two_nodes(program, [], [f"--data.shards={garbage}"])
    assert first.returncode != 0 and second.returncode != 0
    assert str(shard) in second.err and "checksum" in second.err


def test_refused_start_does_not_end_the_run_at_work(
    arguments: list[str], many_shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    endless = [*arguments, f"--run_dir={run}", "--training.max_steps=100000"]
    program = Program(pretrain_command(None, *endless))
    wait_until(lambda: CheckpointStore(run).steps(), program)
    config = (run / "config.yaml").read_bytes()
    for other in (f"--data.shards={many_shards_dir}", "--seed=3"):
        refused = run_program(pretrain_command(None, *endless, other), code=2)
        assert "error: " in refused.stderr
        assert (run / "config.yaml").read_bytes() == config
    steps = CheckpointStore(run).steps()[-1]
    wait_until(lambda: CheckpointStore(run).steps()[-1] > steps, program)
    program.send_signal(signal.SIGUSR1)
    assert program.wait_for_end() == 75, program.report()


def test_rank_that_reads_other_checkpoint_is_named(arguments: list[str], tmp_path: Path) -> None:
    """Rank 1 of two "nodes" sees a run directory whose checkpoint has a flipped bit."""
    run = tmp_path / "run"
    run_program(pretrain_command(None, *arguments, f"--run_dir={run}"), code=0)
    shutil.rmtree(CheckpointStore(run).path(2))
    state = CheckpointStore(run).path(1) / "state-00000-of-00001.safetensors"
    flipped = bytearray(state.read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "flipped").write_bytes(flipped)
    # What Path.open gives rank 1 stands for its node's memory or disk.
    faulty = tmp_path / "faulty.py"
    faulty.write_text(
        "import os, pathlib, runpy, sys\n"
        "real = pathlib.Path.open\n"
        "def read(path, *how, **named):\n"
        f"    bad = os.environ['RANK'] == '1' and str(path) == {str(state)!r}\n"
        f"    return real(pathlib.Path({str(tmp_path / 'flipped')!r}) if bad else path, *how, "
        "**named)\n"
        "pathlib.Path.open = read\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    program = [faulty, *pretrain_program(*arguments, f"--run_dir={run}")]
    first, second = start_two_nodes(program, [], [])
    assert first.returncode != 0 and second.returncode != 0
    assert "error: rank 1 (" in first.err and "fails its checksum" in first.err
    assert CheckpointStore(run).steps() == [1]


def test_precision_of_launcher_is_not_ignored(arguments: list[str], tmp_path: Path) -> None:
    command = pretrain_command("cpu", *arguments, f"--run_dir={tmp_path / 'run'}")
    place = command.index("--num_processes")
    done = run_program([*command[:place], "--mixed_precision", "bf16", *command[place:]])
    assert done.returncode != 0
    assert "the launcher asks for mixed_precision bf16, and training.precision is" in done.stderr
    assert not (tmp_path / "run").exists()


def test_broken_deepspeed_file_ends_launch_in_one_line(
    arguments: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "deepspeed.json"
    broken.write_text('{"zero_optimization": {"stage": 2},}')
    launcher = tmp_path / "launcher.yaml"
    launcher.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\n"
        f"deepspeed_config: {{deepspeed_config_file: {broken}, zero3_init_flag: false, "
        "deepspeed_multinode_launcher: standard}\nmain_process_port: 0\n"
    )
    command = pretrain_command("zero2", *arguments, f"--run_dir={tmp_path / 'run'}", processes=1)
    command[command.index("--config_file") + 1] = str(launcher)
    done = run_program(command)
    assert done.returncode != 0
    assert f"error: the deepspeed_config_file {broken} is not JSON" in done.stderr


def test_stopped_run_is_not_restarted_by_torchrun(arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = "-m torch.distributed.run --nproc_per_node=2 --max-restarts=3 --master_port"
    program = pretrain_program(*arguments, f"--run_dir={run}", "--training.max_steps=100000")
    started = Program([sys.executable, *launcher.split(), free_port(), *program])
    wait_until(lambda: CheckpointStore(run).steps(), started)
    (run / "STOP").touch()
    assert started.wait_for_end() == 0, started.report()
    assert started.out.count("model: ") == 1
    assert "asked to stop (there is a file " in started.out
