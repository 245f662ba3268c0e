"""Held-out loss over the seconds spent in steps, of some runs, as a picture.

python benchmarks/curves.py docs/curves.svg 'the tutorial=runs/tutorial/run' 'kantai-fast=runs/kantai-fast/run'

Needs matplotlib, which nothing else here does: pip install matplotlib
"""

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from kantai.training.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="picture to write, .svg or .png")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN", help="run directories")
    arguments = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "kantai"  # the same picture for the same runs
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for label, _, run in (each.rpartition("=") for each in arguments.runs):
        minutes, losses, entropy = curve(Path(run))
        axes.plot(
            minutes, losses, label=f"{label}: {losses[-1]:.2f} after {minutes[-1]:.0f} minutes"
        )
    axes.axhline(entropy, color="grey", linestyle="dashed", label=f"unigram entropy: {entropy:.2f}")
    axes.set(xlabel="minutes of training", ylabel="held-out loss, nats a masked token")
    axes.legend()
    figure.savefig(
        arguments.output, metadata={"Date": None} if arguments.output.suffix == ".svg" else None
    )


def curve(run: Path) -> tuple[list[float], list[float], float]:
    """Minutes spent in steps until each evaluation, its loss, and the unigram entropy of what is held out."""
    spent, minutes, losses, entropy = 0.0, [], [], 0.0
    for record in read_metrics(run / "metrics.jsonl"):
        spent += record.get("speed/step_seconds", 0.0)
        if "held_out/loss" in record:
            minutes.append(spent / 60)
            losses.append(record["held_out/loss"])
            entropy = record["held_out/unigram_entropy"]
    return minutes, losses, entropy


if __name__ == "__main__":
    main()
