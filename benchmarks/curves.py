"""Draw the held-out loss of runs over the minutes that they spent in steps.

python benchmarks/curves.py docs/curves.svg 'the tutorial=runs/tutorial/run' \\
    'kantai-fast=runs/kantai-fast/run'

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
        last = f"{label}: {losses[-1]:.2f} after {minutes[-1]:.0f} minutes"
        axes.plot(minutes, losses, label=last)
    baseline = f"unigram entropy: {entropy:.2f}"
    axes.axhline(entropy, color="grey", linestyle="dashed", label=baseline)
    axes.set(xlabel="minutes of training", ylabel="held-out loss, nats a masked token")
    axes.legend()
    # The date would make every SVG differ.
    metadata = {"Date": None} if arguments.output.suffix == ".svg" else None
    figure.savefig(arguments.output, metadata=metadata)


def curve(run: Path) -> tuple[list[float], list[float], float]:
    """Minutes in steps up to each evaluation, its loss, and the unigram entropy."""
    seconds = 0.0
    minutes = []
    losses = []
    entropy = 0.0
    for record in read_metrics(run / "metrics.jsonl"):
        seconds += record.get("speed/step_seconds", 0.0)
        if "held_out/loss" in record:
            minutes.append(seconds / 60)
            losses.append(record["held_out/loss"])
            entropy = record["held_out/unigram_entropy"]
    return minutes, losses, entropy


if __name__ == "__main__":
    main()
