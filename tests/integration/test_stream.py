"""Test that rows and masks are one stream.

The stream does not depend on world, micro-batch, worker count, resumes or shard location.
"""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from kantai.config.loading import load_config
from kantai.config.schema import Config
from kantai.data.batches import Batch
from kantai.data.dataset import Data, open_data
from kantai.data.inspect import hash_step, hash_stream
from kantai.data.loader import stream
from tests.helpers.commands import CONFIG

pytestmark = pytest.mark.slow

STEPS = 200
RESUMED_AT = (0, 57, 131)  # the first resume is at the end of a stage


@pytest.fixture(scope="module")
def config(many_shards_dir: Path, tokenizer_dir: Path) -> Callable[..., Config]:
    """Return a loader of configs with two stages, small windows, and more than one epoch."""

    def load(*changes: str) -> Config:
        settings = [
            f"--data.shards={many_shards_dir}",
            f"--data.tokenizer={tokenizer_dir}",
            "--data.shuffle_window=3",
            "--seed=5",
        ]
        stages = "--stages=[{until_step: 57, seq_len: 16, global_batch_size: 11}]"
        sizes = [
            "--data.seq_len=32",
            "--batch.global_batch_size=24",
            f"--training.max_steps={STEPS}",
            stages,
        ]
        return load_config(CONFIG, [*settings, *sizes, *changes])

    return load


def hash_of_run(data: Data, world_size: int, workers: int, starts: tuple[int, ...]) -> str:
    """Hash the batches that a run's loader gives all ranks; it restarts at each of ``starts``."""
    batches = data.training_batches(world_size)
    dealt: list[list[list[Batch]]] = [[] for _ in range(STEPS)]  # by step, rank, micro-step
    for first, stop in itertools.pairwise([*starts, STEPS]):
        ranks = [stream(batches, rank, first, STEPS, workers) for rank in range(world_size)]
        # An interrupted run has prepared more steps than it has done.
        for of_ranks in itertools.islice(zip(*ranks, strict=True), stop - first):
            dealt[of_ranks[0][0]] = [
                [micro_batch.batch for micro_batch in found] for _, found, _ in of_ranks
            ]
    digest = hashlib.sha256()
    for step, of_ranks in enumerate(dealt):
        hash_step(
            digest,
            itertools.chain.from_iterable(of_ranks),
            batches.stage_at(step).plan.global_batch_size,
            batches.pad_id,
        )
    return digest.hexdigest()


# (are shards remote, micro-batch, world size, starts)
Case = tuple[bool, int, int, tuple[int, ...]]
CASES: list[Case] = list(
    itertools.product((False, True), (4, 24), (1, 2, 3, 5, 8), ((0,), RESUMED_AT))
)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(
    ("workers", "cases"),
    [(0, CASES), (1, [(True, 24, 3, RESUMED_AT)]), (4, [(True, 4, 2, RESUMED_AT)])],
    ids=["0", "1", "4"],
)
def test_stream_is_same_on_every_world_and_resume(
    workers: int,
    cases: list[Case],
    config: Callable[..., Config],
    many_shards_dir: Path,
    tmp_path: Path,
) -> None:
    """All cases run without loader processes.

    Loader processes only move the making of a batch, so that one case for each count is enough.
    """
    remote = fsspec.filesystem("memory")
    remote.put(str(many_shards_dir), f"/shards-{workers}", recursive=True)
    largest = max(path.stat().st_size for path in many_shards_dir.glob("*.arrow"))
    # The cache holds some of the shards, so that it evicts and fetches throughout.
    elsewhere = [
        f"--data.shards=memory://shards-{workers}",
        f"--data.cache_dir={tmp_path}",
        f"--data.cache_gb={8 * largest / 1e9}",
    ]
    found = {}
    for (is_elsewhere, micro), group in itertools.groupby(cases, key=lambda case: case[:2]):
        data = open_data(
            config(f"--batch.micro_batch_size={micro}", *(elsewhere if is_elsewhere else []))
        )
        for case in group:
            found[case] = hash_of_run(data, case[2], workers, case[3])
    assert len(found) == len(cases) == (1 if workers else 40)
    local = open_data(config())
    assert set(found.values()) == {hash_stream(local.training_batches(1), 0, STEPS)}
