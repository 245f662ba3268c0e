"""verify.py holds where the promises do, and finds what breaks them: real launchers, real faults."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from kantai.config.loading import load_config
from tests.helpers.commands import CONFIG, ENVIRONMENT, ROOT, TINY, launch_command


@pytest.fixture(scope="module")
def arguments(shards_dir: Path, tokenizer_dir: Path) -> list[str]:
    data = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}", "--run_dir=unused", "--training.max_steps=100"]
    return ["--config=configs/quickstart.yaml", *TINY, *data, "--steps=2"]


def verify(launcher: str | None, program: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = launch_command(launcher, 2, *program, *arguments)
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("launcher", "backend", "settings"),
    [
        (None, "NO", ["--training.precision=fp16", "--data.seq_len=512", "--batch.micro_batch_size=8"]),  # a sum of losses would overflow
        ("cpu", "MULTI_CPU", ["--data.workers=2", "--data.packing=padded"]),
        ("zero3_offload", "DeepSpeed ZeRO-3", ["--optimizer.name=muon", "--training.precision=bf16"]),
    ],
)
def test_it_holds(launcher: str | None, backend: str, settings: list[str], arguments: list[str], tmp_path: Path) -> None:
    """And it takes no more memory than the run: no larger micro-batches, and an engine to compare with, but not two."""
    program = ["tests/helpers/faults.py", "third_engine_refused", "verify"]
    done = verify(launcher, program, *arguments, *settings, f"--output={tmp_path / 'certificate.json'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All promises hold here" in done.stdout
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert (certificate["holds"], certificate["backend"]) == (True, backend)
    assert {finding["promise"] for finding in certificate["findings"]} == {"world-free", "true loss", "nothing lost", "export"}
    assert certificate["world_size"] == len(certificate["devices"]) == (1 if launcher is None else 2)
    sizes = [int(rows) for rows in re.findall(r"micro-steps of (\d+) rows", done.stdout)]
    assert sizes and max(sizes) <= load_config(CONFIG, [*arguments[1:-1], *settings]).batch.micro_batch_size
    assert [path.name for path in tmp_path.iterdir()] == ["certificate.json"]
    hashed = subprocess.run(
        launch_command(None, 1, "scripts/inspect_data.py", "--hash", 0, 2, *(each for each in [*arguments, *settings] if each != "--steps=2")),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert certificate["stream_sha256"] in hashed.stdout


@pytest.mark.parametrize(
    ("launcher", "fault", "promises"),
    [
        ("cpu", "mean_of_means", {"true loss"}),
        ("zero2", "dropped_rank", {"true loss"}),
        ("cpu", "dropped_micro_step", {"true loss"}),
        ("cpu", "other_data", {"world-free", "true loss"}),
        ("zero2", "lost_moment", {"nothing lost"}),
    ],
)
def test_a_fault_is_found(launcher: str, fault: str, promises: set[str], arguments: list[str], tmp_path: Path) -> None:
    done = verify(launcher, ["tests/helpers/faults.py", fault, "verify"], *arguments, f"--output={tmp_path / 'certificate.json'}")
    assert done.returncode == 1, done.stdout + done.stderr
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert {finding["promise"] for finding in certificate["findings"] if not finding["holds"]} == promises
    assert "A PROMISE DOES NOT HOLD HERE" in done.stdout
    assert not certificate["holds"]
