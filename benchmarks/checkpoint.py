"""How long does training stand still for a checkpoint, and how soon does a start train? kantai's, and Accelerate's save_state.

python benchmarks/checkpoint.py                    the tutorial's model, 83.5 million parameters; five minutes on two CPU cores
python benchmarks/checkpoint.py --work /scratch/me where the checkpoints are to go

Real runs of scripts/pretrain.py: one without checkpoints, one that saves every few steps, one that resumes. Then, in this process, the
same model and optimizer through Accelerator.save_state and load_state. All write the same 3 fp32 numbers a parameter.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from programs import ROOT, prepare, program

STEPS, EVERY = 12, 3
SHAPE = [
    "--model.vocab_size=52000",
    "--model.num_hidden_layers=6",
    "--data.seq_len=128",
    "--batch.global_batch_size=8",
]
SHAPE += [
    "--model.hidden_size=768",
    "--model.num_attention_heads=12",
    "--model.intermediate_size=3072",
    "--model.max_position_embeddings=514",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder on the storage in question (default: the system's temporary one)",
    )
    parser.add_argument("--precision", default="fp32", help="training.precision (default fp32)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        where = Path(folder)
        settings = [
            *prepare(where),
            *SHAPE,
            f"--training.precision={arguments.precision}",
            f"--training.max_steps={STEPS}",
            "--optimizer.warmup_steps=1",
        ]
        never, often = where / "never", where / "often"
        train(never, [*settings, "--checkpoint.every_steps=1000"])
        first = train(often, [*settings, f"--checkpoint.every_steps={EVERY}"])
        shutil.rmtree(often / "checkpoints" / f"step-{STEPS:08d}")
        again = train(often, [*settings, f"--checkpoint.every_steps={EVERY}"])
        size = sum(
            path.stat().st_size
            for path in (often / "checkpoints").glob(f"step-{STEPS:08d}/*.safetensors")
        )
        step_seconds = {
            run: sum(values(run, "speed/step_seconds")[2 : STEPS - EVERY]) for run in (never, often)
        }
        shutil.rmtree(never)
        saved, loaded, stock_bytes = accelerate(settings, where)
    stall, write = (statistics.median(values_) for values_ in first[1:])
    print(
        f"{size / 1e9:.2f} GB a checkpoint ({stock_bytes / 1e9:.2f} GB by save_state); {os.cpu_count()} cores, {arguments.precision}\n"
    )
    print("| | kantai | Accelerate's save_state |\n|---|---|---|")
    print(f"| training stands still for a checkpoint | {stall:.2f} s | {saved:.2f} s |")
    print(f"| written, fsynced, read back and hashed meanwhile | {write:.2f} s | no |")
    print(
        f"| steps while one is written take | {step_seconds[often] / step_seconds[never]:.2f} x as long | |"
    )
    print(f"| from launch to the first step done | {first[0]:.1f} s | |")
    print(
        f"| the same, going on from a checkpoint | {again[0]:.1f} s | load_state alone: {loaded:.1f} s |"
    )


def train(run: Path, settings: list[str]) -> tuple[float, list[float], list[float]]:
    """Seconds from launch to the first step of a run, and of each of its checkpoints: stall and writing."""
    done = len(values(run, "train/loss")) if run.exists() else 0
    how = ["--batch.micro_batch_size=8", "--evaluation.max_sequences=8", "--checkpoint.keep=9"]
    start = time.time()
    program(
        "scripts/pretrain.py",
        "--config",
        "configs/quickstart.yaml",
        *settings,
        *how,
        f"--run_dir={run}",
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = min(
        record["time"] for record in records if "train/loss" in record and record["time"] > start
    )
    assert done <= STEPS
    return (
        first - start,
        values(run, "checkpoint/stall_seconds"),
        values(run, "checkpoint/write_seconds"),
    )


def values(run: Path, name: str) -> list[float]:
    """What a run logged of something."""
    records = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in records if name in record]


def accelerate(settings: list[str], folder: Path) -> tuple[float, float, int]:
    """Median seconds of save_state and load_state for the same model and an AdamW that has stepped, and the bytes written."""
    import torch
    from accelerate import Accelerator

    from kantai.config.loading import load_config
    from kantai.data.dataset import open_data
    from kantai.model.roberta import build_model

    config = load_config(ROOT / "configs" / "quickstart.yaml", settings)
    model = build_model(
        config.model, open_data(config).vocabulary, seq_len=config.data.seq_len, seed=config.seed
    )
    accelerator = Accelerator()
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    saved, loaded = [], []
    target = folder / "state"
    for _ in range(3):
        shutil.rmtree(target, ignore_errors=True)
        start = time.perf_counter()
        accelerator.save_state(str(target))
        saved.append(time.perf_counter() - start)
        start = time.perf_counter()
        accelerator.load_state(str(target))
        loaded.append(time.perf_counter() - start)
    del prepared
    return (
        statistics.median(saved),
        statistics.median(loaded),
        sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
    )


if __name__ == "__main__":
    main()
