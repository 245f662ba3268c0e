"""What the launcher asks for is done, or refused by name before any rank joins."""

import json
from pathlib import Path

import pytest

from kantai.cluster.environment import RankInfo
from kantai.distributed.launch import join
from kantai.errors import UserError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MIXED_PRECISION", "bf16", "mixed_precision bf16, and training.precision is fp32: give"),
        ("MIXED_PRECISION", "fp16", "give --training.precision=fp16"),
        ("MIXED_PRECISION", "fp8", "mixed_precision fp8"),
        ("DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend INDUCTOR: leave that out"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 4: leave that out"),
    ],
)
def test_launcher_setting_that_run_contradicts_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=message):
        join(RankInfo(0, 1, 0), 1.0, "fp32")


def test_launcher_settings_that_fit_the_run_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, asked in (("bf16", "bf16"), ("bf16", "no"), ("fp32", "no")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        assert join(RankInfo(0, 1, 0), 1.0, precision).mixed_precision == "no"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", "is not JSON"),
        ("[1]", "has no zero_optimization with a stage from 0 to 3"),
        ("{}", "has no zero_optimization with a stage from 0 to 3"),
        ('{"zero_optimization": 3}', "has no zero_optimization"),
        ('{"zero_optimization": {"stage": 7}}', "has no zero_optimization with a stage"),
        ('{"zero_optimization": {"stage": 2, "offload_param": 1}}', "offload_param is no section"),
        ('{"zero_optimization": {"stage": 2}, "bf16": true}', "bf16 is no section"),
        (None, "cannot read the deepspeed_config_file"),
    ],
)
def test_broken_deepspeed_file_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "deepspeed.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(UserError, match=message) as error:
        join(RankInfo(0, 1, 0), 1.0, "fp32")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"train_batch_size": 512}, "sets train_batch_size 512: leave that out"),
        ({"train_micro_batch_size_per_gpu": 4}, "sets train_micro_batch_size_per_gpu 4"),
        ({"gradient_accumulation_steps": 8}, "sets gradient_accumulation_steps 8"),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5, and optimizer.max_grad_norm is 1.0"),
        ({"gradient_clipping": "half"}, "gradient_clipping half, and optimizer.max_grad_norm"),
    ],
)
def test_deepspeed_file_that_run_contradicts_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: dict[str, object], message: str
) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **setting}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(UserError, match=message):
        join(RankInfo(0, 1, 0), 1.0, "fp32")


def test_clipping_of_accelerate_file_must_be_the_run_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.25")
    with pytest.raises(UserError, match=r"give --optimizer\.max_grad_norm=0\.25"):
        join(RankInfo(0, 1, 0), 1.0, "fp32")
