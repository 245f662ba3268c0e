"""Several runs of scripts/pretrain.py in one launch: most of a short run's time goes into imports and joining.

accelerate launch ... tests/helpers/multi_run.py JOBS.json, where that is a list of {"run_dir", "arguments", "poisoned", "source", "until"}.
In a poisoned run, the last rank's loss is NaN at those calls of Engine.train_step. Where there is a source, the run goes on from what that run directory was
after so many steps. What only large or long runs come across comes soon: collectives for some parameters at a time, and changes of fp16's loss scale.
"""

import itertools
import json
import runpy
import shutil
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

from kantai.checkpoint.store import CheckpointStore
from kantai.cluster.environment import RankInfo
from kantai.diagnostics.faults import loss_multiplied
from kantai.distributed.engine import Engine
from kantai.distributed.loss_scale import LossScale
from kantai.optim import sharding

ROOT = Path(__file__).parents[2]
rank_info = RankInfo.from_environment()
leave = Engine.leave
last: list[Engine] = []
sharding._BUCKET_ELEMENTS, LossScale.PATIENCE = 3000, 3


def poisoned(calls: list[int]) -> AbstractContextManager[None]:
    count = itertools.count()
    is_last = rank_info.rank == rank_info.world_size - 1
    return loss_multiplied(float("nan"), lambda *_: next(count) in calls and is_last)


def copy(source: Path, until: int, target: Path) -> None:
    """Have rank 0 copy a run directory, without its later checkpoints."""
    if not rank_info.is_main:
        while not target.exists():
            time.sleep(0.01)
        return
    copied = target.with_suffix(".copy")
    shutil.copytree(source, copied)
    for step in CheckpointStore(copied).steps():
        if step > until:
            shutil.rmtree(CheckpointStore(copied).path(step))
    copied.rename(target)


def leave_open(self: Engine) -> None:
    """The process group serves the next run."""
    assert self.raw_model.lm_head.decoder.weight is self.raw_model.roberta.embeddings.word_embeddings.weight
    last[:] = [self]


Engine.leave = leave_open  # type: ignore[method-assign]
for job in json.loads(Path(sys.argv[1]).read_text()):
    if job["source"] is not None:
        copy(Path(job["source"]), job["until"], Path(job["run_dir"]))
    sys.argv = ["pretrain.py", *job["arguments"], f"--run_dir={job['run_dir']}"]
    try:
        with poisoned(job["poisoned"]):
            runpy.run_path(str(ROOT / "scripts" / "pretrain.py"), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
leave(last[0])
