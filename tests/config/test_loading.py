"""Loading merges a file with arguments, and refuses wrong ones in one line.

A run refuses settings that would change its result.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kantai.config.loading import (
    as_written,
    describe,
    fixed_settings,
    load_config,
    read_run_dir,
    refuse_other_run,
    save_config,
    schema,
)
from kantai.config.schema import Config
from kantai.config.synonyms import SYNONYMS
from kantai.errors import UserError
from tests.helpers.commands import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

SMALLEST = (
    "run_dir: runs/a\ndata: {shards: shards, tokenizer: tokenizer}\ntraining: {max_steps: 10}\n"
)


def load(tmp_path: Path, text: str = SMALLEST, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def with_value(config: Config, key: str, value: Any) -> Config:
    *sections, name = key.split(".")
    if not sections:
        return config.model_copy(update={name: value})
    section = getattr(config, sections[0]).model_copy(update={name: value})
    return config.model_copy(update={sections[0]: section})


def test_arguments_override_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        SMALLEST + "optimizer: {learning_rate: 1.0e-3, schedule: cosine}\n",
        "--optimizer.learning_rate=2e-3",
        "--data.seq_len=128",
        "--evaluation.prompts=[Human <mask>., 'a: <mask>']",
        "--seed=7",
        "--seed=8",
        "--run_dir=runs/b=c",
    )
    assert (config.optimizer.learning_rate, config.optimizer.schedule) == (2e-3, "cosine")
    assert (config.data.seq_len, config.seed, config.evaluation.prompts) == (
        128,
        8,
        ["Human <mask>.", "a: <mask>"],
    )
    assert Path(config.run_dir).name == "b=c"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("5e-4", 5e-4),
        ("6E-4", 6e-4),
        ("1e3", 1000.0),
        ("+2e-3", 2e-3),
        ("2.e-3", 2e-3),
        ("0.001", 0.001),
        ("1", 1.0),
    ],
)
def test_scientific_notation_loads_as_number(tmp_path: Path, written: str, value: float) -> None:
    assert (
        load(
            tmp_path, SMALLEST + f"optimizer: {{learning_rate: {written}}}"
        ).optimizer.learning_rate
        == value
    )
    assert (
        load(tmp_path, SMALLEST, f"--optimizer.learning_rate={written}").optimizer.learning_rate
        == value
    )


def test_number_like_strings_stay_strings(tmp_path: Path) -> None:
    config = load(
        tmp_path, SMALLEST.replace("shards: shards", "shards: shards-5e-4"), "--data.tokenizer=v1e5"
    )
    assert (Path(config.data.shards).name, Path(config.data.tokenizer).name) == (
        "shards-5e-4",
        "v1e5",
    )


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(tmp_path)
    assert config.run_dir == str(tmp_path / "runs" / "a")
    assert (config.data.shards, config.data.tokenizer) == (
        str(tmp_path / "shards"),
        str(tmp_path / "tokenizer"),
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--batch.micro_batchsize=3",
            "unknown key 'batch.micro_batchsize'; the nearest known one is "
            "'batch.micro_batch_size'",
        ),
        (
            "--learning_rate=1",
            "unknown key 'learning_rate'; the nearest known one is 'optimizer.learning_rate'",
        ),
        ("--modle.hidden_size=1", "unknown key 'modle'; the nearest known one is 'model'"),
        ("--data.seq_len=many", "data.seq_len: should be a valid integer, not 'many'"),
        ("--data.seq_len=128.0", "data.seq_len: should be a valid integer, not 128.0"),
        ("--data.seq_len=true", "data.seq_len: should be a valid integer, not True"),
        ("--data.seq_len=", "data.seq_len: should be a valid integer, not None"),
        ("--data.seq_len=7", "data.seq_len: should be greater than or equal to 8, not 7"),
        (
            "--data.packing=sorted",
            "data.packing: should be 'contiguous', 'isolated' or 'padded', not 'sorted'",
        ),
        ("--data.packing=5", "data.packing: should be 'contiguous', 'isolated' or 'padded', not 5"),
        ("--masking.ratio=0", "masking.ratio: should be greater than 0, not 0"),
        ("--masking.ratio=1", "masking.ratio: should be less than 1, not 1"),
        ("--masking.random_share=0.3", "masking: mask_share + random_share must not exceed 1"),
        (
            "--model.num_attention_heads=7",
            "model: num_attention_heads 7 does not divide hidden_size 768",
        ),
        ("--optimizer.learning_rate=.nan", "optimizer.learning_rate: should be "),
        ("--optimizer.learning_rate=.inf", "optimizer.learning_rate: should be "),
        ("--training.epochs=3", "training: give exactly one of max_steps and epochs"),
        ("--training.max_steps=null", "training: give exactly one of max_steps and epochs"),
        ("--training=3", "training: should be a valid dictionary"),
        ("--checkpoint.keep=1", "checkpoint.keep: should be greater than or equal to 2, not 1"),
        ("--seed=-1", "seed: should be greater than or equal to 0, not -1"),
        ("--seed=99999999999999999999", "seed: should be less than "),
        ("--evaluation.prompts=<mask>", "evaluation.prompts: should be a valid list, not '<mask>'"),
        ("--data.seq_len.x=1", "seq_len is a value, not a section"),
        (
            "--data.seq_len",
            "cannot read the argument '--data.seq_len': settings are given as --section.key=value",
        ),
        ("data.seq_len=128", "cannot read the argument 'data.seq_len=128'"),
    ],
)
def test_wrong_setting_is_refused_in_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(
            tmp_path,
            SMALLEST.replace("tokenizer: tokenizer", "tokenizer: tokenizer, seq_len: 64"),
            override,
        )
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["run_dir", "data", "data.shards", "data.tokenizer", "training"])
def test_missing_setting_is_named(tmp_path: Path, key: str) -> None:
    tree = yaml.safe_load(SMALLEST)
    *sections, name = key.split(".")
    del (tree[sections[0]] if sections else tree)[name]
    with pytest.raises(
        UserError, match=rf"{key} is missing; add it to the file or give --{key}=\.\.\."
    ):
        load(tmp_path, yaml.safe_dump(tree))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no keys"),
        (b"- a\n- b\n", "has no keys"),
        (b"a: [1\n", "is not YAML"),
        (b"a: \xff\n", "is not YAML"),
        (b"[" * 400, "is not YAML"),
        (b"? [a]\n: b\n", "run_dir is missing"),
        (b"when: 2026-99-99\n", "is not YAML"),
        (SMALLEST.encode() + b"1: 2\n", "1: Keys should be strings"),
    ],
)
def test_malformed_config_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"bad\.yaml.*{message}"):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize("name", ["nothing.yaml", ""])
def test_unreadable_config_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"cannot read the config {tmp_path / name}: "):
        load_config(tmp_path / name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_survives_saving(tmp_path: Path, path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_saving_keeps_special_values(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        SMALLEST.replace("runs/a", "\"läufe/#1: 'x' \""),
        "--optimizer.learning_rate=1e-7",
        "--optimizer.adam_eps=1e-12",
        '--evaluation.prompts=["Kant: <mask>", "1e5", "no", "", "ü \\n 理性"]',
    )
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


CHANGES = {
    "seed": 1,
    "data.seq_len": 64,
    "data.packing": "padded",
    "data.shuffle_window": 3,
    "training.max_steps": 11,
    "training.precision": "bf16",
    "masking.ratio": 0.4,
    "masking.unit": "word",
    "masking.final_ratio": 0.1,
    "model.hidden_size": 1536,
    "model.vocab_size": 1024,
    "batch.global_batch_size": 255,
    "batch.micro_batch_size": 4,  # with dropout, which is the default
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 1,
}
MAY_CHANGE = {
    "run_dir": "/elsewhere",
    "data.shards": "/elsewhere",
    "data.tokenizer": "/elsewhere",
    "data.workers": 2,
    "data.verify_hashes": True,
    "data.cache_dir": "/elsewhere",
    "data.cache_gb": 1.0,
    "checkpoint.every_steps": 5,
    "checkpoint.keep": 9,
    "failures.spike_factor": None,
    "failures.hang_seconds": 9,
    "failures.compare_replicas_every": 5,
    "training.compile": True,
    "training.log_every_steps": 10,
    "evaluation.every_steps": 5,
    "evaluation.max_sequences": 5,
    "evaluation.prompts": ["<mask>"],
}


@pytest.mark.parametrize(("key", "value"), CHANGES.items())
def test_run_refuses_changed_result_setting(tmp_path: Path, key: str, value: object) -> None:
    config = load(tmp_path)
    with pytest.raises(UserError) as error:
        refuse_other_run(with_value(config, key, value), config)
    assert f"belongs to a run of another config: {key} was " in str(
        error.value
    ) and f" and is {as_written(value)}. " in str(error.value)


@pytest.mark.parametrize(("key", "value"), MAY_CHANGE.items())
def test_run_accepts_changed_execution_setting(tmp_path: Path, key: str, value: object) -> None:
    config = load(tmp_path)
    changed = with_value(config, key, value)
    assert changed != config
    refuse_other_run(changed, config)


def test_every_setting_is_fixed_or_changeable(tmp_path: Path) -> None:
    fixed = fixed_settings(load(tmp_path))
    described = {
        line.split("=")[0].strip(" -")
        for line in describe().splitlines()
        if line.startswith("  --")
    }
    assert fixed.keys() | MAY_CHANGE.keys() == described
    assert fixed.keys().isdisjoint(MAY_CHANGE) and CHANGES.keys() <= fixed.keys()


@pytest.mark.parametrize("name", ["2026", "2026-11-22", "1e5", "a #1", "true", "[x"])
def test_run_dir_may_look_like_yaml_value(name: str) -> None:
    assert (
        load_config(ROOT / "configs/quickstart.yaml", [f"--run_dir=/tmp/{name}"]).run_dir
        == f"/tmp/{name}"
    )
    assert load_config(ROOT / "configs/quickstart.yaml", [f"--run_dir={name}"]).run_dir == str(
        Path(name).absolute()
    )


def test_tilde_expands_to_home() -> None:
    assert load_config(ROOT / "configs/quickstart.yaml", ["--run_dir=~/x"]).run_dir == str(
        Path.home() / "x"
    )


def test_duplicate_section_fails_and_empty_has_defaults(tmp_path: Path) -> None:
    text = (ROOT / "configs/quickstart.yaml").read_text()
    (tmp_path / "twice.yaml").write_text(text + "optimizer:\n  learning_rate: 1\n")
    with pytest.raises(UserError, match="optimizer is given twice"):
        load_config(tmp_path / "twice.yaml")

    (tmp_path / "empty.yaml").write_text(text + "masking:\n")
    assert load_config(tmp_path / "empty.yaml", ["--masking.ratio=0.3"]).masking.ratio == 0.3
    assert load_config(tmp_path / "empty.yaml").masking.ratio == 0.15


def test_micro_batch_size_may_change_without_dropout(tmp_path: Path) -> None:
    dropout = ["--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0"]
    for given, message in ((dropout, None), (dropout[:1], "batch.micro_batch_size was 32 and is")):
        config = load(tmp_path, SMALLEST, *given)
        changed = with_value(config, "batch.micro_batch_size", 4)
        if message is None:
            refuse_other_run(changed, config)
            continue
        with pytest.raises(UserError, match=message):
            refuse_other_run(changed, config)


def test_refused_change_says_why(tmp_path: Path) -> None:
    config = load(tmp_path)
    for key, value in (("optimizer.learning_rate", 1e-5), ("training.precision", "bf16")):
        with pytest.raises(UserError, match="What decides the result is fixed for a run"):
            refuse_other_run(with_value(config, key, value), config)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("fp16", "kantai's setting for it is 'training.precision'"),
        ("training.bf16", "kantai's setting for it is 'training.precision'"),
        ("optimizer.lr", "kantai's setting for it is 'optimizer.learning_rate'"),
        ("output_dir", "kantai's setting for it is 'run_dir'"),
        ("per_device_train_batch_size", "kantai's setting for it is 'batch.micro_batch_size'"),
        ("local-rank", "local-rank is the launcher's: give it to accelerate launch"),
        ("training.learning_rate", "the nearest known one is 'optimizer.learning_rate'"),
        ("model.rope_theta", "pretrain.py --help lists all"),
        ("x", "pretrain.py --help lists all"),
    ],
)
def test_unknown_key_has_hint_that_leads_on(tmp_path: Path, key: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, SMALLEST, f"--{key}=1")
    assert f"unknown key {key!r}; {hint}" in str(error.value)


def test_synonyms_lead_to_settings() -> None:
    settings = dict(schema(Config))
    for key, others in SYNONYMS.items():
        assert key in settings
        assert not {name for name in others if name in settings}


def test_python_spelling_of_null_is_taken(tmp_path: Path) -> None:
    given = ["--failures.spike_factor=None", "--data.cache_dir=None", "--training.compile=True"]
    config = load(tmp_path, SMALLEST, *given)
    assert config.failures.spike_factor is None
    assert config.data.cache_dir is None
    assert config.training.compile is True
    config = load(tmp_path, SMALLEST + "\nfailures: {spike_factor: None}\n", "--run_dir=None")
    assert config.failures.spike_factor is None
    assert Path(config.run_dir).name == "None"  # a folder may be called so


def test_micro_batch_size_is_no_part_of_the_stream(tmp_path: Path) -> None:
    """inspect_data.py shows how a run is dealt to any ranks and micro-steps."""
    config = load(tmp_path)
    refuse_other_run(with_value(config, "batch.micro_batch_size", 4), config, of_stream=True)
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        refuse_other_run(with_value(config, "seed", 1), config, of_stream=True)


def test_run_dir_that_nests_too_deeply_is_none(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text(f"run_dir: {'[' * 5000}")
    assert read_run_dir(path) is None
