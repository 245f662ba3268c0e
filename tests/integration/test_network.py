"""Ranks exchange no pickles, and what they listen on is no more than the documentation says."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.helpers.commands import TINY, Program, job, pretrain_command, run_jobs, wait_until

pytestmark = pytest.mark.slow

LISTENS = "0A"  # in /proc/net/tcp, whose addresses have their lowest byte first
NAMES = {"0100007F": "127.0.0.1", "0100630A": "10.99.0.1", "00000000": "any", "0" * 32: "any"}
NAN_CALLS = [3, 4, 5]
# Run a command on a machine whose host name has an address that others could reach.
REACHABLE = [
    "unshare",
    *([] if os.geteuid() == 0 else ["--map-root-user"]),
    "--mount",
    "--net",
    "--uts",
    "sh",
    "-c",
    "ip link set lo up && ip addr add 10.99.0.1/32 dev lo && "
    "hostname reachable && printf '127.0.0.1 localhost\\n10.99.0.1 reachable\\n' >$0 && "
    'mount --bind $0 /etc/hosts && exec "$@"',
]


@pytest.mark.parametrize("launcher", ["cpu", "zero3"])
def test_ranks_exchange_no_pickles(
    launcher: str, shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Not in a run that saves, rolls back and stops on request, nor in a comparison of all."""
    arguments = [
        "--config=configs/quickstart.yaml",
        *TINY,
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
    ]
    settings = [
        "--training.max_steps=6",
        "--checkpoint.every_steps=2",
        "--failures.compare_replicas_every=1",
    ]
    run = tmp_path / "run"
    jobs = [
        job(run, *arguments, *settings, fault="pickles_refused", nan_calls=NAN_CALLS),
        job(run, *arguments, *settings, "--training.max_steps=6"),
    ]
    printed = run_jobs(launcher, 2, tmp_path, jobs)
    assert "back to step 2" in printed[0]
    assert "6 of 6 steps done" in printed[1]


def listening(program: Program) -> set[tuple[str, int]]:
    """Return the addresses and ports that listen in a program's network; "any" is all addresses."""
    found = set()
    for table in ("tcp", "tcp6"):
        lines = Path(f"/proc/{program.pid}/net/{table}").read_text().splitlines()[1:]
        for local, state in (line.split()[1:4:2] for line in lines):
            address, port = local.split(":")
            if state == LISTENS:
                found.add((NAMES.get(address, address), int(port, 16)))
    return found


@pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 makes the network")
@pytest.mark.parametrize("launcher", ["cpu", "zero2"])
def test_only_store_listens_beyond_this_machine(
    launcher: str, shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """On one node gloo listens on loopback. PyTorch's store listens everywhere."""
    command = pretrain_command(
        launcher,
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        f"--run_dir={tmp_path / 'run'}",
        "--training.max_steps=100000",
    )
    program = Program([*REACHABLE, tmp_path / "hosts", *command])
    wait_until(lambda: "steps, 0 done" in program.out, program)
    found = listening(program)
    program.send_signal(signal.SIGTERM)
    program.wait_for_end()
    assert len([port for address, port in found if address == "127.0.0.1"]) >= 2, found
    assert {address for address, _ in found} == {"127.0.0.1", "any"}, found
    assert len({port for address, port in found if address == "any"}) == 1, found
