"""A run of kantai 0.1.0 is refused with the command that converts it, and then goes on as it was.

``run-0.1.0.tar.xz`` was written by that release: a run of six steps in two stages, its metrics to
the end, and its checkpoint of step 4.
"""

import itertools
import json
import tarfile
from pathlib import Path

import pytest

from kantai.checkpoint.store import CheckpointStore
from kantai.config.loading import load_config
from kantai.errors import UserError
from kantai.training.conversion import convert_run
from tests.helpers.commands import script
from tests.helpers.runs import metrics


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder with tokenizer, shards, run and config.yaml, unpacked."""
    with tarfile.open(Path(__file__).parent / "run-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "fixture"


def arguments(old: Path) -> list[str]:
    where = [f"--run_dir={old / 'run'}", f"--data.shards={old / 'shards'}"]
    return ["--config", str(old / "config.yaml"), *where, f"--data.tokenizer={old / 'tokenizer'}"]


def losses_before(old: Path) -> list[float]:
    records = [json.loads(line) for line in (old / "run/metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_config_and_run_are_refused_by_the_command_that_converts_them(old: Path) -> None:
    done = script("pretrain", *arguments(old), "--check", f"--run_dir={old / 'new'}")
    assert done.returncode == 2
    assert f"python scripts/convert.py {old / 'config.yaml'}" in done.stderr
    done = script("pretrain", *arguments(old), "--check")
    assert done.returncode == 2
    assert f"python scripts/convert.py {old / 'run'}" in done.stderr
    done = script("evaluate", old / "run")
    assert done.returncode == 2
    assert f"python scripts/convert.py {old / 'run'}" in done.stderr


def test_converted_config_keeps_its_comments(old: Path) -> None:
    done = script("convert", old / "config.yaml")
    assert done.returncode == 0, done.stderr
    text = (old / "config.yaml").read_text()
    assert text.startswith("# A run of kantai 0.1.0, for tests of the conversion.\n")
    assert "  max_steps: 6 # comments stay\n" in text
    config = load_config(old / "config.yaml")
    assert config.checkpoint.every_steps == 2
    assert config.stages[0].until_step == 3
    assert "nothing to rename" in script("convert", old / "config.yaml").stdout


@pytest.mark.slow
def test_converted_run_goes_on_as_the_old_release_did(old: Path) -> None:
    before = losses_before(old)
    window = {"from_update": 9, "first": 9, "stop": 12}
    (old / "run/passed_over.jsonl").write_text(json.dumps(window) + "\n")
    for path in ("config.yaml", "run"):
        done = script("convert", old / path)
        assert done.returncode == 0, done.stderr
    assert "update-00000004: now step-00000004" in done.stdout
    skipped = (old / "run/skipped_data.jsonl").read_text()
    assert json.loads(skipped) == {"from_step": 9, "first": 9, "stop": 12}
    assert metrics(old / "run", "train/loss") == before
    done = script("pretrain", *arguments(old))
    assert done.returncode == 0, done.stderr
    assert "6 steps, 4 done" in done.stdout
    assert metrics(old / "run", "train/loss") == pytest.approx(before, rel=1e-5)


def test_conversion_goes_on_after_a_kill(old: Path) -> None:
    lines = len(list(convert_run(old / "run")))
    for done in range(lines):
        with tarfile.open(Path(__file__).parent / "run-0.1.0.tar.xz") as archive:
            archive.extractall(old / str(done), filter="data")
        run = old / str(done) / "fixture/run"
        list(itertools.islice(convert_run(run), done))
        if done < lines - 1:
            list(convert_run(run))
        assert CheckpointStore(run).newest_valid() is not None
        assert metrics(run, "train/loss") == metrics(old / "run", "train/loss")


def test_other_settings_than_the_checkpoints_are_refused(old: Path) -> None:
    path = old / "run/config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match="made with other settings"):
        list(convert_run(old / "run"))
    assert (old / "run/checkpoints/update-00000004").exists()


def test_run_of_words_is_left_to_the_old_release(old: Path) -> None:
    path = old / "run/config.yaml"
    before = path.read_text()
    for unit in ("word", "span"):
        path.write_text(before.replace("unit: token", f"unit: {unit}"))
        with pytest.raises(UserError, match=r"finish the run with kantai 0\.1"):
            list(convert_run(old / "run"))
        assert (old / "run/checkpoints/update-00000004").exists()
        assert not (old / "run/version.json").exists()
