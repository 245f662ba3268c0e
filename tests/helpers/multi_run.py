"""Several runs of programs of scripts/ in one launch: most of a short run's time goes into imports
and joining.

accelerate launch ... -m tests.helpers.multi_run JOBS.json, where that is a list of what ``job`` of
tests/helpers/commands.py makes. In a poisoned run, the last rank's loss is NaN at those calls of
Engine.train_step. Where there is a source, the run goes on from what that run directory was after
so many steps. What only large or long runs come across comes soon: collectives for some parameters
at a time, and changes of fp16's loss scale.
"""

import contextlib
import itertools
import json
import runpy
import shutil
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from kantai.checkpoint.store import CheckpointStore
from kantai.cluster.environment import RankInfo
from kantai.diagnostics.faults import loss_multiplied
from kantai.distributed.engine import Engine
from kantai.distributed.loss_scale import LossScale
from kantai.optim import sharding
from tests.helpers.commands import BETWEEN, ROOT
from tests.helpers.faults import planted

rank_info = RankInfo.from_environment()
leave = Engine.leave
last: list[Engine] = []
sharding._BUCKET_ELEMENTS, LossScale.PATIENCE = 3000, 3
Engine.matmul_flops_per_second.__defaults__ = (
    0.01,
)  # how fast the machine is does not matter here


def poisoned(calls: list[int]) -> AbstractContextManager[None]:
    count = itertools.count()
    is_last = rank_info.rank == rank_info.world_size - 1
    return loss_multiplied(float("nan"), lambda *_: next(count) in calls and is_last)


def copy(source: Path, until: int, damaged: int, target: Path) -> None:
    """Have rank 0 copy a run directory, without its later checkpoints and perhaps with a damaged
    one.
    """
    if not rank_info.is_main:
        while not target.exists():
            time.sleep(0.01)
        return
    copied = target.with_suffix(".copy")
    shutil.copytree(source, copied)
    for step in CheckpointStore(copied).steps():
        if step > until:
            shutil.rmtree(CheckpointStore(copied).path(step))
    for path in sorted(CheckpointStore(copied).path(damaged).glob("*.safetensors"))[:1]:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    copied.rename(target)


def leave_open(self: Engine) -> None:
    """The process group serves the next run."""
    assert (
        self.raw_model.lm_head.decoder.weight
        is self.raw_model.roberta.embeddings.word_embeddings.weight
    )
    last[:] = [self]


def run(job: dict[str, Any]) -> None:
    """Do one; its exit code must be the one that is expected."""
    if job["source"] is not None:
        copy(Path(job["source"]), job["until"], job["damaged"], Path(job["run_dir"]))
    sys.argv = [job["program"], *job["arguments"]]
    code: Any = 0
    fault = planted(job["fault"]) if job["fault"] else contextlib.nullcontext()
    with fault, poisoned(job["poisoned"]):
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{job['program']}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    if code != job["code"]:
        sys.exit(f"{job['program']} ended with {code}, not {job['code']}: {job}")


if __name__ == "__main__":
    Engine.leave = leave_open  # type: ignore[method-assign]
    for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        if number and rank_info.is_main:
            print(BETWEEN, end="", flush=True)
        run(job)
    if last:
        leave(last[0])
