"""Tests that damage files at random: reading a file succeeds or raises one UserError.

They change bytes, and replace values of JSON and YAML. Some sign the manifest again afterwards, so
that reading reaches the checks after the checksums.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kantai.checkpoint.state import load_weights
from kantai.checkpoint.store import CheckpointStore
from kantai.cluster.environment import RankInfo
from kantai.config.loading import load_config
from kantai.data.dataset import open_data
from kantai.data.inspect import describe_shards, hash_stream
from kantai.data.tokenizer import load_tokenizer
from kantai.distributed.engine import Engine
from kantai.errors import UserError
from kantai.model.roberta import build_model
from kantai.storage.atomic import MANIFEST, digest, sha256
from kantai.training.metrics import Metrics, read_metrics
from kantai.training.run_dir import open_run_dir, open_saved_run
from kantai.training.skipped_data import SkippedData
from tests.helpers.commands import CONFIG, TINY

fuzz = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Reads files as a program does; any error but a UserError fails the test.
Read = Callable[[], object]


@st.composite
def byte_damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Draw a function that flips, cuts off, removes or inserts some bytes."""
    how = draw(st.sampled_from("flip cut remove insert".split()))
    at = draw(st.floats(0, 1))
    some = draw(st.binary(min_size=1, max_size=20))

    def damage(content: bytes) -> bytes:
        place = int(at * len(content))
        if how == "flip":
            changed = bytes(
                a ^ b for a, b in zip(content[place : place + len(some)], some, strict=False)
            )
            return content[:place] + changed + content[place + len(changed) :]
        behind = {
            "cut": b"",
            "remove": content[place + len(some) :],
            "insert": some + content[place:],
        }
        return content[:place] + behind[how]

    return damage


any_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def value_exchanges(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Draw a function that replaces or removes one value in a tree of dicts and lists."""
    path = draw(st.lists(st.integers(0, 99), max_size=6))
    value = draw(any_value)
    gone = draw(st.booleans())

    def exchange(tree: Any, path: list[int] = path) -> Any:
        if not path or not isinstance(tree, dict | list) or not tree:
            return value
        copy: Any = tree.copy()
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = keys[path[0] % len(keys)]
        if gone and len(path) == 1:
            del copy[key]
        else:
            copy[key] = exchange(tree[key], path[1:])
        return copy

    return exchange


def sign_again(folder: Path, change: Callable[[Any], Any] = lambda tree: tree) -> None:
    """Write a manifest with the sizes and hashes that the folder's files now have."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in manifest["files"]
    }
    changed = change({**manifest, "files": files})
    signed = {**changed, "digest": digest(changed)} if isinstance(changed, dict) else changed
    (folder / MANIFEST).write_text(json.dumps(signed))


def assert_read_ends_well(folder: Path, read: Read) -> None:
    """Fail unless reading succeeds or raises a UserError with a message, and writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    try:
        read()
    except UserError as error:
        assert str(error)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.fixture
def inputs_dir(tmp_path: Path, shards_dir: Path, tokenizer_dir: Path) -> Path:
    """Return a folder with shards, a tokenizer and a config."""
    shutil.copytree(shards_dir, tmp_path / "shards")
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    (tmp_path / "config.yaml").write_text(CONFIG.read_text())
    return tmp_path


def training_read(inputs_dir: Path) -> Read:
    """Return a function that reads shards, tokenizer and run directory as training does."""

    def read() -> None:
        where = [
            f"--data.shards={inputs_dir / 'shards'}",
            f"--data.tokenizer={inputs_dir / 'tokenizer'}",
            f"--run_dir={inputs_dir / 'run'}",
        ]
        config = load_config(
            inputs_dir / "config.yaml",
            [*TINY, *where, "--training.max_steps=4", "--training.epochs=null"],
        )
        data = open_data(config)
        open_run_dir(config, data).newest()
        list(describe_shards(data.shards, data.vocabulary))
        hash_stream(data.training_batches(1), 0, 4)
        data.held_out_batches(rows=4)[0].micro_batch(0, 0, 0)
        assert data.prompts is not None
        assert np.isfinite(data.unigram_entropy)

    return read


@fuzz
@given(damage=byte_damages())
def test_config_of_damaged_bytes_raises_only_user_errors(
    damage: Callable[[bytes], bytes], inputs_dir: Path
) -> None:
    (inputs_dir / "config.yaml").write_bytes(damage(CONFIG.read_bytes()))
    assert_read_ends_well(inputs_dir, lambda: load_config(inputs_dir / "config.yaml"))


@fuzz
@given(exchange=value_exchanges())
def test_config_of_random_values_raises_only_user_errors(
    exchange: Callable[[Any], Any], inputs_dir: Path
) -> None:
    (inputs_dir / "config.yaml").write_text(
        yaml.safe_dump(exchange(yaml.safe_load(CONFIG.read_text())))
    )
    assert_read_ends_well(inputs_dir, lambda: load_config(inputs_dir / "config.yaml"))


@fuzz
@given(damage=byte_damages(), which=st.integers(0, 99), signs=st.booleans())
def test_shards_of_damaged_bytes_raise_only_user_errors(
    damage: Callable[[bytes], bytes], which: int, signs: bool, inputs_dir: Path, shards_dir: Path
) -> None:
    files = sorted(path.name for path in shards_dir.iterdir() if path.is_file())
    name = files[which % len(files)]
    (inputs_dir / "shards" / name).write_bytes(damage((shards_dir / name).read_bytes()))
    if signs and name != MANIFEST:
        sign_again(inputs_dir / "shards")
    assert_read_ends_well(inputs_dir, training_read(inputs_dir))
    for restored in (name, MANIFEST):
        shutil.copy(shards_dir / restored, inputs_dir / "shards" / restored)


@fuzz
@given(exchange=value_exchanges())
def test_manifest_of_random_values_raises_only_user_errors(
    exchange: Callable[[Any], Any], inputs_dir: Path, shards_dir: Path
) -> None:
    sign_again(inputs_dir / "shards", exchange)
    assert_read_ends_well(inputs_dir, training_read(inputs_dir))
    shutil.copy(shards_dir / MANIFEST, inputs_dir / "shards" / MANIFEST)


@fuzz
@given(damage=byte_damages(), exchange=value_exchanges(), bytewise=st.booleans())
def test_damaged_tokenizer_raises_only_user_errors(
    damage: Callable[[bytes], bytes],
    exchange: Callable[[Any], Any],
    bytewise: bool,
    inputs_dir: Path,
    tokenizer_dir: Path,
) -> None:
    content = (tokenizer_dir / "tokenizer.json").read_bytes()
    changed = damage(content) if bytewise else json.dumps(exchange(json.loads(content))).encode()
    (inputs_dir / "tokenizer" / "tokenizer.json").write_bytes(changed)

    def encode() -> None:
        ids, lengths = load_tokenizer(inputs_dir / "tokenizer").encode(
            ["I think. ü", "", "x" * 100]
        )
        assert len(ids) == lengths.sum()

    assert_read_ends_well(inputs_dir, encode)
    assert_read_ends_well(inputs_dir, training_read(inputs_dir))


@pytest.fixture(scope="module")
def saved(
    shards_dir: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Engine]]:
    """Yield a run directory with checkpoints, and an engine that can load them."""
    run = tmp_path_factory.mktemp("saved") / "run"
    where = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}", f"--run_dir={run}"]
    config = load_config(
        CONFIG, [*TINY, *where, "--training.max_steps=4", "--training.epochs=null"]
    )
    run_dir = open_run_dir(config, open_data(config))
    run_dir.create()
    engine = Engine(
        RankInfo(0, 1, 0),
        build_model(
            config.model, run_dir.data.vocabulary, seq_len=config.data.seq_len, seed=config.seed
        ),
        config.optimizer,
        config.training,
        seed=config.seed,
    )
    store = run_dir.store
    store.supersede()
    for step in (2, 4):
        store.publish(step, engine.save_state(store.begin(step)), lineage=run_dir.lineage)
    metrics = Metrics(run, store, 1, 0.0)
    metrics.log(
        1,
        {
            "train/loss": 7.0,
            "train/grad_norm": 1.0,
            "train/skipped": 0.0,
            "speed/step_seconds": 1.0,
        },
    )
    metrics.finish()
    SkippedData.of(run).skip(2, 3, store)
    yield run, engine
    engine.leave()


def resume_read(run: Path, engine: Engine) -> Read:
    """Return a function that reads a run as a resume and an export do."""

    def read() -> None:
        opened, step = open_saved_run(run)
        SkippedData.of(run)
        engine.load_state(opened.store.path(step))
        load_weights(engine.raw_model, opened.store.path(step))

    return read


@pytest.mark.slow
@fuzz
@given(damage=byte_damages(), which=st.integers(0, 99), signs=st.booleans())
def test_run_dir_of_damaged_bytes_raises_only_user_errors(
    damage: Callable[[bytes], bytes],
    which: int,
    signs: bool,
    saved: tuple[Path, Engine],
    tmp_path: Path,
) -> None:
    run, engine = saved
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    files = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())
    path = files[which % len(files)]
    path.write_bytes(damage(path.read_bytes()))
    if signs and path.suffix == ".safetensors":
        sign_again(path.parent)
    assert_read_ends_well(tmp_path, resume_read(tmp_path / "run", engine))


@pytest.mark.slow
@fuzz
@given(
    exchange=value_exchanges(),
    name=st.sampled_from(["manifest", "header", "skipped_data", "config"]),
)
def test_run_dir_of_random_values_raises_only_user_errors(
    exchange: Callable[[Any], Any], name: str, saved: tuple[Path, Engine], tmp_path: Path
) -> None:
    run, engine = saved
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    newest = CheckpointStore(tmp_path / "run").path(4)
    if name == "manifest":
        sign_again(newest, exchange)
    elif name == "header":
        (path,) = newest.glob("*.safetensors")
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(exchange(json.loads(content[8 : 8 + size]))).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
        sign_again(newest)
    elif name == "skipped_data":
        line = json.loads((tmp_path / "run" / "skipped_data.jsonl").read_text())
        (tmp_path / "run" / "skipped_data.jsonl").write_text(json.dumps(exchange(line)) + "\n")
    else:
        path = tmp_path / "run" / "config.yaml"
        path.write_text(yaml.safe_dump(exchange(yaml.safe_load(path.read_text()))))
    assert_read_ends_well(tmp_path, resume_read(tmp_path / "run", engine))


@fuzz
@given(damage=byte_damages())
def test_metrics_continue_after_damaged_bytes(
    damage: Callable[[bytes], bytes], saved: tuple[Path, Engine], tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(damage((saved[0] / "metrics.jsonl").read_bytes() * 3))
    assert_metrics_continue(tmp_path)


@fuzz
@given(exchange=value_exchanges(), name=st.sampled_from(["metrics", "starts"]))
def test_metrics_continue_after_random_values(
    exchange: Callable[[Any], Any], name: str, saved: tuple[Path, Engine], tmp_path: Path
) -> None:
    for each in ("metrics", "starts"):
        line = json.loads((saved[0] / f"{each}.jsonl").read_text())
        (tmp_path / f"{each}.jsonl").write_text(
            json.dumps(exchange(line) if each == name else line) + "\n"
        )
    assert_metrics_continue(tmp_path)


def assert_metrics_continue(run: Path) -> None:
    store = CheckpointStore(run)
    store.supersede()
    metrics = Metrics(run, store, 2, 0.0)
    metrics.last("train/loss", 5)
    metrics.goodput.after_step(1.0)
    metrics.log(2, {"train/loss": 1.0})
    metrics.finish()
    *_, last = read_metrics(run / "metrics.jsonl")
    assert last["step"] == 2 and last["train/loss"] == 1.0
