"""A node inspects its GPUs. tests/integration/test_slurm.py inspects real nodes."""

import subprocess
import time
from pathlib import Path

import pytest

from kantai.diagnostics import node
from kantai.diagnostics.node import fatal_xids


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_faulty_gpus_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "580.1, H200, 143771, 1, 0\n580.1, A30, 24576, 9000, 2\n580.1, A30, 24576, 1, [N/A]\n"
    fake_nvidia_smi(tmp_path, monkeypatch, f"printf '{rows}'")
    gpus, complaints = node._inspect_gpus()
    assert [gpu["GPU"] for gpu in gpus] == ["H200 of 143771 MiB", *["A30 of 24576 MiB"] * 2]
    assert [line for line in complaints if not line.startswith("XID")] == [  # this kernel's own
        "GPU 1 has 2 memory errors",
        "9000 MiB of GPU 1 are in use",
        "GPUs of several kinds: A30 of 24576 MiB, H200 of 143771 MiB",
    ]


def test_hanging_driver_does_not_block_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL does not end a process that hangs in the kernel."""
    fake_nvidia_smi(tmp_path, monkeypatch, "exec sleep 30")
    kill = subprocess.Popen.kill
    hanging: list[subprocess.Popen[str]] = []

    def survive(process: subprocess.Popen[str]) -> None:
        hanging.append(process)

    monkeypatch.setattr(subprocess.Popen, "kill", survive)
    monkeypatch.setattr(node, "TIMEOUT_SECONDS", 0.1)
    start = time.monotonic()
    assert node._inspect_gpus() == ([], ["nvidia-smi hangs"])
    assert time.monotonic() < start + 15

    kill(hanging[0])
    hanging[0].communicate()


def test_only_fatal_xids_are_reported() -> None:
    lost = "79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
    log = f"""
    [  12.3] NVRM: Xid (PCI:0000:3b:00): {lost}
    [  12.4] NVRM: Xid (PCI:0000:3b:00): {lost}
    [  15.0] NVRM: Xid (PCI:0000:5e:00): 31, pid=4242, name=python, Ch 00000008, MMU Fault
    """
    assert fatal_xids(log) == ["XID 79 of GPU PCI:0000:3b:00"]
