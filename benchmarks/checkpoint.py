"""Measure how long a checkpoint pauses training, and how soon a start trains.

python benchmarks/checkpoint.py                    tutorial's model; five minutes on two CPU cores
python benchmarks/checkpoint.py --work /scratch/me checkpoints in that folder

scripts/pretrain.py runs without checkpoints, with a checkpoint every few steps, and resumes. Then
this process saves and loads the same model and optimizer with Accelerator.save_state and
load_state. Both write the same three fp32 numbers a parameter.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

from programs import (
    QUICKSTART,
    TUTORIAL_MODEL,
    prepare_data,
    pretrain_command,
    read_records,
    read_values,
    run_to_end,
)
from timing import seconds_of

from kantai.checkpoint.store import CheckpointStore

STEPS = 12
CHECKPOINT_STEPS = 3  # from one checkpoint to the next
ROUNDS = 3  # of save_state and load_state
SETTINGS = [
    *TUTORIAL_MODEL,
    "--data.seq_len=128",
    "--batch.global_batch_size=8",
    "--batch.micro_batch_size=8",
    "--evaluation.max_sequences=8",
    "--checkpoint.keep=9",
    "--optimizer.warmup_steps=1",
    f"--training.max_steps={STEPS}",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder on the storage to measure (default: the system's temporary folder)",
    )
    parser.add_argument("--precision", default="fp32", help="training.precision (default fp32)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name).absolute()
        precision = f"--training.precision={arguments.precision}"
        measure(folder, [*prepare_data(folder), *SETTINGS, precision], arguments.precision)


def measure(folder: Path, settings: list[str], precision: str) -> None:
    """Do all runs and print the table."""
    never = folder / "never"
    train(never, [*settings, "--checkpoint.every_steps=1000"])

    often = folder / "often"
    settings_of_often = [*settings, f"--checkpoint.every_steps={CHECKPOINT_STEPS}"]
    start_seconds = train(often, settings_of_often)
    pause = median(read_values(often, "checkpoint/stall_seconds"))
    writing = median(read_values(often, "checkpoint/write_seconds"))

    last = CheckpointStore(often).path(STEPS)
    shutil.rmtree(last)
    resume_seconds = train(often, settings_of_often)
    size = sum(path.stat().st_size for path in last.glob("*.safetensors"))
    slowdown = step_seconds(often) / step_seconds(never)

    shutil.rmtree(never)
    saving, loading, stock_size = measure_accelerate(settings, folder / "state")
    print(
        f"{size / 1e9:.2f} GB a checkpoint ({stock_size / 1e9:.2f} GB by save_state); "
        f"{os.cpu_count()} cores, {precision}\n"
    )
    print("| | kantai | Accelerate's save_state |\n|---|---|---|")
    print(f"| a checkpoint pauses training for | {pause:.2f} s | {saving:.2f} s |")
    print(f"| then written, fsynced, read back and hashed in | {writing:.2f} s | not done |")
    print(f"| steps meanwhile take | {slowdown:.2f} x as long | |")
    print(f"| from launch to the end of the first step | {start_seconds:.1f} s | |")
    print(
        f"| the same when resuming | {resume_seconds:.1f} s | load_state alone: {loading:.1f} s |"
    )


def train(run: Path, settings: list[str]) -> float:
    """Train to the last step. Returns the seconds from launch to the end of the first step."""
    start = time.time()
    run_to_end(pretrain_command(run, settings))
    times = (record["time"] for record in read_records(run, "train/loss"))
    return min(moment for moment in times if moment > start) - start


def step_seconds(run: Path) -> float:
    """Seconds of a run's steps, without the first two and those that were done again."""
    return sum(read_values(run, "speed/step_seconds")[2 : STEPS - CHECKPOINT_STEPS])


def measure_accelerate(settings: list[str], target: Path) -> tuple[float, float, int]:
    """Save and load the same model and an AdamW that has stepped.

    Returns:
        Median seconds of save_state and of load_state, and the bytes written.
    """
    import torch
    from accelerate import Accelerator

    from kantai.config.loading import load_config
    from kantai.data.dataset import open_data
    from kantai.model.roberta import build_model

    config = load_config(QUICKSTART, settings)
    vocabulary = open_data(config).vocabulary
    model = build_model(config.model, vocabulary, seq_len=config.data.seq_len, seed=config.seed)
    accelerator = Accelerator()
    _, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    saved = []
    loaded = []
    for _ in range(ROUNDS):
        shutil.rmtree(target, ignore_errors=True)
        saved.append(seconds_of(lambda: accelerator.save_state(str(target))))
        loaded.append(seconds_of(lambda: accelerator.load_state(str(target))))
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return median(saved), median(loaded), size


if __name__ == "__main__":
    main()
