"""Score a checkpoint of a run, by default the newest, on the run's held-out split.

python scripts/evaluate.py runs/quickstart/run
python scripts/evaluate.py runs/quickstart/run --step 1000
python scripts/evaluate.py runs/moved --data.shards=new/shards --data.tokenizer=new/tokenizer
"""

import argparse

from kantai.errors import run_command
from kantai.training.run_dir import open_saved_run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="--data.shards=... and --data.tokenizer=... say where these are now; other settings "
        "that may change between a run's starts can be given alike",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="run directory")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    which.add_argument(
        "--best", action="store_true", help="the checkpoint with the lowest held-out loss"
    )
    arguments, overrides = parser.parse_known_args()

    run_dir, step = open_saved_run(arguments.run, overrides, arguments.step, best=arguments.best)
    import torch

    from kantai.evaluation.held_out import held_out_score
    from kantai.training.saved_model import load_saved_model

    data = run_dir.data
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, step = load_saved_model(
        run_dir, step, lambda: run_dir.choose(arguments.step, best=arguments.best)
    )
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
