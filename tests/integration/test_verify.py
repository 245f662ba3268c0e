"""Tests of scripts/verify.py: it confirms the promises, and finds planted faults.

Each launcher starts once and does all of its cases.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kantai.config.loading import load_config
from tests.helpers.commands import CONFIG, TINY, job, run_jobs, script

pytestmark = pytest.mark.slow

# This entry of tests/helpers/faults.py is no fault: it limits memory to two engines at once.
HOLDS = "third_engine_refused"
SETTINGS: dict[str | None, list[str]] = {
    None: [
        "--training.precision=fp16",
        "--data.seq_len=512",
        "--batch.micro_batch_size=8",
    ],  # in fp16, a sum of losses would overflow
    "cpu": ["--data.workers=2", "--data.packing=padded"],
    "zero2": [],
    "zero3_offload": ["--optimizer.name=muon", "--training.precision=bf16"],
}
BACKENDS = {None: "PyTorch", "cpu": "PyTorch DDP", "zero3_offload": "DeepSpeed ZeRO-3"}
FAULTS = {
    ("cpu", "mean_of_means"): {"true loss"},
    ("zero2", "dropped_rank"): {"true loss"},
    ("cpu", "dropped_micro_step"): {"true loss"},
    ("cpu", "other_data"): {"world-free", "true loss"},
    ("zero2", "lost_moment"): {"nothing lost"},
}


class Verdict(NamedTuple):
    """The certificate and the output of verify.py."""

    certificate: dict[str, Any]
    printed: str


Verdicts = Callable[[str | None], dict[str, Verdict]]


@pytest.fixture(scope="module")
def arguments(shards_dir: Path, tokenizer_dir: Path) -> list[str]:
    return [
        *TINY,
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        "--training.max_steps=100",
    ]


@pytest.fixture(scope="module")
def verdicts(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """Return a function that gives a launcher's verdicts by fault."""

    @functools.cache
    def of(launcher: str | None) -> dict[str, Verdict]:
        folder = tmp_path_factory.mktemp("verify")
        faults = [HOLDS] * (launcher in BACKENDS) + [
            fault for one, fault in FAULTS if one == launcher
        ]
        jobs = []
        for fault in faults:
            how = [
                "--config=configs/quickstart.yaml",
                *arguments,
                "--steps=2",
                f"--output={folder / f'{fault}.json'}",
            ]
            settings = SETTINGS[launcher] if fault == HOLDS else []
            jobs.append(
                job(
                    folder / "unused",
                    *how,
                    *settings,
                    program="verify",
                    fault=fault,
                    code=0 if fault == HOLDS else 1,
                )
            )
        printed = run_jobs(launcher, 2, folder, jobs)
        assert {path.name for path in folder.iterdir()} == {
            "jobs.json",
            *(f"{fault}.json" for fault in faults),
        }
        return {
            fault: Verdict(json.loads((folder / f"{fault}.json").read_text()), said)
            for fault, said in zip(faults, printed, strict=True)
        }

    return of


@pytest.mark.parametrize("launcher", BACKENDS)
def test_promises_hold_on_every_backend(
    launcher: str | None, verdicts: Verdicts, arguments: list[str]
) -> None:
    """verify.py needs little memory.

    Its micro-batches are no larger than the run's, and it holds at most two engines.
    """
    certificate, printed = verdicts(launcher)[HOLDS]
    assert "All promises hold here" in printed
    assert (certificate["holds"], certificate["backend"]) == (True, BACKENDS[launcher])
    assert {finding["promise"] for finding in certificate["findings"]} == {
        "world-free",
        "true loss",
        "nothing lost",
        "export",
    }
    assert (
        certificate["world_size"] == len(certificate["devices"]) == (1 if launcher is None else 2)
    )
    settings = [*arguments, *SETTINGS[launcher]]
    sizes = [int(rows) for rows in re.findall(r"micro-steps of (\d+) rows", printed)]
    assert sizes and max(sizes) <= load_config(CONFIG, settings).batch.micro_batch_size
    assert (
        certificate["stream_sha256"]
        in script("inspect_data", "--config", CONFIG, "--hash", 0, 2, *settings).stdout
    )


@pytest.mark.parametrize(("launcher", "fault"), FAULTS)
def test_planted_fault_is_found(launcher: str, fault: str, verdicts: Verdicts) -> None:
    certificate, printed = verdicts(launcher)[fault]
    assert {
        finding["promise"] for finding in certificate["findings"] if not finding["holds"]
    } == FAULTS[launcher, fault]
    assert "A PROMISE DOES NOT HOLD HERE" in printed
    assert not certificate["holds"]
