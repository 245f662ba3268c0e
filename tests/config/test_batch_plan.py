"""A batch plan sets the rows of a step, and deals them to ranks and micro-steps."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kantai.config.batch_plan import BatchPlan, BatchShape
from kantai.config.loading import load_config, refuse_other_run
from kantai.config.schema import Config
from kantai.errors import UserError

SMALLEST = (
    "run_dir: runs/a\ndata: {shards: shards, tokenizer: tokenizer}\ntraining: {max_steps: 10}\n"
)


def load(tmp_path: Path, text: str = SMALLEST, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


STAGES = (
    "--stages=[{until_step: 3, seq_len: 16, global_batch_size: 12}, {until_step: 5, seq_len: 16}]"
)


def test_stages_set_batch_shape_of_steps(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        SMALLEST,
        STAGES,
        "--data.seq_len=64",
        "--batch.global_batch_size=20",
        "--batch.micro_batch_size=6",
    )
    assert config.batch_shapes() == [
        BatchShape(0, 16, 12, 24),
        BatchShape(3, 16, 20, 24),
        BatchShape(5, 64, 20, 6),
    ]

    assert load(tmp_path).batch_shapes() == [BatchShape(0, 512, 256, 32)]
    with pytest.raises(UserError, match="stages was "):
        refuse_other_run(config, load(tmp_path))


@given(
    global_batch_size=st.integers(1, 300),
    micro_batch_size=st.integers(1, 80),
    world_size=st.integers(1, 40),
)
@example(8192, 64, 7)
@example(1, 1, 8)
def test_plan_deals_each_row_once_with_fewest_empty_rows(
    global_batch_size: int, micro_batch_size: int, world_size: int
) -> None:
    plan = BatchPlan(global_batch_size, micro_batch_size, world_size)
    micro_steps = plan.gradient_accumulation_steps
    micro = plan.micro_batch_size
    dealt = [
        row
        for rank in range(world_size)
        for micro_step in range(micro_steps)
        for row in plan.rows(rank, micro_step)
    ]
    assert dealt == list(range(global_batch_size + plan.empty_rows))
    assert all(
        len(plan.rows(rank, micro_step)) == micro <= micro_batch_size
        for rank in range(world_size)
        for micro_step in range(micro_steps)
    )

    # Neither fewer micro-steps nor smaller micro-batches would hold the rows.
    assert world_size * (micro_steps - 1) * micro_batch_size < global_batch_size
    assert world_size * micro_steps * (micro - 1) < global_batch_size
    assert (f"{plan.empty_rows} of them empty" in str(plan)) == (plan.empty_rows > 0)


def test_plan_reports_wasted_rows() -> None:
    assert str(BatchPlan(256, 32, 4)) == "256 sequences a step = 4 ranks x 2 micro-steps x 32"
    assert (
        str(BatchPlan(256, 32, 7))
        == "256 sequences a step = 7 ranks x 2 micro-steps x 19, 10 of them empty (3.8% wasted)"
    )
