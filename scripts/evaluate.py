"""Score the newest checkpoint of a run on its held-out split.

python scripts/evaluate.py runs/quickstart/run
"""

import argparse

from kantai.errors import run_command
from kantai.training.run_dir import open_saved_run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run directory")
    arguments = parser.parse_args()

    run_dir, step = open_saved_run(arguments.run)
    import torch

    from kantai.checkpoint.state import load_weights
    from kantai.evaluation.held_out import held_out_score
    from kantai.model.roberta import build_model

    data = run_dir.data
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(run_dir.config.model, data.vocabulary, seq_len=data.seq_len, seed=data.seed)
    load_weights(model, run_dir.store.path(step))
    score = held_out_score(model.to(device), *data.held_out_batches(), rank=0, device=device)
    print(f"step {step}, {score.masked:,} masked tokens of the held-out split")
    print(f"loss        {score.loss:.4f} nats a masked token")
    print(
        f"the floor   {data.unigram_entropy:.4f} nats: the corpus' unigram entropy, the loss of a "
        "model that knows word frequencies alone"
    )
    print(f"accuracy    {score.accuracy:.2%}")
    print(f"perplexity  {score.perplexity:,.2f}")


if __name__ == "__main__":
    run_command(main)
