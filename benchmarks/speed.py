"""How fast does it train? kantai's pretrain.py, transformers' Trainer at its best, the tutorial's script, and what the machine allows.

python benchmarks/speed.py                                        CPU: the tutorial's model; at most 15 minutes on two cores
python benchmarks/speed.py --corpus kant.txt --output speed.json  on that text; all numbers written down
python benchmarks/speed.py --check                                a minute: a small model is to train faster than Trainer's

With a GPU: roberta-base and roberta-large at 512 tokens, without dropout; 8 minutes are meant to be enough. Only real runs are timed,
of scripts/pretrain.py and of Trainer.train, each in a process of its own, one after another on the same lines. Tokens are content:
neither padding nor empty rows. A ratio is the median of the rounds' own ratios, so that a machine that is slower for a while is so for
both sides.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from programs import ROOT, environment, launch, prepare, program

from kantai.config.batch_plan import BatchPlan
from kantai.config.loading import load_config
from kantai.config.schema import Config
from kantai.data.dataset import Data, open_data
from kantai.data.masking import IGNORED_LABEL
from kantai.data.tokenizer import Vocabulary
from kantai.training.metrics import read_metrics

SIDES = {
    "kantai": "kantai: scripts/pretrain.py",
    "again": "the same, compiled before",
    "eager": "the same without training.compile",
    "tutorial": "the tutorial's script: Trainer, 64 lines padded to the longest",
    "grouped": "Trainer at its best on 64 lines, of like length",
    "packed": "Trainer on full sequences, as run_mlm.py makes them",
    "compiled": "Trainer on full sequences with torch_compile",
}
LINES = 64  # a batch of the tutorial's
ROUNDS = 3
# Nothing but steps; a run is killed when enough of them are done.
ENDLESS = ["--training.epochs=null", "--training.max_steps=1000000", "--stages=[]"]
ENDLESS += ["--checkpoint.every_steps=1000000", "--evaluation.every_steps=1000000"]
MIN_OF_CHECK = 2.0  # times Trainer's tokens a second


@dataclass
class Found:
    """What a run was like."""

    tokens_per_second: list[float]  # from mark to mark
    first_step_seconds: float  # since its start


@dataclass
class Case:
    """A model, who trains it, and what came of it.

    Attributes:
        sides: keys of ``SIDES``; all are compared with the first, ``kantai``.
        marks: numbers of steps, from each of which to the next a rate is taken; those before the first are warm-up.
        goals: of what :func:`report` measures; of seconds the most, of all else the least.
        machine: floating-point operations a second by precision, once a round.
    """

    name: str
    config: Path
    settings: list[str]
    sides: tuple[str, ...]
    marks: tuple[int, ...]
    goals: dict[str, float]
    found: dict[str, list[Found]] = field(default_factory=dict)
    machine: list[dict[str, float]] = field(default_factory=list)

    @property
    def precision(self) -> str:
        """The one whose matrix products are faster on this machine."""
        return max(self.machine[0], key=self.machine[0].__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, help="a text of lines (default: Python's documentation)"
    )
    parser.add_argument(
        "--config", type=Path, help="recipe of our run on CPU (default: configs/kantai-fast.yaml)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="times that every side is run (default 3; on a GPU 1, of three measurements)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="start no round that would end later than this (default 15; on a GPU 8)",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit with 1 where a small model trains less than {MIN_OF_CHECK}x as fast",
    )
    parser.add_argument(
        "--side", nargs=5, help=argparse.SUPPRESS
    )  # in a process of its own: who, output, config, settings, marks
    arguments = parser.parse_args()
    if arguments.side:
        side, output, config, settings, marks = arguments.side
        run = load_config(config, json.loads(settings))
        Path(output).write_text(
            json.dumps(
                machine(run.model.hidden_size)
                if side == "machine"
                else stock(side, run, json.loads(marks))
            )
        )
        return
    # Asked of PyTorch in another process: this one is to hold no memory of the GPU's while others are timed.
    asked = [sys.executable, "-c", "import torch; assert torch.cuda.is_available()"]
    on_gpu = not subprocess.run(asked, stderr=subprocess.DEVNULL, check=False).returncode
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
            folder / "inductor"
        )  # empty: a first start compiles
        vocab_size = 8_000 if arguments.check else 50_265 if on_gpu else 52_000
        data = [*prepare(folder, arguments.corpus, vocab_size, "line"), *ENDLESS]
        if arguments.check:
            sys.exit(check(folder, small_case(data)))
        cases = gpu_cases(data) if on_gpu else [cpu_case(data, arguments.config)]
        limit = 60 * (arguments.minutes or (8 if on_gpu else 15))
        run_rounds(folder, cases, arguments.rounds or (1 if on_gpu else ROUNDS), began + limit)
        content = {case.name: report(case) for case in cases}
    print(
        f"{(seconds := time.monotonic() - began) / 60:.1f} minutes; {len(os.sched_getaffinity(0))} cores"
    )
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"seconds": seconds, **content}, indent=1) + "\n", encoding="utf-8"
        )


def cpu_case(data: list[str], config: Path | None) -> Case:
    """The tutorial's model, trained by a recipe of ours on sequences of its length."""
    shape = [
        "hidden_size=768",
        "num_hidden_layers=6",
        "num_attention_heads=12",
        "intermediate_size=3072",
        "vocab_size=52000",
    ]
    shape.append("max_position_embeddings=514")
    # Each of our steps is as much as three or four of the tutorial's: enough for AdamW's share of the time to be small.
    settings = [
        *data,
        *(f"--model.{setting}" for setting in shape),
        "--data.seq_len=128",
        "--batch.global_batch_size=32",
    ]
    config = config or ROOT / "configs" / "kantai-fast.yaml"
    goals = {
        "tutorial": 6.0,
        "grouped": 3.0,
        "packed": 3.0,
        "machine": 0.7,
        "first_step_seconds": 20.0,
    }
    return Case(
        "the tutorial's model",
        config,
        settings,
        ("kantai", "tutorial", "grouped", "packed"),
        (2, 7),
        goals,
    )


def gpu_cases(data: list[str]) -> list[Case]:
    """roberta-base and roberta-large, with four micro-steps a step and no dropout on each side."""
    found = []
    for name, rate in (("roberta-base", {"tokens_per_second": 800_000.0}), ("roberta-large", {})):
        config = ROOT / "configs" / f"{name}.yaml"
        rows = 4 * load_config(config).batch.micro_batch_size
        settings = [
            *data,
            "--model.vocab_size=50304",
            f"--batch.global_batch_size={rows}",
            "--training.compile=true",
        ]
        settings += ["--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0"]
        goals = {**rate, "packed": 3.0, "compiled": 3.0, "machine": 0.6, "first_step_seconds": 60.0}
        found.append(
            Case(
                name,
                config,
                settings,
                ("kantai", "again", "eager", "packed", "compiled"),
                (5, 15, 25, 35),
                goals,
            )
        )
    return found


def small_case(data: list[str]) -> Case:
    """What is over in a minute."""
    settings = [
        *data,
        "--data.seq_len=64",
        "--batch.global_batch_size=64",
        "--batch.micro_batch_size=64",
    ]
    return Case(
        "a small model",
        ROOT / "configs" / "quickstart.yaml",
        settings,
        ("kantai", "packed"),
        (5, 35),
        {},
        machine=[{"fp32": 1.0}],
    )


def check(folder: Path, case: Case) -> int:
    """Exit status: 0 as soon as a ratio is as wanted. Noise slows a side now and then, worse code every time.

    Both sides run at once with a thread each, so that whatever else the machine does slows both.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    for number in range(ROUNDS):
        with ThreadPoolExecutor() as pool:
            runs = pool.map(
                lambda side, seed=number: run_side(folder, case, side, seed), case.sides
            )
            ours, theirs = (run.tokens_per_second[0] for run in runs)
        print(
            f"{ours:,.0f} tokens/s, Trainer {theirs:,.0f}: {ours / theirs:.2f}x, at least {MIN_OF_CHECK}x is expected",
            flush=True,
        )
        if ours >= MIN_OF_CHECK * theirs:
            return 0
    return 1


def run_rounds(folder: Path, cases: list[Case], rounds: int, end: float) -> None:
    """Run the machine and every side in turns, each time in the other direction, for as long as there is time."""
    for number in range(rounds):
        start = time.monotonic()
        for case in cases:
            case.machine.append(in_process(folder, case, "machine", case.settings))
            for side in case.sides[:: -1 if number % 2 else 1]:
                found = run_side(folder, case, side, number)
                case.found.setdefault(side, []).append(found)
                rates = ", ".join(f"{rate:,.0f}" for rate in found.tokens_per_second)
                print(
                    f"round {number + 1}, {case.name}, {side}: {rates} tokens/s, {found.first_step_seconds:.1f} s to start",
                    flush=True,
                )
        if number + 1 < rounds and 2 * time.monotonic() - start > end:
            print(f"no more rounds than {number + 1} of {rounds}: the next would take too long")
            break


def run_side(folder: Path, case: Case, side: str, number: int) -> Found:
    """Run one of the sides once."""
    settings = [*case.settings, f"--seed={number}", f"--training.precision={case.precision}"]
    if side in ("kantai", "again", "eager"):
        return kantai(
            folder / "run",
            case,
            [*settings, *(["--training.compile=false"] if side == "eager" else [])],
        )
    began = time.time()
    logged = in_process(folder, case, side, settings)
    return Found(logged["tokens_per_second"], logged["first_step_time"] - began)


def kantai(run: Path, case: Case, settings: list[str]) -> Found:
    """A run of pretrain.py, ended when it has done the steps wanted."""
    log = run.with_suffix(".log")
    command = [
        *launch(1),
        "scripts/pretrain.py",
        "--config",
        str(case.config.absolute()),
        *settings,
        f"--run_dir={run}",
    ]
    began = time.time()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
        )
    try:
        while len(records := steps_of(run)) < case.marks[-1]:
            if process.poll() is not None:
                sys.exit(f"scripts/pretrain.py: {log.read_text()}")
            time.sleep(0.2)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shutil.rmtree(run)
    tokens = [tokens for tokens, _ in work(case, settings, case.marks[-1])]
    ends = [
        record["time"] for record in records
    ]  # the clock's, as for the other sides: what lies between steps counts, too
    rates = [
        sum(tokens[a:b]) / (ends[b - 1] - ends[a - 1]) for a, b in itertools.pairwise(case.marks)
    ]
    return Found(rates, ends[0] - began)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The records of a run's steps so far."""
    path = run / "metrics.jsonl"
    return (
        [record for record in read_metrics(path) if "speed/step_seconds" in record]
        if path.exists()
        else []
    )


def work(case: Case, settings: list[str], steps: int) -> list[tuple[int, int]]:
    """Content tokens of our steps, and floating-point operations that they need."""
    import torch

    from kantai.model.roberta import build_model, training_flops

    data = open_data(load_config(case.config, [*settings, "--run_dir=unused"]))
    with torch.device("meta"):
        shape = build_model(
            data.config.model,
            data.vocabulary,
            seq_len=data.config.data.seq_len,
            seed=data.config.seed,
        ).config
    batches, found = data.training_batches(1), []
    for step in range(steps):
        steps = range(batches.stage_at(step).plan.gradient_accumulation_steps)
        shown = [batches.micro_batch(step, step, 0) for step in steps]
        sizes = [
            (batch.tokens, batch.attended_pairs, int((batch.labels != IGNORED_LABEL).sum()))
            for batch in shown
        ]
        tokens, pairs, masked = map(sum, zip(*sizes, strict=True))
        found.append((tokens, training_flops(shape, tokens, pairs, masked)))
    return found


def machine(hidden: int) -> dict[str, float]:
    """Floating-point operations a second of the model's largest matrix products by precision; much the slower precision is only tried."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"

    def rate(dtype: torch.dtype, rows: int, inner: int, outer: int, seconds: float) -> float:
        left, right = (
            torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, outer))
        )
        products, start = -1, 0.0  # one to warm up
        while products < 1 or time.perf_counter() < start + seconds:
            for _ in range(20 if on_gpu else 1):
                left @ right
            if on_gpu:
                torch.cuda.synchronize()
            products += 1
            start = time.perf_counter() if products == 0 else start
        return (
            (20 if on_gpu else 1)
            * 2.0
            * rows
            * inner
            * outer
            * products
            / (time.perf_counter() - start)
        )

    shapes = [(hidden, 4 * hidden), (4 * hidden, hidden), *([(8192, 8192)] if on_gpu else [])]
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    tried = {
        name: rate(dtype, 8192 if on_gpu else 256, *shapes[0], 0.5)
        for name, dtype in dtypes.items()
    }
    best = max(tried, key=tried.__getitem__)
    return {
        **tried,
        best: max(
            tried[best],
            *(rate(dtypes[best], 32768 if on_gpu else 8192, *shape, 1.0) for shape in shapes),
        ),
    }


def stock(side: str, config: Config, marks: list[int]) -> dict[str, Any]:
    """Trainer with RobertaForMaskedLM and DataCollatorForLanguageModeling: tokens a second from mark to mark."""
    import torch
    from transformers import (
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        RobertaConfig,
        RobertaForMaskedLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from kantai.model.roberta import build_model

    on_gpu, data = torch.cuda.is_available(), open_data(config)
    plan = BatchPlan(config.batch.global_batch_size, config.batch.micro_batch_size, 1)
    rows, steps = (
        (LINES, 1)
        if side in ("tutorial", "grouped")
        else (plan.micro_batch_size, plan.gradient_accumulation_steps)
    )
    examples = list(
        itertools.islice(
            itertools.cycle(stock_sequences(side, data, marks)), marks[-1] * rows * steps
        )
    )
    times: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, *marks):
                if on_gpu:
                    torch.cuda.synchronize()
                times[state.global_step] = time.time()

    if side == "tutorial":
        shape = RobertaConfig(
            vocab_size=52_000, max_position_embeddings=514, num_hidden_layers=6, type_vocab_size=1
        )
        best: dict[str, Any] = {}
    else:
        with torch.device("meta"):
            shape = build_model(
                config.model, data.vocabulary, seq_len=config.data.seq_len, seed=config.seed
            ).config
        # On CPUs PyTorch's fused attention costs Trainer a tenth in bf16.
        shape._attn_implementation = (
            "eager" if not on_gpu and config.training.precision == "bf16" else "sdpa"
        )
        best = {
            "bf16": config.training.precision == "bf16",
            "dataloader_num_workers": min(8, len(os.sched_getaffinity(0)) - 1) if on_gpu else 0,
            "gradient_accumulation_steps": steps,
            "logging_nan_inf_filter": False,  # it waits for the GPU in every micro-step
            "max_grad_norm": config.optimizer.max_grad_norm,
            "optim": "adamw_torch_fused",
            "remove_unused_columns": False,
            "torch_compile": side == "compiled",
            "use_cpu": not on_gpu,  # or it refuses bf16
        }
    with tempfile.TemporaryDirectory() as folder:
        settled = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            max_steps=marks[-1],
            train_sampling_strategy="sequential",  # what it is given is in the order it is to have
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **best,
        )
        tokenizer = AutoTokenizer.from_pretrained(config.data.tokenizer)
        Trainer(
            RobertaForMaskedLM(shape),
            settled,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
            train_dataset=[example_of(ids, data.vocabulary, bool(best)) for ids in examples],
            callbacks=[Clock()],
        ).train()
    tokens = [
        sum(map(len, examples[a * rows * steps : b * rows * steps]))
        for a, b in itertools.pairwise(marks)
    ]
    rates = [
        of_all / (times[b] - times[a])
        for of_all, (a, b) in zip(tokens, itertools.pairwise(marks), strict=True)
    ]
    return {"tokens_per_second": rates, "first_step_time": times[1]}


def example_of(ids: list[int], vocabulary: Vocabulary, masked_before: bool) -> dict[str, list[int]]:
    """A row for the collator; run_mlm.py finds out beforehand which tokens are special, the tutorial leaves that to the collator."""
    return {
        "input_ids": ids,
        **(
            {"special_tokens_mask": [int(token in vocabulary.special_ids) for token in ids]}
            if masked_before
            else {}
        ),
    }


def stock_sequences(side: str, data: Data, marks: list[int]) -> list[list[int]]:
    """Rows in the order in which Trainer is shown them: lines at random, batches of like lines, or the text cut into full sequences."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    seq_len, vocabulary = data.config.data.seq_len, data.vocabulary
    documents = (
        shard.tokens[a:b].tolist()
        for shard in data.shards.splits["train"]
        for a, b in itertools.pairwise(shard.boundaries)
    )
    lines = [[vocabulary.bos_id, *document] for document in documents]
    mixed = random.Random(data.config.seed)
    if side in ("packed", "compiled"):
        text = list(itertools.chain(*lines))
        blocks = [
            text[start : start + seq_len] for start in range(0, len(text) - seq_len + 1, seq_len)
        ]
        mixed.shuffle(blocks)
        return blocks
    mixed.shuffle(lines)
    lines = [
        line if len(line) <= seq_len else [*line[: seq_len - 1], vocabulary.eos_id]
        for line in lines
    ]
    if side == "tutorial":
        return lines
    # An epoch goes from long lines to short ones again and again: of its batches, the few to be timed are spread over all lengths.
    order = get_length_grouped_indices([len(line) for line in lines], LINES)
    batches = [
        [lines[place] for place in order[start : start + LINES]]
        for start in range(0, len(order) - LINES + 1, LINES)
    ]
    batches.sort(key=lambda batch: sum(map(len, batch)))
    timed = marks[-1] - marks[0]
    chosen = [batches[(2 * number + 1) * len(batches) // (2 * timed)] for number in range(timed)]
    return list(itertools.chain(*batches[len(batches) // 2 :][: marks[0]], *chosen))


def report(case: Case) -> dict[str, Any]:
    """Print a case's table; everything that was measured, for the JSON file."""
    tokens, flops = map(sum, zip(*work(case, case.settings, case.marks[-1]), strict=True))
    limits = [rates[case.precision] / flops * tokens for rates in case.machine]
    limit = median(limits)
    rates = {
        side: [rate for run in case.found[side] for rate in run.tokens_per_second]
        for side in case.sides
    }
    starts = {side: max(run.first_step_seconds for run in case.found[side]) for side in case.sides}
    faster = {
        side: median(
            ours / theirs for ours, theirs in zip(rates["kantai"], rates[side], strict=True)
        )
        for side in case.sides
    }
    ours = median(rates["kantai"])
    share = {
        side: median(
            median(run.tokens_per_second) / of
            for run, of in zip(case.found[side], limits, strict=True)
        )
        for side in case.sides
    }
    print(
        f"\n| {case.name}, {case.precision} | content tokens/s | of the limit | first step after | kantai is |\n|---|---|---|---|---|"
    )
    for side in case.sides:
        rate = median(rates[side])
        print(
            f"| {SIDES[side]} | {rate:,.0f} | {share[side]:.0%} | {starts[side]:.1f} s | {faster[side]:.2f}x |"
        )
    needed = (
        f"{flops / tokens / 1e6:,.0f} MFLOP a token, {limit * flops / tokens / 1e9:,.0f} GFLOP/s"
    )
    print(f"| the machine's limit: {needed} | {limit:,.0f} | 100% | | {share['kantai']:.2f}x |\n")
    measured = {
        **faster,
        "machine": share["kantai"],
        "first_step_seconds": starts["kantai"],
        "tokens_per_second": ours,
    }
    for name, goal in case.goals.items():
        most = name.endswith("_seconds")
        met = measured[name] <= goal if most else measured[name] >= goal
        print(
            f"{name}: {measured[name]:,.2f}, {'met' if met else 'not met'}: {'at most' if most else 'at least'} {goal:,g}"
        )
    raw = {
        "settings": case.settings,
        "machine": case.machine,
        "sides": {side: [vars(run) for run in case.found[side]] for side in case.sides},
    }
    return {
        "precision": case.precision,
        "flops_per_token": flops / tokens,
        "measured": measured,
        "goals": case.goals,
        **raw,
    }


def in_process(folder: Path, case: Case, side: str, settings: list[str]) -> dict[str, Any]:
    """What this program measures of a side in a process of its own."""
    output = folder / "side.json"
    given = json.dumps(["--run_dir=unused", *settings]), json.dumps(case.marks)
    program(__file__, "--side", side, output, case.config.absolute(), *given)
    return dict(json.loads(output.read_text()))


if __name__ == "__main__":
    main()
