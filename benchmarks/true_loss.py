"""What loss and gradient norm do the same 64 samples have, on any number of ranks and micro-steps? kantai's, and stock Trainer's.

python benchmarks/true_loss.py                     Python's documentation; two minutes on two CPU cores
python benchmarks/true_loss.py --corpus kant.txt

One step of a RoBERTa of one layer, at learning rate 0: the same weights, sequences and masks for both, in real launches.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from programs import ROOT, prepare, program

SEQUENCES = 64
SPLITS = ((1, 1), (1, 4), (2, 1), (2, 4))  # ranks, micro-steps
SETTINGS = [
    "--model.num_hidden_layers=1",
    "--model.hidden_dropout_prob=0",
    "--model.attention_probs_dropout_prob=0",
]
SETTINGS += [
    "--data.seq_len=32",
    f"--batch.global_batch_size={SEQUENCES}",
    "--training.max_steps=1",
    "--evaluation.max_sequences=1",
]
SETTINGS += ["--optimizer.learning_rate=1e-30", "--optimizer.warmup_steps=0"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, help="a text of paragraphs (default: Python's documentation)"
    )
    parser.add_argument(
        "--trainer", nargs="+", help=argparse.SUPPRESS
    )  # inside a launch: output, micro-steps, settings
    arguments = parser.parse_args()
    if arguments.trainer:
        trainer(
            Path(arguments.trainer[0]),
            int(arguments.trainer[1]),
            int(arguments.trainer[2]),
            arguments.trainer[3:],
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = [*prepare(Path(folder), arguments.corpus), *SETTINGS]
        print(
            "| ranks x micro-steps | kantai: loss | gradient norm | Trainer: loss | gradient norm |\n|---|---|---|---|---|"
        )
        for ranks, steps in SPLITS:
            ours, theirs = (
                kantai(Path(folder), ranks, steps, settings),
                stock(Path(folder), ranks, steps, settings),
            )
            print(
                f"| {ranks} x {steps} | {ours[0]:.4f} | {ours[1]:.4f} | {theirs[0]:.4f} | {theirs[1]:.4f} |",
                flush=True,
            )


def kantai(folder: Path, ranks: int, steps: int, settings: list[str]) -> tuple[float, float]:
    """Loss and gradient norm that pretrain.py logs."""
    run = folder / f"run-{ranks}-{steps}"
    split = [f"--batch.micro_batch_size={SEQUENCES // ranks // steps}", f"--run_dir={run}"]
    program(
        "scripts/pretrain.py", "--config", "configs/quickstart.yaml", *settings, *split, ranks=ranks
    )
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return first["train/loss"], first["train/grad_norm"]


def stock(folder: Path, ranks: int, steps: int, settings: list[str]) -> tuple[float, float]:
    """Loss and gradient norm that transformers' Trainer logs."""
    output = folder / f"trainer-{ranks}-{steps}.json"
    program(
        __file__,
        "--trainer",
        output,
        ranks,
        steps,
        *(setting.removeprefix("--") for setting in settings),
        ranks=ranks,
    )
    logged = json.loads(output.read_text())
    return logged["loss"], logged["grad_norm"]


def trainer(output: Path, ranks: int, steps: int, settings: list[str]) -> None:
    """A rank of stock Trainer with RobertaForMaskedLM on the samples of kantai's first step, masked as there."""
    import torch
    from transformers import RobertaForMaskedLM, Trainer, TrainingArguments

    from kantai.config.loading import load_config
    from kantai.data.dataset import open_data
    from kantai.data.masking import IGNORED_LABEL
    from kantai.model.roberta import build_model

    config = load_config(
        ROOT / "configs/quickstart.yaml",
        [f"--{setting}" for setting in settings] + [f"--batch.micro_batch_size={SEQUENCES}"],
    )
    data = open_data(config)
    ours = build_model(config.model, data.vocabulary, seq_len=config.data.seq_len, seed=config.seed)
    model = RobertaForMaskedLM(ours.config)
    model.load_state_dict(ours.state_dict())
    batch = data.training_batches(1).micro_batch(0, 0, 0)
    labels = torch.full(batch.input_ids.shape, -100)
    # What fills up a row's masked positions is at 0, which is never masked: it goes first, and is written over.
    for row, (places, found) in enumerate(zip(batch.masked_positions, batch.labels, strict=True)):
        labels[row, places[found != IGNORED_LABEL]] = torch.from_numpy(
            found[found != IGNORED_LABEL]
        )
    samples = [
        {"input_ids": ids, "labels": of_row}
        for ids, of_row in zip(torch.from_numpy(batch.input_ids), labels, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        settled = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=SEQUENCES // ranks // steps,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
        )
        run = Trainer(model, settled, train_dataset=samples)
        run.train()
    if int(os.environ.get("RANK", "0")) == 0:
        output.write_text(json.dumps(run.state.log_history[0]))


if __name__ == "__main__":
    main()
