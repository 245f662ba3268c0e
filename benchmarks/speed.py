"""Compare kantai's training speed with Trainer's, the tutorial's script's and the machine's limit.

python benchmarks/speed.py                                        at most 15 minutes on two cores
python benchmarks/speed.py --corpus kant.txt --output speed.json  that text; all numbers in a file
python benchmarks/speed.py --check                                a minute; a small model

On CPU the model is the tutorial's. On a GPU it is roberta-base and roberta-large, at 512 tokens
without dropout, in at most 8 minutes. With --check, a small model has to train faster than
Trainer's.

Only real runs of scripts/pretrain.py and of Trainer.train are timed, each in a process of its own,
one after another on the same lines. Tokens are content: neither padding nor empty rows. A ratio is
the median of the rounds' own ratios: where the machine is slow for a while, it is so for both
sides.
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
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from programs import (
    QUICKSTART,
    ROOT,
    TUTORIAL_MODEL,
    environment,
    prepare_data,
    pretrain_command,
    read_records,
    run_script,
)
from timing import calls_per_second

from kantai.config.batch_plan import BatchPlan
from kantai.config.loading import load_config
from kantai.config.schema import Config
from kantai.data.dataset import Data, open_data
from kantai.data.masking import IGNORED_LABEL
from kantai.data.tokenizer import Vocabulary

SIDES = {
    "kantai": "kantai: scripts/pretrain.py",
    "again": "the same, compiled before",
    "eager": "the same without training.compile",
    "tutorial": "the tutorial's script: Trainer, 64 lines padded to the longest",
    "grouped": "Trainer at its best on 64 lines, of like length",
    "packed": "Trainer on full sequences, as run_mlm.py makes them",
    "compiled": "Trainer on full sequences with torch_compile",
}
OURS = ("kantai", "again", "eager")
OF_LINES = ("tutorial", "grouped")
LINES = 64  # in a batch of the tutorial's
ROUNDS = 3
# Nothing but steps. A run is killed when it has done enough of them.
ENDLESS = [
    "--training.epochs=null",
    "--training.max_steps=1000000",
    "--stages=[]",
    "--checkpoint.every_steps=1000000",
    "--evaluation.every_steps=1000000",
]
NO_DROPOUT = ["--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0"]
MIN_RATIO = 2.0  # of --check: kantai's tokens a second over Trainer's


@dataclass
class Result:
    """What was measured of a run."""

    tokens_per_second: list[float]  # from mark to mark
    first_step_seconds: float  # from the start of the program to the end of the step


@dataclass
class Case:
    """A model, the sides that train it, and their results.

    Attributes:
        sides: keys of ``SIDES``; all are compared with the first, ``kantai``.
        marks: numbers of steps. A rate is measured from each to the next; the steps before the
            first are warm-up.
        goals: for what :func:`report` measures: the most for seconds, the least for all else.
        results: of each side, one a round.
        machine: floating-point operations a second by precision, one entry a round.
    """

    name: str
    config: Path
    settings: list[str]
    sides: tuple[str, ...]
    marks: tuple[int, ...]
    goals: dict[str, float]
    results: dict[str, list[Result]] = field(default_factory=dict)
    machine: list[dict[str, float]] = field(default_factory=list)

    @property
    def precision(self) -> str:
        """The precision in which this machine's matrix products are faster."""
        return max(self.machine[0], key=self.machine[0].__getitem__)

    def rates(self, side: str) -> list[float]:
        """Tokens a second of a side, in all rounds."""
        return [rate for run in self.results[side] for rate in run.tokens_per_second]


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        measure_side(*arguments.side)
        return
    # Another process asks PyTorch: this one must hold no GPU memory while others are timed.
    ask = [sys.executable, "-c", "import torch; assert torch.cuda.is_available()"]
    on_gpu = not subprocess.run(ask, stderr=subprocess.DEVNULL, check=False).returncode
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # An empty cache: the first start compiles.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        vocab_size = 50_265 if on_gpu else 52_000
        if arguments.check:
            vocab_size = 8_000
        data = [*prepare_data(folder, arguments.corpus, vocab_size, "line"), *ENDLESS]
        if arguments.check:
            sys.exit(check(folder, small_case(data)))
        cases = gpu_cases(data) if on_gpu else [cpu_case(data, arguments.config)]
        end = began + 60 * (arguments.minutes or (8 if on_gpu else 15))
        run_rounds(folder, cases, arguments.rounds or (1 if on_gpu else ROUNDS), end)
        content = {case.name: report(case) for case in cases}
    seconds = time.monotonic() - began
    print(f"{seconds / 60:.1f} minutes; {len(os.sched_getaffinity(0))} cores")
    if arguments.output:
        text = json.dumps({"seconds": seconds, **content}, indent=1) + "\n"
        arguments.output.write_text(text, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, help="a text of lines (default: Python's documentation)")
    add(
        "--config",
        type=Path,
        help="recipe of kantai's run on CPU (default: configs/kantai-fast.yaml)",
    )
    add(
        "--rounds",
        type=int,
        help="rounds of all sides (default 3; on a GPU 1, with three measurements)",
    )
    add(
        "--minutes",
        type=float,
        help="start no round that would end later than this (default 15; on a GPU 8)",
    )
    add("--output", type=Path, help="JSON file to write")
    add(
        "--check",
        action="store_true",
        help=f"exit with 1 if a small model trains less than {MIN_RATIO}x as fast as Trainer's",
    )
    # Inside a process of its own: side, output, config, settings, marks.
    add("--side", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_side(side: str, output: str, config: str, settings: str, marks: str) -> None:
    """Measure Trainer or the machine in this process, and write the figures to a file."""
    run = load_config(config, json.loads(settings))
    if side == "machine":
        figures: dict[str, Any] = measure_machine(run.model.hidden_size)
    else:
        figures = train_with_trainer(side, run, json.loads(marks))
    Path(output).write_text(json.dumps(figures))


def cpu_case(data: list[str], config: Path | None) -> Case:
    """The tutorial's model, trained by a recipe of ours on sequences of its length."""
    # A step has as many tokens as three or four of the tutorial's: AdamW's share of the time is
    # small.
    sizes = ["--data.seq_len=128", "--batch.global_batch_size=32"]
    return Case(
        "the tutorial's model",
        config or ROOT / "configs" / "kantai-fast.yaml",
        [*data, *TUTORIAL_MODEL, *sizes],
        sides=("kantai", "tutorial", "grouped", "packed"),
        marks=(2, 7),
        goals={
            "tutorial": 6.0,
            "grouped": 3.0,
            "packed": 3.0,
            "machine": 0.7,
            "first_step_seconds": 20.0,
        },
    )


def gpu_cases(data: list[str]) -> list[Case]:
    """roberta-base and roberta-large, with four micro-steps a step and no dropout on each side."""
    cases = []
    for name, rate in (("roberta-base", {"tokens_per_second": 800_000.0}), ("roberta-large", {})):
        config = ROOT / "configs" / f"{name}.yaml"
        rows = 4 * load_config(config).batch.micro_batch_size
        settings = ["--model.vocab_size=50304", f"--batch.global_batch_size={rows}"]
        settings += ["--training.compile=true", *NO_DROPOUT]
        goals = {"packed": 3.0, "compiled": 3.0, "machine": 0.6, "first_step_seconds": 60.0}
        case = Case(
            name,
            config,
            [*data, *settings],
            sides=("kantai", "again", "eager", "packed", "compiled"),
            marks=(5, 15, 25, 35),
            goals=rate | goals,
        )
        cases.append(case)
    return cases


def small_case(data: list[str]) -> Case:
    """A model that both sides train in a minute."""
    sizes = ["--data.seq_len=64", "--batch.global_batch_size=64", "--batch.micro_batch_size=64"]
    return Case(
        "a small model",
        QUICKSTART,
        [*data, *sizes],
        sides=("kantai", "packed"),
        marks=(5, 35),
        goals={},
        machine=[{"fp32": 1.0}],
    )


def check(folder: Path, case: Case) -> int:
    """Exit status: 0 as soon as a ratio reaches the minimum.

    Noise slows a side now and then, worse code every time. Both sides run at once with a thread
    each, so that other work on the machine slows both.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    for number in range(ROUNDS):
        with ThreadPoolExecutor() as pool:
            runs = pool.map(partial(run_side, folder, case, number), case.sides)
            ours, theirs = (run.tokens_per_second[0] for run in runs)
        print(
            f"{ours:,.0f} tokens/s, Trainer {theirs:,.0f}: {ours / theirs:.2f}x, "
            f"at least {MIN_RATIO}x is expected",
            flush=True,
        )
        if ours >= MIN_RATIO * theirs:
            return 0
    return 1


def run_rounds(folder: Path, cases: list[Case], rounds: int, end: float) -> None:
    """Run the machine and every side in turns, every other round backwards, until ``end``."""
    for number in range(rounds):
        start = time.monotonic()
        for case in cases:
            case.machine.append(run_in_process(folder, case, "machine", case.settings))
            for side in case.sides[:: -1 if number % 2 else 1]:
                result = run_side(folder, case, number, side)
                case.results.setdefault(side, []).append(result)
                rates = ", ".join(f"{rate:,.0f}" for rate in result.tokens_per_second)
                print(
                    f"round {number + 1}, {case.name}, {side}: {rates} tokens/s, "
                    f"{result.first_step_seconds:.1f} s to start",
                    flush=True,
                )
        now = time.monotonic()
        if number + 1 < rounds and now + now - start > end:
            print(f"stopped after round {number + 1} of {rounds}: the next would take too long")
            break


def run_side(folder: Path, case: Case, number: int, side: str) -> Result:
    """Run one of the sides once, in the round ``number``."""
    settings = [*case.settings, f"--seed={number}", f"--training.precision={case.precision}"]
    if side == "eager":
        settings.append("--training.compile=false")
    if side in OURS:
        return run_kantai(folder / "run", case, settings)
    began = time.time()
    logged = run_in_process(folder, case, side, settings)
    return Result(logged["tokens_per_second"], logged["first_step_time"] - began)


def run_kantai(run: Path, case: Case, settings: list[str]) -> Result:
    """Run pretrain.py and kill it when it has done enough steps."""
    log = run.with_suffix(".log")
    command = pretrain_command(run, settings, case.config)
    began = time.time()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
        )
    records: list[dict[str, Any]] = []
    try:
        while len(records) < case.marks[-1]:
            if process.poll() is not None:
                sys.exit(f"scripts/pretrain.py: {log.read_text()}")
            time.sleep(0.2)
            records = read_records(run, "speed/step_seconds")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shutil.rmtree(run)

    # The clock counts what lies between steps, as for the other sides.
    ends = [record["time"] for record in records]
    tokens = [tokens for tokens, _ in count_work(case, settings, case.marks[-1])]
    rates = [
        sum(tokens[first:last]) / (ends[last - 1] - ends[first - 1])
        for first, last in itertools.pairwise(case.marks)
    ]
    return Result(rates, ends[0] - began)


def count_work(case: Case, settings: list[str], steps: int) -> list[tuple[int, int]]:
    """Content tokens of kantai's steps, and the floating-point operations that they need."""
    from kantai.model.roberta import training_flops

    data = open_data(load_config(case.config, [*settings, "--run_dir=unused"]))
    shape = shape_of_model(data)
    batches = data.training_batches(1)
    work = []
    for step in range(steps):
        micro_steps = range(batches.stage_at(step).plan.gradient_accumulation_steps)
        shown = [batches.micro_batch(step, micro_step, 0) for micro_step in micro_steps]
        tokens = sum(batch.tokens for batch in shown)
        pairs = sum(batch.attended_pairs for batch in shown)
        masked = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in shown)
        work.append((tokens, training_flops(shape, tokens, pairs, masked)))
    return work


def shape_of_model(data: Data) -> Any:
    """The ``RobertaConfig`` of kantai's model."""
    import torch

    from kantai.model.roberta import build_model

    with torch.device("meta"):
        model = build_model(
            data.config.model, data.vocabulary, seq_len=data.seq_len, seed=data.seed
        )
    return model.config


def measure_machine(hidden: int) -> dict[str, float]:
    """Floating-point operations a second of the model's largest matrix products, by precision.

    The slower precision is measured only for half a second.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    products = 20 if on_gpu else 1

    def rate(dtype: torch.dtype, rows: int, inner: int, outer: int, seconds: float) -> float:
        left = torch.randn((rows, inner), device=device).to(dtype)
        right = torch.randn((inner, outer), device=device).to(dtype)

        def multiply() -> None:
            for _ in range(products):
                left @ right
            if on_gpu:
                torch.cuda.synchronize()

        return 2.0 * rows * inner * outer * products * calls_per_second(multiply, seconds)

    shapes = [(hidden, 4 * hidden), (4 * hidden, hidden)]
    if on_gpu:
        shapes.append((8192, 8192))
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rows = 8192 if on_gpu else 256
    tried = {name: rate(dtype, rows, *shapes[0], 0.5) for name, dtype in dtypes.items()}
    faster = max(tried, key=tried.__getitem__)
    rows = 32768 if on_gpu else 8192
    measured = [rate(dtypes[faster], rows, *shape, 1.0) for shape in shapes]
    return {**tried, faster: max(tried[faster], *measured)}


def train_with_trainer(side: str, config: Config, marks: list[int]) -> dict[str, Any]:
    """Train with Trainer, RobertaForMaskedLM and DataCollatorForLanguageModeling.

    Returns:
        Tokens a second from mark to mark, and when the first step ended, in Unix time.
    """
    from transformers import (
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        RobertaForMaskedLM,
        Trainer,
        TrainingArguments,
    )

    data = open_data(config)
    plan = BatchPlan(config.batch.global_batch_size, config.batch.micro_batch_size, 1)
    rows = LINES
    micro_steps = 1
    if side not in OF_LINES:
        rows = plan.micro_batch_size
        micro_steps = plan.gradient_accumulation_steps
    per_step = rows * micro_steps
    endless = itertools.cycle(trainer_sequences(side, data, marks))
    examples = list(itertools.islice(endless, marks[-1] * per_step))
    callback, times = clock(marks)
    best = {} if side == "tutorial" else best_arguments(side, config, micro_steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            max_steps=marks[-1],
            train_sampling_strategy="sequential",  # the examples are in their final order
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **best,
        )
        tokenizer = AutoTokenizer.from_pretrained(config.data.tokenizer)
        Trainer(
            RobertaForMaskedLM(trainer_shape(side, data)),
            arguments,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
            train_dataset=[example(ids, data.vocabulary, side) for ids in examples],
            callbacks=[callback],
        ).train()
    rates = []
    for first, last in itertools.pairwise(marks):
        tokens = sum(map(len, examples[first * per_step : last * per_step]))
        rates.append(tokens / (times[last] - times[first]))
    return {"tokens_per_second": rates, "first_step_time": times[1]}


def clock(marks: list[int]) -> tuple[Any, dict[int, float]]:
    """A callback of Trainer's, and what it fills: when the first step and each mark ended."""
    import torch
    from transformers import TrainerCallback

    times: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, *marks):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[state.global_step] = time.time()

    return Clock(), times


def trainer_shape(side: str, data: Data) -> Any:
    """The ``RobertaConfig`` of Trainer's model: the tutorial's, or kantai's."""
    import torch
    from transformers import RobertaConfig

    if side == "tutorial":
        return RobertaConfig(
            vocab_size=52_000, max_position_embeddings=514, num_hidden_layers=6, type_vocab_size=1
        )
    shape = shape_of_model(data)
    # On CPUs, PyTorch's fused attention costs Trainer a tenth in bf16.
    is_slow_fused = not torch.cuda.is_available() and data.config.training.precision == "bf16"
    shape._attn_implementation = "eager" if is_slow_fused else "sdpa"
    return shape


def best_arguments(side: str, config: Config, micro_steps: int) -> dict[str, Any]:
    """Arguments with which Trainer is fastest."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "bf16": config.training.precision == "bf16",
        "dataloader_num_workers": min(8, len(os.sched_getaffinity(0)) - 1) if on_gpu else 0,
        "gradient_accumulation_steps": micro_steps,
        "logging_nan_inf_filter": False,  # it waits for the GPU in every micro-step
        "max_grad_norm": config.optimizer.max_grad_norm,
        "optim": "adamw_torch_fused",
        "remove_unused_columns": False,
        "torch_compile": side == "compiled",
        "use_cpu": not on_gpu,  # without it, Trainer refuses bf16 on CPU
    }


def example(ids: list[int], vocabulary: Vocabulary, side: str) -> dict[str, list[int]]:
    """A row for the collator.

    run_mlm.py finds the special tokens beforehand, the tutorial leaves that to the collator.
    """
    if side == "tutorial":
        return {"input_ids": ids}
    special = [int(token in vocabulary.special_ids) for token in ids]
    return {"input_ids": ids, "special_tokens_mask": special}


def trainer_sequences(side: str, data: Data, marks: list[int]) -> list[list[int]]:
    """Rows in the order in which Trainer is shown them.

    They are lines at random, batches of lines of like length, or full sequences.
    """
    seq_len = data.seq_len
    vocabulary = data.vocabulary
    lines = [
        [vocabulary.bos_id, *shard.tokens[start:stop].tolist()]
        for shard in data.shards.splits["train"]
        for start, stop in itertools.pairwise(shard.boundaries)
    ]
    random_numbers = random.Random(data.seed)
    if side not in OF_LINES:
        text = list(itertools.chain(*lines))
        starts = range(0, len(text) - seq_len + 1, seq_len)
        blocks = [text[start : start + seq_len] for start in starts]
        random_numbers.shuffle(blocks)
        return blocks
    random_numbers.shuffle(lines)
    lines = [
        line if len(line) <= seq_len else [*line[: seq_len - 1], vocabulary.eos_id]
        for line in lines
    ]
    return lines if side == "tutorial" else batches_of_like_length(lines, marks)


def batches_of_like_length(lines: list[list[int]], marks: list[int]) -> list[list[int]]:
    """The batches that Trainer forms of lines of like length.

    An epoch goes from long lines to short ones again and again. The few batches that are timed are
    spread over all lengths. Batches of middling length come before them, as warm-up.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices([len(line) for line in lines], LINES)
    starts = range(0, len(order) - LINES + 1, LINES)
    batches = [[lines[place] for place in order[start : start + LINES]] for start in starts]
    batches.sort(key=lambda batch: sum(map(len, batch)))
    timed = marks[-1] - marks[0]
    places = [(2 * number + 1) * len(batches) // (2 * timed) for number in range(timed)]
    warm_up = batches[len(batches) // 2 :][: marks[0]]
    return list(itertools.chain(*warm_up, *(batches[place] for place in places)))


def report(case: Case) -> dict[str, Any]:
    """Print a case's table. Returns all that was measured, for the JSON file."""
    tokens, flops = map(sum, zip(*count_work(case, case.settings, case.marks[-1]), strict=True))
    limits = [rates[case.precision] / flops * tokens for rates in case.machine]
    limit = median(limits)
    rates = {side: case.rates(side) for side in case.sides}
    ratios = {}
    shares = {}
    starts = {}
    for side in case.sides:
        results = case.results[side]
        pairs = zip(rates["kantai"], rates[side], strict=True)
        ratios[side] = median(ours / theirs for ours, theirs in pairs)
        medians = [median(run.tokens_per_second) for run in results]
        shares[side] = median(rate / most for rate, most in zip(medians, limits, strict=True))
        starts[side] = max(run.first_step_seconds for run in results)

    print(f"\n| {case.name}, {case.precision} | content tokens/s | of the limit ", end="")
    print("| first step after | kantai is |\n|---|---|---|---|---|")
    for side in case.sides:
        print(
            f"| {SIDES[side]} | {median(rates[side]):,.0f} | {shares[side]:.0%} "
            f"| {starts[side]:.1f} s | {ratios[side]:.2f}x |"
        )
    per_token = flops / tokens
    needed = f"{per_token / 1e6:,.0f} MFLOP a token, {limit * per_token / 1e9:,.0f} GFLOP/s"
    print(f"| the machine's limit: {needed} | {limit:,.0f} | 100% | | {shares['kantai']:.2f}x |\n")
    measured = {
        **ratios,
        "machine": shares["kantai"],
        "first_step_seconds": starts["kantai"],
        "tokens_per_second": median(rates["kantai"]),
    }
    print_goals(case.goals, measured)
    return {
        "precision": case.precision,
        "flops_per_token": per_token,
        "measured": measured,
        "goals": case.goals,
        "settings": case.settings,
        "machine": case.machine,
        "sides": {side: [vars(run) for run in case.results[side]] for side in case.sides},
    }


def print_goals(goals: dict[str, float], measured: dict[str, float]) -> None:
    """Print for each goal whether it is met."""
    for name, goal in goals.items():
        value = measured[name]
        is_limit = name.endswith("_seconds")
        is_met = value <= goal if is_limit else value >= goal
        bound = f"{'at most' if is_limit else 'at least'} {goal:,g}"
        print(f"{name}: {value:,.2f}, {'met' if is_met else 'not met'}: {bound}")


def run_in_process(folder: Path, case: Case, side: str, settings: list[str]) -> dict[str, Any]:
    """Run :func:`measure_side` in a process of its own. Returns the figures."""
    output = folder / "side.json"
    given = (json.dumps(["--run_dir=unused", *settings]), json.dumps(case.marks))
    run_script(__file__, "--side", side, output, case.config.absolute(), *given)
    return dict(json.loads(output.read_text()))


if __name__ == "__main__":
    main()
