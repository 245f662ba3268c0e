"""Compare the loss and gradient norm of 64 samples on any number of ranks and micro-steps.

python benchmarks/true_loss.py                     Python's documentation; two minutes on two cores
python benchmarks/true_loss.py --corpus kant.txt

Kantai and stock Trainer each do one step of a RoBERTa of one layer at learning rate 0, in real
launches, with the same weights, sequences and masks.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from programs import (
    QUICKSTART,
    launch_command,
    prepare_data,
    pretrain_command,
    read_records,
    run_script,
    run_to_end,
)

SEQUENCES = 64
SPLITS = ((1, 1), (1, 4), (2, 1), (2, 4))  # ranks, micro-steps
SETTINGS = [
    "--model.num_hidden_layers=1",
    "--model.hidden_dropout_prob=0",
    "--model.attention_probs_dropout_prob=0",
    "--data.seq_len=32",
    f"--batch.global_batch_size={SEQUENCES}",
    "--training.max_steps=1",
    "--evaluation.max_sequences=1",
    "--optimizer.learning_rate=1e-30",
    "--optimizer.warmup_steps=0",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, help="a text of paragraphs (default: Python's documentation)"
    )
    # Inside a launch: output, rows of a rank and micro-step, micro-steps, settings.
    parser.add_argument("--trainer", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trainer:
        output, rows, micro_steps, *settings = arguments.trainer
        train_with_trainer(Path(output), int(rows), int(micro_steps), settings)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [*prepare_data(folder, arguments.corpus), *SETTINGS]
        print("| ranks x micro-steps | kantai: loss | gradient norm | Trainer: loss |", end="")
        print(" gradient norm |\n|---|---|---|---|---|")
        for ranks, micro_steps in SPLITS:
            ours = measure_kantai(folder, ranks, micro_steps, settings)
            theirs = measure_trainer(folder, ranks, micro_steps, settings)
            cells = " | ".join(f"{value:.4f}" for value in (*ours, *theirs))
            print(f"| {ranks} x {micro_steps} | {cells} |", flush=True)


def measure_kantai(
    folder: Path, ranks: int, micro_steps: int, settings: list[str]
) -> tuple[float, float]:
    """Loss and gradient norm that pretrain.py logs."""
    run = folder / f"run-{ranks}-{micro_steps}"
    rows = f"--batch.micro_batch_size={SEQUENCES // ranks // micro_steps}"
    launcher = launch_command(ranks)
    run_to_end(pretrain_command(run, [*settings, rows], launcher=launcher), ranks)
    first = read_records(run, "train/loss")[0]
    return first["train/loss"], first["train/grad_norm"]


def measure_trainer(
    folder: Path, ranks: int, micro_steps: int, settings: list[str]
) -> tuple[float, float]:
    """Loss and gradient norm that transformers' Trainer logs."""
    output = folder / f"trainer-{ranks}-{micro_steps}.json"
    rows = SEQUENCES // ranks // micro_steps
    # argparse would take settings with their dashes for options of its own.
    bare = [setting.removeprefix("--") for setting in settings]
    run_script(__file__, "--trainer", output, rows, micro_steps, *bare, ranks=ranks)
    logged = json.loads(output.read_text())
    return logged["loss"], logged["grad_norm"]


def train_with_trainer(output: Path, rows: int, micro_steps: int, settings: list[str]) -> None:
    """Be a rank of stock Trainer on the samples of kantai's first step, masked as there."""
    import torch
    from transformers import RobertaForMaskedLM, Trainer, TrainingArguments

    from kantai.config.loading import load_config
    from kantai.data.dataset import open_data
    from kantai.model.roberta import build_model

    overrides = [f"--{setting}" for setting in settings]
    config = load_config(QUICKSTART, [*overrides, f"--batch.micro_batch_size={SEQUENCES}"])
    data = open_data(config)
    ours = build_model(config.model, data.vocabulary, seq_len=data.seq_len, seed=data.seed)
    model = RobertaForMaskedLM(ours.config)
    model.load_state_dict(ours.state_dict())
    batch = data.training_batches(1).micro_batch(0, 0, 0)
    ids = torch.from_numpy(batch.input_ids)
    labels = torch.from_numpy(batch.labels_by_position())
    samples = [
        {"input_ids": row, "labels": of_row} for row, of_row in zip(ids, labels, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro_steps,
            max_steps=1,
            learning_rate=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
        )
        trainer = Trainer(model, arguments, train_dataset=samples)
        trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        output.write_text(json.dumps(trainer.state.log_history[0]))


if __name__ == "__main__":
    main()
