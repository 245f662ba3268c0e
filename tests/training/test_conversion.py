"""A run of kantai 0.1.0 is refused until it is converted, and then continues with equal losses.

kantai 0.1.0 wrote ``run-0.1.0.tar.xz``: a run of six steps in two stages, with the metrics of all
steps and the checkpoint of step 4.
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
from kantai.training.run_dir import VERSION_FILE
from tests.helpers.commands import script
from tests.helpers.runs import metrics


@pytest.fixture
def old_dir(tmp_path: Path) -> Path:
    """The unpacked folder with tokenizer, shards, run and config.yaml."""
    with tarfile.open(Path(__file__).parent / "run-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "fixture"


def arguments(old_dir: Path) -> list[str]:
    where = [
        f"--run_dir={old_dir / 'run'}",
        f"--data.shards={old_dir / 'shards'}",
        f"--data.tokenizer={old_dir / 'tokenizer'}",
    ]
    return ["--config", str(old_dir / "config.yaml"), *where]


def recorded_losses(old_dir: Path) -> list[float]:
    records = [
        json.loads(line) for line in (old_dir / "run/metrics.jsonl").read_text().splitlines()
    ]
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_refusal_names_conversion_command(old_dir: Path) -> None:
    done = script("pretrain", *arguments(old_dir), "--check", f"--run_dir={old_dir / 'new'}")
    assert done.returncode == 2
    assert f"python scripts/convert.py {old_dir / 'config.yaml'}" in done.stderr

    done = script("pretrain", *arguments(old_dir), "--check")
    assert done.returncode == 2
    assert f"python scripts/convert.py {old_dir / 'run'}" in done.stderr

    done = script("evaluate", old_dir / "run")
    assert done.returncode == 2
    assert f"python scripts/convert.py {old_dir / 'run'}" in done.stderr


def test_converted_config_keeps_comments(old_dir: Path) -> None:
    done = script("convert", old_dir / "config.yaml")
    assert done.returncode == 0, done.stderr
    text = (old_dir / "config.yaml").read_text()
    assert text.startswith("# A run of kantai 0.1.0, for tests of the conversion.\n")
    assert "  max_steps: 6 # comments stay\n" in text
    config = load_config(old_dir / "config.yaml")
    assert config.checkpoint.every_steps == 2
    assert config.stages[0].until_step == 3
    assert "nothing to rename" in script("convert", old_dir / "config.yaml").stdout


@pytest.mark.slow
def test_converted_run_reproduces_old_losses(old_dir: Path) -> None:
    losses = recorded_losses(old_dir)
    window = {"from_update": 9, "first": 9, "stop": 12}
    (old_dir / "run/passed_over.jsonl").write_text(json.dumps(window) + "\n")
    for path in ("config.yaml", "run"):
        done = script("convert", old_dir / path)
        assert done.returncode == 0, done.stderr
    assert "update-00000004: now step-00000004" in done.stdout
    skipped = (old_dir / "run/skipped_data.jsonl").read_text()
    assert json.loads(skipped) == {"from_step": 9, "first": 9, "stop": 12}
    assert metrics(old_dir / "run", "train/loss") == losses

    done = script("pretrain", *arguments(old_dir))
    assert done.returncode == 0, done.stderr
    assert "6 steps, 4 done" in done.stdout
    assert metrics(old_dir / "run", "train/loss") == pytest.approx(losses, rel=1e-5)


def test_conversion_continues_after_kill(old_dir: Path) -> None:
    lines = len(list(convert_run(old_dir / "run")))
    for done in range(lines):
        with tarfile.open(Path(__file__).parent / "run-0.1.0.tar.xz") as archive:
            archive.extractall(old_dir / str(done), filter="data")
        run = old_dir / str(done) / "fixture/run"
        list(itertools.islice(convert_run(run), done))
        list(convert_run(run))
        assert (run / VERSION_FILE).exists()
        assert CheckpointStore(run).newest_valid() is not None
        assert metrics(run, "train/loss") == metrics(old_dir / "run", "train/loss")


def test_conversion_refuses_changed_settings(old_dir: Path) -> None:
    path = old_dir / "run/config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match="made with other settings"):
        list(convert_run(old_dir / "run"))
    assert (old_dir / "run/checkpoints/update-00000004").exists()


def test_run_of_words_is_left_to_the_old_release(old_dir: Path) -> None:
    path = old_dir / "run/config.yaml"
    before = path.read_text()
    for unit in ("word", "span"):
        path.write_text(before.replace("unit: token", f"unit: {unit}"))
        with pytest.raises(UserError, match=r"finish the run with kantai 0\.1"):
            list(convert_run(old_dir / "run"))
        assert (old_dir / "run/checkpoints/update-00000004").exists()
        assert not (old_dir / "run/version.json").exists()
