"""Tests of the README's commands from training to prediction, and of the quickstart script."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from kantai.checkpoint.state import load_weights
from kantai.checkpoint.store import CheckpointStore
from kantai.config.loading import load_config
from kantai.model.roberta import build_model
from kantai.storage.atomic import verify
from kantai.training.run_dir import open_saved_run
from tests.helpers.commands import ROOT, TINY, Program, pretrain, run_program, script, wait_until
from tests.helpers.runs import metrics

pytestmark = pytest.mark.slow

STEPS = 5


@pytest.fixture(scope="module")
def run(shards_dir: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("line") / "run"
    where = [
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        f"--run_dir={folder}",
    ]
    pretrain(
        None,
        *where,
        f"--training.max_steps={STEPS}",
        "--evaluation.every_steps=2",
        "--checkpoint.every_steps=2",
    )
    return folder


@pytest.fixture(scope="module")
def model_dir(run: Path) -> Path:
    done = script("export", run, "--output", run.parent / "model")
    assert done.returncode == 0, done.stderr
    assert "logits equal within" in done.stdout
    return run.parent / "model"


def test_metrics_and_tensorboard_are_complete(run: Path) -> None:
    for name in ("loss", "accuracy", "perplexity", "learning_rate", "grad_norm"):
        assert len(metrics(run, f"train/{name}")) == STEPS
    assert all(0 < mfu < 2 for mfu in metrics(run, "speed/mfu"))
    assert all(0 < goodput < 1 for goodput in metrics(run, "speed/goodput"))
    for name in ("speed/tokens_per_second", "speed/data_wait_seconds", "speed/step_seconds"):
        assert len(metrics(run, name)) == STEPS
    assert len(metrics(run, "held_out/loss")) == len(metrics(run, "memory/peak_gib")) == 3
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("train/loss", "speed/goodput"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx(metrics(run, name))
    assert len(events.Tensors("fill_mask/text_summary")) == 3
    assert b"<mask>" in events.Tensors("fill_mask/text_summary")[0].tensor_proto.string_val[0]


def test_run_saves_at_interval_and_at_end(run: Path) -> None:
    assert sorted(path.name for path in (run / "checkpoints").glob("[!.]*")) == [
        "step-00000002",
        "step-00000004",
        "step-00000005",
    ]


def test_evaluate_matches_held_out_loss_of_training(run: Path) -> None:
    done = script("evaluate", run)
    assert done.returncode == 0, done.stderr
    (loss,) = (
        float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss")
    )
    assert loss == pytest.approx(metrics(run, "held_out/loss")[-1], abs=1e-3)
    assert "unigram entropy" in done.stdout


def test_export_loads_in_transformers_with_same_logits(run: Path, model_dir: Path) -> None:
    verify(model_dir)
    opened, step = open_saved_run(run)
    trained = build_model(
        opened.config.model,
        opened.data.vocabulary,
        seq_len=opened.config.data.seq_len,
        seed=opened.config.seed,
    )
    load_weights(trained, opened.store.path(step))
    loaded = AutoModelForMaskedLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert type(loaded).__name__ == "RobertaForMaskedLM"
    inputs = tokenizer("The value of the <mask> is an object.", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, trained.eval()(**inputs).logits, atol=1e-5)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tokenizer.model_max_length == opened.config.data.seq_len
    assert len(pipeline("fill-mask", model=str(model_dir))("A <mask>.")) == 5
    card = (model_dir / "README.md").read_text()
    for fingerprint in ("config", "shards", "tokenizer", "code"):
        assert opened.lineage[fingerprint] in card
    assert f"{metrics(run, 'held_out/loss')[-1]:.3f}" in card


def test_refused_export_writes_nothing(run: Path, model_dir: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in model_dir.rglob("*")}
    assert script("export", run, "--output", model_dir).returncode == 2
    assert {path: path.read_bytes() for path in model_dir.rglob("*")} == before
    damaged = shutil.copytree(run, tmp_path / "run")
    for path in damaged.glob("checkpoints/*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    done = script("export", damaged, "--output", tmp_path / "model")
    assert done.returncode == 2
    assert "all of the 3 checkpoints" in done.stderr and "are damaged" in done.stderr
    assert not (tmp_path / "model").exists()


def test_fill_mask_prints_five_words_per_text(model_dir: Path, run: Path) -> None:
    prompts = (run / "prompts.txt").read_text().splitlines()
    assert len(prompts) == 3
    done = script(
        "fill_mask", model_dir, "A <mask> of the object.", "--prompts", run / "prompts.txt"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "A <mask> of the object.",
        *prompts,
    ]
    assert len(lines) == 4 * 6


def test_mask_beyond_model_length_is_an_error(model_dir: Path) -> None:
    done = script("fill_mask", model_dir, "word " * 100 + "<mask>")
    assert done.returncode == 2
    assert "lies beyond the 32 tokens" in done.stderr.splitlines()[-1]


def test_quickstart_resumes_after_kill_and_skips_done_work(
    corpus_file: Path, tmp_path: Path
) -> None:
    """The quickstart runs for a few steps in a copy of the repository, with its .venv."""
    for name in ("configs", "kantai", "scripts", "tests/helpers"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    settings = [
        "--training.max_steps=50",
        "--checkpoint.every_steps=5",
        "--optimizer.warmup_steps=5",
    ]
    command = ["bash", "scripts/quickstart.sh", "--corpus", corpus_file, *settings]
    pretrain = tmp_path / "scripts" / "pretrain.py"

    # A hanging rank keeps the run from finishing before it is killed.
    real = pretrain.rename(pretrain.with_stem("real"))
    pretrain.write_text(
        "import runpy, sys; sys.argv[1:1] = ['hanging_rank', 'real']; "
        "runpy.run_path('tests/helpers/faults.py', None, '__main__')"
    )
    program = Program(
        [*command, "--checkpoint.every_steps=1"], cwd=tmp_path, PYTHONPATH=str(tmp_path)
    )
    wait_until(lambda: list(tmp_path.glob("runs/*/run/checkpoints/step-*")), program)
    program.kill_all()
    real.replace(pretrain)

    done = run_program(command, cwd=tmp_path, PYTHONPATH=str(tmp_path), code=0)
    (work,) = tmp_path.glob("runs/*")
    assert "50 steps, 0 done" not in done.stdout
    assert "50 steps, " in done.stdout
    assert len(metrics(work / "run", "train/loss")) == 50
    for said in (
        "unigram entropy",
        "logits equal within",
        f"runs/{work.name}/model",
        "tensorboard --logdir",
    ):
        assert said in done.stdout

    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    again = run_program(command, cwd=tmp_path, PYTHONPATH=str(tmp_path), code=0)
    assert again.stdout.splitlines()[-8:] == done.stdout.splitlines()[-8:]
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before


CHINESE = [
    "纯粹理性批判是康德的主要著作",
    "人类的知识从经验开始",
    "但并非都来自经验",
    "我们思考世界",
]
HINDI = [
    "शुद्ध बुद्धि की समीक्षा कांट की मुख्य रचना है",
    "हमारा ज्ञान अनुभव से आरंभ होता है",
    "यह नगर में लिखी गई थी",
]
ARABIC = [
    "نقد العقل المحض هو الكتاب الرئيسي",
    "تبدأ معرفتنا بالتجربة",
    "وقد كتبه الفيلسوف في المدينة",
]


def shuffled(sentences: list[str], count: int, end: str) -> list[str]:
    """Texts of four sentences in an order of their own."""
    draw = random.Random(0)
    return ["".join(draw.choice(sentences) + end for _ in range(4)) for _ in range(count)]


CORPORA: dict[str, tuple[str, list[str], int]] = {
    # name, content, options; how many prompts are filled in
    "纯粹.txt": ("\n".join(shuffled(CHINESE, 1500, "。")), [], 3),
    "hindi.TXT": ("\n\n".join(shuffled(HINDI, 1500, "। ")), [], 3),
    "a b.JSONL": (
        "".join(json.dumps({"content": text}) + "\n" for text in shuffled(ARABIC, 1500, ". ")),
        ["--text_field", "content"],
        3,
    ),
    # Documents of a character, which leave nothing to see beside the mask.
    "letters.csv": (
        "id,sign\n" + "".join(f"{number},{chr(0x4E00 + number)}\n" for number in range(1500)),
        ["--text_field=sign"],
        0,
    ),
}


@pytest.mark.parametrize("name", CORPORA)
def test_quickstart_finishes_on_every_language_and_format(name: str, tmp_path: Path) -> None:
    content, options, count = CORPORA[name]
    for folder in ("configs", "kantai", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in ("constraints.txt", "pyproject.toml"):
        shutil.copy2(ROOT / file, tmp_path)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    (tmp_path / name).write_text(content, encoding="utf-8")
    steps = ["--training.max_steps=4", "--checkpoint.every_steps=4"]
    command = [
        "bash",
        "scripts/quickstart.sh",
        "--corpus",
        tmp_path / name,
        *options,
        *TINY,
        *steps,
    ]
    done = run_program(command, cwd=tmp_path, PYTHONPATH=str(tmp_path), code=0)
    _, _, predictions = done.stdout.partition("== predictions\n")
    assert predictions.count("<mask>") == count + 1
    assert ("no held-out document has a word to hide" in predictions) == (count == 0)
    (manifest,) = tmp_path.glob("runs/*/shards/manifest.json")
    splits = json.loads(manifest.read_text())["splits"]
    assert splits["train"]["documents"] + splits["held_out"]["documents"] == 1500


def test_best_checkpoint_is_found_by_its_logged_score(run: Path, tmp_path: Path) -> None:
    losses = metrics(run, "held_out/loss")
    by_step = dict(zip((2, 4, STEPS), losses, strict=True))
    assert CheckpointStore(run).scores() == by_step
    best = min(by_step, key=lambda step: by_step[step])
    done = script("evaluate", run, "--best")
    assert done.stdout.startswith(f"step {best}, "), done.stderr
    done = script("export", run, "--step", 2, "--output", tmp_path / "model")
    assert f"{tmp_path / 'model'}: step 2, " in done.stdout, done.stderr
    assert f"{losses[0]:.3f} nats a masked token (step 2)" in (
        (tmp_path / "model" / "README.md").read_text()
    )


def test_programs_find_data_that_moved(run: Path, tmp_path: Path) -> None:
    config = load_config(run / "config.yaml")
    moved = shutil.copytree(run, tmp_path / "run")
    shards = shutil.copytree(config.data.shards, tmp_path / "shards")
    text = (moved / "config.yaml").read_text().replace(config.data.shards, str(tmp_path / "gone"))
    (moved / "config.yaml").write_text(text)
    done = script("evaluate", moved)
    assert done.returncode == 2
    assert "say where it is now, with --data.shards=..." in done.stderr
    done = script("evaluate", moved, f"--data.shards={shards}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == script("evaluate", run).stdout
