"""The comparison of two states ignores rounding and finds real changes."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from kantai.cluster.environment import RankInfo
from kantai.config.loading import load_config
from kantai.data.dataset import open_data
from kantai.data.loader import MicroBatch
from kantai.diagnostics.verify import TOLERANCES, compare_states
from kantai.distributed.engine import Engine
from kantai.model.roberta import build_model
from tests.helpers.commands import CONFIG, TINY

NO_DROPOUT = ["--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0"]


def test_comparison_ignores_rounding_and_finds_change(
    shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Another micro-batch size changes a state by rounding only.

    Nothing but rounding moves a key's bias.
    """
    data_arguments = [
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        "--run_dir=unused",
        "--training.max_steps=100",
    ]
    for rows in (4, 5):
        config = load_config(
            CONFIG, [*TINY, *data_arguments, f"--batch.micro_batch_size={rows}", *NO_DROPOUT]
        )
        data = open_data(config)
        engine = Engine(
            RankInfo(0, 1, 0),
            build_model(
                config.model, data.vocabulary, seq_len=config.data.seq_len, seed=config.seed
            ),
            config.optimizer,
            config.training,
            seed=config.seed,
        )
        batches = data.training_batches(1)
        for step in range(2):
            micro_steps = range(batches.stage_at(step).plan.gradient_accumulation_steps)
            engine.train_step(
                step,
                [
                    MicroBatch(batches.micro_batch(step, micro_step, 0))
                    for micro_step in micro_steps
                ],
                1e-3,
            )
        (tmp_path / str(rows)).mkdir()
        engine.save_state(tmp_path / str(rows))

    one = tmp_path / "4"
    other = tmp_path / "5"
    assert 0 < compare_states(one, other, with_rounding=False) <= TOLERANCES["fp32"][1]
    assert compare_states(one, other, with_rounding=True) > 0.1

    (path,) = other.glob("*.safetensors")
    tensors = load_file(path)
    tensors["lm_head.bias/exp_avg_sq"] *= 1.01
    save_file(tensors, path)
    assert compare_states(one, other, with_rounding=False) > TOLERANCES["fp32"][1]
