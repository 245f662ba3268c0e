"""verify.py holds where the promises do, and finds what breaks them: real launchers, real faults."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from commands import CONFIG, ENVIRONMENT, ROOT, TINY, launch_command
from safetensors.torch import load_file, save_file

from kantai.cluster import Place
from kantai.config import load_config
from kantai.data import open_data
from kantai.engine import Engine
from kantai.model import MicroBatch, build_model
from kantai.verify import TOLERANCES, of_states

NO_DROPOUT = ["--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0"]


@pytest.fixture(scope="module")
def arguments(shards_dir: Path, tokenizer_dir: Path) -> list[str]:
    data = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}", "--run_dir=unused", "--training.total_updates=100"]
    return ["--config=configs/quickstart.yaml", *TINY, *data, "--updates=2"]


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
    program = ["tests/planted.py", "third_engine_refused", "verify"]
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
        launch_command(None, 1, "scripts/inspect_data.py", "--hash", 0, 2, *(each for each in [*arguments, *settings] if each != "--updates=2")),
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
    done = verify(launcher, ["tests/planted.py", fault, "verify"], *arguments, f"--output={tmp_path / 'certificate.json'}")
    assert done.returncode == 1, done.stdout + done.stderr
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert {finding["promise"] for finding in certificate["findings"] if not finding["holds"]} == promises
    assert "A PROMISE DOES NOT HOLD HERE" in done.stdout
    assert not certificate["holds"]


def test_states_are_compared_by_more_than_rounding(arguments: list[str], tmp_path: Path) -> None:
    """The same updates, dealt otherwise: they differ by rounding, which is all that a key's bias moves by."""
    for rows in (4, 5):
        config = load_config(CONFIG, [*arguments[1:-1], f"--batch.micro_batch_size={rows}", *NO_DROPOUT])
        data = open_data(config)
        engine, batches = Engine(config, Place(0, 1, 0), build_model(config, data.vocabulary)), data.training_batches(1)
        for update in range(2):
            steps = range(batches.stage(update).plan.gradient_accumulation_steps)
            engine.update(update, [MicroBatch(batches.micro_batch(update, step, 0)) for step in steps], 1e-3)
        (tmp_path / str(rows)).mkdir()
        engine.save_state(tmp_path / str(rows))
    one, other = tmp_path / "4", tmp_path / "5"
    assert 0 < of_states(one, other, with_rounding=False) <= TOLERANCES["fp32"][1]
    assert of_states(one, other, with_rounding=True) > 0.1
    (path,) = other.glob("*.safetensors")
    tensors = load_file(path)
    tensors["lm_head.bias/exp_avg_sq"] *= 1.01
    save_file(tensors, path)
    assert of_states(one, other, with_rounding=False) > TOLERANCES["fp32"][1]
