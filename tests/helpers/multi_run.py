"""Do several runs of programs in scripts/ in one launch.

Imports and the process group take most of a short run's time, and one launch pays them once.

    accelerate launch ... -m tests.helpers.multi_run JOBS.json

JOBS.json is a list of jobs of tests/helpers/commands.py. The last rank's loss is NaN at the calls
``nan_calls`` of Engine.train_step. A run with a source resumes from a copy of that run directory.
Small limits make a short run meet cases of large and long ones: collectives of some parameters at
a time, and changes of fp16's loss scale.
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
from tests.helpers.commands import ROOT, RUN_SEPARATOR
from tests.helpers.faults import planted_fault

rank_info = RankInfo.from_environment()
leave = Engine.leave
last_engine: list[Engine] = []

sharding._BUCKET_ELEMENTS = 3000
LossScale.PATIENCE = 3
# The tests need no exact speed of the machine, so that its measurement is short.
Engine.matmul_flops_per_second.__defaults__ = (0.01,)


def nan_losses(calls: list[int]) -> AbstractContextManager[None]:
    """Make the last rank's loss NaN at these calls."""
    count = itertools.count()
    is_last = rank_info.rank == rank_info.world_size - 1
    return loss_multiplied(float("nan"), lambda *_: next(count) in calls and is_last)


def copy(source: Path, until: int, damaged: int, target: Path) -> None:
    """Have rank 0 copy a run directory up to a step, and damage the checkpoint of one step."""
    if not rank_info.is_main:
        while not target.exists():
            time.sleep(0.01)
        return
    copied = target.with_suffix(".copy")
    # Each rank removes its own file of stacks when its run ends, perhaps just now.
    shutil.copytree(source, copied, ignore=shutil.ignore_patterns("rank-*.txt"))
    for step in CheckpointStore(copied).steps():
        if step > until:
            shutil.rmtree(CheckpointStore(copied).path(step))
    for path in sorted(CheckpointStore(copied).path(damaged).glob("*.safetensors"))[:1]:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    copied.rename(target)


def keep_process_group(self: Engine) -> None:
    """Leave the process group open for the next run."""
    assert (
        self.raw_model.lm_head.decoder.weight
        is self.raw_model.roberta.embeddings.word_embeddings.weight
    )
    last_engine[:] = [self]


def run(job: dict[str, Any]) -> None:
    """Do one job; exit with a message unless its exit code is the expected one."""
    if job["source"] is not None:
        copy(Path(job["source"]), job["until"], job["damaged"], Path(job["run_dir"]))
    sys.argv = [job["program"], *job["arguments"]]
    code: Any = 0
    fault = planted_fault(job["fault"]) if job["fault"] else contextlib.nullcontext()
    with fault, nan_losses(job["nan_calls"]):
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{job['program']}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    if code != job["code"]:
        sys.exit(f"{job['program']} ended with {code}, not {job['code']}: {job}")


if __name__ == "__main__":
    Engine.leave = keep_process_group  # type: ignore[method-assign]
    for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        if number and rank_info.is_main:
            print(RUN_SEPARATOR, end="", flush=True)
        run(job)
    if last_engine:
        leave(last_engine[0])
