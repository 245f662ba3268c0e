"""How long does a step take on many GPUs, and what is it spent on? A model of it, held against runs here and figures of others.

python benchmarks/step_time.py            the model's tables alone; seconds
python benchmarks/step_time.py --measure  first runs of one rank and two on this machine's CPU; four minutes on two cores

A step's time is computing, which every GPU does on its rows, and moving numbers, of which some goes on beside computing:

    seconds = micro-steps x compute + max(0, moving - what computing hides of it) + moving after the step

What is moved, in units of the weights' bytes in fp32 (4 a parameter: gradients and weights are fp32 under every backend) times
(n - 1) / n for n GPUs: a ring sends that many through every GPU for one gather or one reduce-scatter, and twice that for an all-reduce
(Patarasu and Yuan 2009). Between nodes, each bucket costs a message to another node log2(nodes) times as well, as in a tree.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from programs import ROOT, environment, launch, prepare

from kantai.config.batch_plan import BatchPlan
from kantai.config.loading import load_config
from kantai.config.schema import Config
from kantai.data.tokenizer import Vocabulary


@dataclass(frozen=True)
class Backend:
    """What a backend moves, in weights' bytes, and when.

    DeepSpeed 0.19.8 sends gradients of stages 1 and 2 through all-reduces of whole buckets, not reduce-scatters
    (``use_multi_rank_bucket_allreduce``), and stage 2 after every micro-step, as it keeps none but its own.

    Attributes:
        every_micro_step: moved in each.
        last_micro_step: moved in the last one.
        after_step: moved when the optimizer is done.
        hidden: share of a micro-step's time in which its moving goes on, at best; a backward pass costs two forward ones.
        bucket_bytes: moved at a time.
    """

    every_micro_step: int
    last_micro_step: int
    after_step: int
    hidden: float
    bucket_bytes: float

    def moved(self, micro_steps: int, gpus: int) -> float:
        """Through each GPU in a step, in weights' bytes."""
        return (
            (self.every_micro_step * micro_steps + self.last_micro_step + self.after_step)
            * (gpus - 1)
            / gpus
        )


BACKENDS = {
    "ddp": Backend(0, 2, 0, 2 / 3, 25e6),
    "zero1": Backend(0, 2, 1, 0.0, 100e6),
    "zero2": Backend(2, 0, 1, 2 / 3, 100e6),
    "zero3": Backend(3, 0, 0, 1.0, 25e6),  # gathers of about a layer
}


@dataclass(frozen=True)
class Cluster:
    """What a GPU does, and what lies between them.

    Attributes:
        flops_per_second: of a GPU, in training.
        inside: bytes a second that a ring moves through every GPU of a node ("bus bandwidth" of nccl-tests).
        outside: the same between nodes, all of a node's cards together.
        latency: seconds for a message to another node; assumed.
        overlap: whether anything moves while computing goes on.
    """

    name: str
    gpus_per_node: int
    flops_per_second: float
    inside: float
    outside: float
    latency: float = 2e-5
    overlap: bool = True

    def moving_seconds(
        self, backend: Backend, units: int, weights_bytes: float, gpus: int
    ) -> float:
        """For so many times the weights."""
        nodes, moved = (
            math.ceil(gpus / self.gpus_per_node),
            units * weights_bytes * (gpus - 1) / gpus,
        )
        bandwidth = self.inside if nodes == 1 else min(self.inside, self.outside)
        return (
            moved / bandwidth
            + math.ceil(moved / backend.bucket_bytes) * math.log2(nodes) * self.latency
        )

    def step_seconds(
        self,
        backend: Backend,
        weights_bytes: float,
        micro_step_seconds: float,
        micro_steps: int,
        gpus: int,
    ) -> float:
        """The model."""
        units = backend.every_micro_step * micro_steps + backend.last_micro_step
        moving, after = (
            self.moving_seconds(backend, each, weights_bytes, gpus)
            for each in (units, backend.after_step)
        )
        hiding = micro_steps if backend.every_micro_step else 1
        hidden = backend.hidden * micro_step_seconds * hiding if self.overlap else 0.0
        return micro_steps * micro_step_seconds + max(0.0, moving - hidden) + after


# FLOP/s are assumed, not measured: 40 % of the data sheet's bf16. outside is 80 % of the cards' data sheet, inside about
# what nccl-tests show.
CLUSTERS = [
    Cluster("8 H100 a node, a 400 Gbit/s card each", 8, 396e12, 360e9, 320e9),
    Cluster("4 A100 a node, two 200 Gbit/s cards", 4, 125e12, 200e9, 40e9),
    Cluster("4 A100 a node, one 100 Gbit/s card", 4, 125e12, 200e9, 10e9),
]
GPUS = (8, 64, 1024)

# Weak scaling of BERT-large in fp16: github.com/NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT/README.md, of 2019 and 2020.
# Gradients go out after the backward pass, as fp16. Cards: DGX-1 has four of 100 Gbit/s, DGX-2H eight.
BERT_LARGE_BYTES = 2 * 336e6
PUBLISHED = [
    # cluster, rows a GPU, tokens a row, sequences a second by nodes
    (
        Cluster("DGX-1, 8 V100", 8, 0, 130e9, 0.8 * 50e9, overlap=False),
        16,
        128,
        {1: 874.24, 4: 3089.76, 16: 12144.64},
    ),
    (
        Cluster("DGX-1, 8 V100", 8, 0, 130e9, 0.8 * 50e9, overlap=False),
        4,
        512,
        {1: 195.93, 4: 700.16, 16: 2746.37},
    ),
    (
        Cluster("DGX-2H, 16 V100", 16, 0, 130e9, 0.8 * 100e9, overlap=False),
        64,
        128,
        {1: 3379.2, 4: 12709.88, 16: 51937.28, 64: 188088.32},
    ),
    (
        Cluster("DGX-2H, 16 V100", 16, 0, 130e9, 0.8 * 100e9, overlap=False),
        8,
        512,
        {1: 625.66, 4: 2386.38, 16: 9932.8, 64: 37478.4},
    ),
]

# What is run here: weights of 23 MB, two micro-steps a step.
ROWS, MICRO_STEPS, FEW, MANY = (
    16,
    2,
    4,
    24,
)  # rows a rank and step; steps of a short run and a long one
MODEL = [
    "hidden_size=256",
    "num_hidden_layers=2",
    "num_attention_heads=4",
    "intermediate_size=1024",
]
SETTINGS = [
    *(f"--model.{setting}" for setting in MODEL),
    "--data.seq_len=64",
    f"--batch.micro_batch_size={ROWS // MICRO_STEPS}",
]
SETTINGS += [
    "--evaluation.every_steps=1000",
    "--evaluation.max_sequences=2",
    "--checkpoint.every_steps=1000",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--measure", action="store_true", help="hold the model against runs on this machine's CPU"
    )
    parser.add_argument(
        "--collectives", nargs=2, help=argparse.SUPPRESS
    )  # inside a launch: output, bytes
    arguments = parser.parse_args()
    if arguments.collectives:
        collectives(Path(arguments.collectives[0]), int(arguments.collectives[1]))
        return
    if arguments.measure:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder))
    published()
    for name in ("roberta-base", "roberta-large"):
        predicted(name, load_config(ROOT / "configs" / f"{name}.yaml"))


def measure(folder: Path) -> None:
    """One rank beside another of its own, and two together, under every backend; each of one thread."""
    settings = [*prepare(folder, vocab_size=16000), *SETTINGS]
    weights_bytes = bytes_of(
        model_of(
            load_config(ROOT / "configs" / "quickstart.yaml", ["--run_dir=unused", *settings]),
            16000,
        )
    )
    sent = start([*launch(2), __file__, "--collectives", str(folder / "rate"), str(weights_bytes)])
    finish([sent])
    rate = float((folder / "rate").read_text())
    machine = Cluster(
        "this one", 2, 0, rate, rate, overlap=False
    )  # two cores: whoever moves does not compute
    print(
        f"Two ranks of one thread over gloo; weights of {weights_bytes / 1e6:.0f} MB, {MICRO_STEPS} micro-steps;",
        end=" ",
    )
    print(f"all-reduce of all: {weights_bytes / rate:.3f} s\n")
    print(
        "| backend | moved a step, counted on the wire | by the model | one rank | two, measured | by the model | weak scaling |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, backend in BACKENDS.items():
        config = "cpu" if name == "ddp" else name
        alone = [
            run(folder / f"{name}-alone-{number}", settings, config, 1, MANY) for number in range(2)
        ]
        finish([process for process, _ in alone])
        one = median(seconds(path) for _, path in alone)
        wire = []
        for steps in (FEW, MANY):
            before = loopback_bytes()
            process, path = run(folder / f"{name}-{steps}", settings, config, 2, steps)
            finish([process])
            wire.append(loopback_bytes() - before)
        two = seconds(path)
        counted = (wire[1] - wire[0]) / (MANY - FEW) / 2  # each of two ranks sends half of it
        model = machine.step_seconds(backend, weights_bytes, one / MICRO_STEPS, MICRO_STEPS, 2)
        moved = backend.moved(MICRO_STEPS, 2) * weights_bytes
        print(
            f"| {name} | {counted / 1e6:.1f} MB | {moved / 1e6:.1f} MB | {one:.3f} s | {two:.3f} s | {model:.3f} s | {one / two:.0%} |"
        )
    print()


def published() -> None:
    """The model against what others measured."""
    print(
        "| BERT-large in fp16, sequences/s | nodes | published | by the model | off |\n|---|---|---|---|---|"
    )
    for cluster, rows, tokens, rates in PUBLISHED:
        after_backward = Backend(0, 2, 0, 0.0, 100e6)
        batch = rows * cluster.gpus_per_node
        compute = batch / rates[1] - cluster.step_seconds(
            after_backward, BERT_LARGE_BYTES, 0, 1, cluster.gpus_per_node
        )
        for nodes, rate in rates.items():
            gpus = nodes * cluster.gpus_per_node
            model = (
                nodes
                * batch
                / cluster.step_seconds(after_backward, BERT_LARGE_BYTES, compute, 1, gpus)
            )
            given = "taken from it" if nodes == 1 else f"{model / rate - 1:+.1%}"
            print(
                f"| {cluster.name}, {rows} rows of {tokens} a GPU | {nodes} | {rate:,.0f} | {model:,.0f} | {given} |"
            )
    print()


def predicted(name: str, config: Config) -> None:
    """Share of the GPUs' time that computing is, with the config's global batch and with as many rows a GPU as one holds."""
    from kantai.model.roberta import training_flops

    model, tokens = model_of(config, 50265), config.data.seq_len
    weights_bytes, flops = (
        bytes_of(model),
        training_flops(model.config, tokens, tokens**2, round(config.masking.ratio * tokens)),
    )
    per_step = config.batch.global_batch_size
    print(
        f"| {name}, {per_step} rows of {tokens} a step | GPUs | micro-steps x rows | {' | '.join(BACKENDS)} |"
    )
    print(f"|---|---|---|{'---|' * len(BACKENDS)}")
    for cluster, gpus in itertools.product(CLUSTERS, GPUS):
        plan = BatchPlan(per_step, config.batch.micro_batch_size, gpus)
        steps, compute = (
            plan.gradient_accumulation_steps,
            plan.micro_batch_size * flops / cluster.flops_per_second,
        )
        shares = [
            steps * compute / cluster.step_seconds(backend, weights_bytes, compute, steps, gpus)
            for backend in BACKENDS.values()
        ]
        print(
            f"| {cluster.name} | {gpus} | {steps} x {plan.micro_batch_size} | {' | '.join(f'{share:.0%}' for share in shares)} |"
        )
    print()


def model_of(config: Config, vocab_size: int) -> Any:
    """The model, without memory for its weights."""
    import torch
    from tokenizers import Tokenizer, models

    from kantai.model.roberta import build_model

    vocabulary = Vocabulary(Tokenizer(models.BPE()), vocab_size, 0, 1, 2, 3, 4, "")
    with torch.device("meta"):
        return build_model(config.model, vocabulary, seq_len=config.data.seq_len, seed=config.seed)


def bytes_of(model: Any) -> int:
    """Of a model's weights in fp32."""
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def run(
    path: Path, settings: Sequence[str], backend: str, ranks: int, steps: int
) -> tuple["subprocess.Popen[str]", Path]:
    """Start pretrain.py with so many rows a rank."""
    sizes = [
        f"--batch.global_batch_size={ROWS * ranks}",
        f"--training.max_steps={steps}",
        "--optimizer.warmup_steps=1",
    ]
    script = [
        "scripts/pretrain.py",
        "--config",
        "configs/quickstart.yaml",
        *settings,
        *sizes,
        f"--run_dir={path}",
    ]
    return start([*launch(ranks, backend), *script]), path


def start(command: list[str]) -> "subprocess.Popen[str]":
    """With a thread a rank."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: list["subprocess.Popen[str]"]) -> None:
    """Wait for a good end of all."""
    for process in processes:
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(errors)


def seconds(path: Path) -> float:
    """Median of a run's steps, but for the first few."""
    records = (json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines())
    return median(
        [record["speed/step_seconds"] for record in records if "speed/step_seconds" in record][3:]
    )


def loopback_bytes() -> int:
    """Sent so far from this machine to itself, which is all that ranks on it say to each other."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def collectives(output: Path, size: int) -> None:
    """Bytes a second that an all-reduce of so many bytes moves through a rank."""
    import torch
    from accelerate import Accelerator

    accelerator, values = Accelerator(), torch.ones(size // 4)
    taken = []
    for _ in range(12):
        accelerator.wait_for_everyone()
        began = time.perf_counter()
        torch.distributed.all_reduce(values)
        taken.append(time.perf_counter() - began)
    if accelerator.is_main_process:
        output.write_text(str(size / median(taken[2:])))  # 2 (n - 1) / n of it, and n is 2
    accelerator.end_training()


if __name__ == "__main__":
    main()
