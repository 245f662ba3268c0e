"""Model how long a step takes on many GPUs, and compare the model with runs and published figures.

python benchmarks/step_time.py            the model's tables alone; seconds
python benchmarks/step_time.py --measure  first train here, on one and two ranks; four minutes

In a step, every GPU computes its rows and moves numbers, partly while it computes:

    seconds = micro-steps x compute + max(0, moving - hidden by computing) + moving after the step

Moving is counted in units: the bytes of the weights in fp32, 4 a parameter, times (n - 1) / n for n
GPUs. Gradients and weights are fp32 under every backend. A ring moves one unit through every GPU
for a gather or a reduce-scatter, and two for an all-reduce (Patarasu and Yuan 2009). Between nodes,
each bucket also costs the time of log2(nodes) messages, as in a tree.
"""

import argparse
import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from programs import (
    QUICKSTART,
    ROOT,
    environment,
    launch_command,
    prepare_data,
    pretrain_command,
    read_values,
)
from timing import seconds_of

from kantai.config.batch_plan import BatchPlan
from kantai.config.loading import load_config
from kantai.config.schema import Config
from kantai.data.tokenizer import Vocabulary

Process = subprocess.Popen[str]


@dataclass(frozen=True)
class Backend:
    """What a backend moves, in units of the weights, and when.

    DeepSpeed 0.19.8 sends the gradients of stages 1 and 2 through all-reduces of whole buckets, not
    through reduce-scatters (``use_multi_rank_bucket_allreduce``). Stage 2 does so after every
    micro-step, as a rank keeps only its own gradients.

    Attributes:
        every_micro_step: moved in each micro-step.
        last_micro_step: moved in the last micro-step.
        after_step: moved after the optimizer.
        hidden: largest share of a micro-step's time during which numbers move. A backward pass
            costs two forward passes.
        bucket_bytes: moved at a time.
    """

    every_micro_step: int
    last_micro_step: int
    after_step: int
    hidden: float
    bucket_bytes: float

    def units_while_computing(self, micro_steps: int) -> int:
        """Moved in all micro-steps of a step."""
        return self.every_micro_step * micro_steps + self.last_micro_step


BACKENDS = {
    "ddp": Backend(0, 2, 0, 2 / 3, 25e6),
    "zero1": Backend(0, 2, 1, 0.0, 100e6),
    "zero2": Backend(2, 0, 1, 2 / 3, 100e6),
    "zero3": Backend(3, 0, 0, 1.0, 25e6),  # gathers of about a layer
}


@dataclass(frozen=True)
class Cluster:
    """GPUs and the network between them.

    Attributes:
        flops_per_second: of a GPU, in training.
        inside: bytes a second that a ring moves through every GPU of a node ("bus bandwidth" of
            nccl-tests).
        outside: the same between nodes, all network cards of a node together.
        latency: seconds for a message to another node; assumed.
        overlap: whether numbers move while GPUs compute.
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
        """Seconds to move so many units of the weights."""
        nodes = math.ceil(gpus / self.gpus_per_node)
        moved = moved_bytes(units, weights_bytes, gpus)
        bandwidth = self.inside if nodes == 1 else min(self.inside, self.outside)
        messages = math.ceil(moved / backend.bucket_bytes) * math.log2(nodes)
        return moved / bandwidth + messages * self.latency

    def step_seconds(
        self,
        backend: Backend,
        weights_bytes: float,
        micro_step_seconds: float,
        micro_steps: int,
        gpus: int,
    ) -> float:
        """Seconds of a step by the model; ``micro_step_seconds`` are those of computing."""
        seconds = partial(self.moving_seconds, backend, weights_bytes=weights_bytes, gpus=gpus)
        moving = seconds(backend.units_while_computing(micro_steps))
        after = seconds(backend.after_step)
        hiding = micro_steps if backend.every_micro_step else 1
        hidden = backend.hidden * micro_step_seconds * hiding if self.overlap else 0.0
        return micro_steps * micro_step_seconds + max(0.0, moving - hidden) + after


def moved_bytes(units: int, weights_bytes: float, gpus: int) -> float:
    """Bytes that so many units of the weights move through each GPU."""
    return units * weights_bytes * (gpus - 1) / gpus


# FLOP/s are assumed, not measured: 40 % of the data sheet's bf16. ``outside`` is 80 % of the
# network cards' data sheet, ``inside`` about what nccl-tests show.
CLUSTERS = [
    Cluster("8 H100 a node, a 400 Gbit/s card each", 8, 396e12, 360e9, 320e9),
    Cluster("4 A100 a node, two 200 Gbit/s cards", 4, 125e12, 200e9, 40e9),
    Cluster("4 A100 a node, one 100 Gbit/s card", 4, 125e12, 200e9, 10e9),
]
GPUS = (8, 64, 1024)

# Weak scaling of BERT-large in fp16, as published in 2019 and 2020 in
# github.com/NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT/README.md.
# Gradients move after the backward pass, as fp16. A DGX-1 has four network cards of 100 Gbit/s, a
# DGX-2H eight.
BERT_LARGE_BYTES = 2 * 336e6
AFTER_BACKWARD = Backend(0, 2, 0, 0.0, 100e6)
DGX_1 = Cluster("DGX-1, 8 V100", 8, 0, 130e9, 0.8 * 50e9, overlap=False)
DGX_2H = Cluster("DGX-2H, 16 V100", 16, 0, 130e9, 0.8 * 100e9, overlap=False)
PUBLISHED = [
    # cluster, rows a GPU, tokens a row, sequences a second by nodes
    (DGX_1, 16, 128, {1: 874.24, 4: 3089.76, 16: 12144.64}),
    (DGX_1, 4, 512, {1: 195.93, 4: 700.16, 16: 2746.37}),
    (DGX_2H, 64, 128, {1: 3379.2, 4: 12709.88, 16: 51937.28, 64: 188088.32}),
    (DGX_2H, 8, 512, {1: 625.66, 4: 2386.38, 16: 9932.8, 64: 37478.4}),
]

# The runs on this machine. Their weights have 23 MB.
ROWS = 16  # of a rank and step
MICRO_STEPS = 2
FEW_STEPS = 4
MANY_STEPS = 24
VOCAB_SIZE = 16000
SETTINGS = [
    "--model.hidden_size=256",
    "--model.num_hidden_layers=2",
    "--model.num_attention_heads=4",
    "--model.intermediate_size=1024",
    "--data.seq_len=64",
    f"--batch.micro_batch_size={ROWS // MICRO_STEPS}",
    "--evaluation.every_steps=1000",
    "--evaluation.max_sequences=2",
    "--checkpoint.every_steps=1000",
    "--optimizer.warmup_steps=1",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--measure", action="store_true", help="compare the model with runs on this machine's CPU"
    )
    # Inside a launch: output, bytes.
    parser.add_argument("--all_reduce", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.all_reduce:
        output, size = arguments.all_reduce
        measure_all_reduce(Path(output), int(size))
        return
    if arguments.measure:
        with tempfile.TemporaryDirectory() as folder:
            compare_with_runs(Path(folder))
    compare_with_published()
    for name in ("roberta-base", "roberta-large"):
        predict(name, load_config(ROOT / "configs" / f"{name}.yaml"))


def compare_with_runs(folder: Path) -> None:
    """Print the model beside runs of one rank and of two, with one thread a rank.

    The one rank runs beside another run of one, so that it has as much of the machine as a rank of
    two.
    """
    settings = [*prepare_data(folder, vocab_size=VOCAB_SIZE), *SETTINGS]
    config = load_config(QUICKSTART, ["--run_dir=unused", *settings])
    weights_bytes = count_bytes(shape_of_model(config, VOCAB_SIZE))
    rate_file = folder / "rate"
    measure = ["--all_reduce", str(rate_file), str(weights_bytes)]
    wait_for(start([*launch_command(2), __file__, *measure]))
    rate = float(rate_file.read_text())
    # On CPU nothing overlaps: the same cores move and compute.
    machine = Cluster("this machine", 2, 0, rate, rate, overlap=False)
    print(
        f"Two ranks of one thread over gloo; weights of {weights_bytes / 1e6:.0f} MB, "
        f"{MICRO_STEPS} micro-steps; all-reduce of all weights: {weights_bytes / rate:.3f} s\n"
    )
    print(
        "| backend | moved a step, counted on the wire | by the model | one rank | two, measured "
        "| by the model | weak scaling |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, backend in BACKENDS.items():
        one = seconds_of_one_rank(folder, name, settings)
        two, counted = measure_two_ranks(folder, name, settings)
        model = machine.step_seconds(backend, weights_bytes, one / MICRO_STEPS, MICRO_STEPS, 2)
        units = backend.units_while_computing(MICRO_STEPS) + backend.after_step
        moved = moved_bytes(units, weights_bytes, 2)
        print(
            f"| {name} | {counted / 1e6:.1f} MB | {moved / 1e6:.1f} MB | {one:.3f} s "
            f"| {two:.3f} s | {model:.3f} s | {one / two:.0%} |"
        )
    print()


def seconds_of_one_rank(folder: Path, name: str, settings: list[str]) -> float:
    """Seconds of a step of one rank; two such runs share the machine."""
    runs = [folder / f"{name}-alone-{number}" for number in range(2)]
    wait_for(*[start_run(run, settings, name, 1, MANY_STEPS) for run in runs])
    return median(map(step_seconds, runs))


def measure_two_ranks(folder: Path, name: str, settings: list[str]) -> tuple[float, float]:
    """Seconds of a step of two ranks, and the bytes that each sends in it.

    The difference of a long run and a short one is free of what starting and ending send.
    """
    sent = []
    for steps in (FEW_STEPS, MANY_STEPS):
        before = loopback_bytes()
        run = folder / f"{name}-{steps}"
        wait_for(start_run(run, settings, name, 2, steps))
        sent.append(loopback_bytes() - before)
    return step_seconds(run), (sent[1] - sent[0]) / (MANY_STEPS - FEW_STEPS) / 2


def compare_with_published() -> None:
    """Print the model beside figures that others measured."""
    print("| BERT-large in fp16, sequences/s | nodes | published | by the model | off |")
    print("|---|---|---|---|---|")
    for cluster, rows, tokens, rates in PUBLISHED:
        model_seconds = partial(cluster.step_seconds, AFTER_BACKWARD, BERT_LARGE_BYTES)
        rows_per_node = rows * cluster.gpus_per_node
        # One node's figure gives the time of computing.
        compute = rows_per_node / rates[1] - model_seconds(0, 1, cluster.gpus_per_node)
        for nodes, rate in rates.items():
            seconds = model_seconds(compute, 1, nodes * cluster.gpus_per_node)
            model = nodes * rows_per_node / seconds
            off = "taken from it" if nodes == 1 else f"{model / rate - 1:+.1%}"
            print(
                f"| {cluster.name}, {rows} rows of {tokens} a GPU | {nodes} | {rate:,.0f} "
                f"| {model:,.0f} | {off} |"
            )
    print()


def predict(name: str, config: Config) -> None:
    """Print the share of a step that is computing, under every backend.

    Global batch and largest micro-batch are the config's.
    """
    from kantai.model.roberta import training_flops

    model = shape_of_model(config, 50265)
    tokens = config.data.seq_len
    weights_bytes = count_bytes(model)
    masked = round(config.masking.ratio * tokens)
    flops_per_row = training_flops(model.config, tokens, tokens**2, masked)
    per_step = config.batch.global_batch_size
    print(
        f"| {name}, {per_step} rows of {tokens} a step | GPUs | micro-steps x rows "
        f"| {' | '.join(BACKENDS)} |"
    )
    print(f"|---|---|---|{'---|' * len(BACKENDS)}")
    for cluster, gpus in itertools.product(CLUSTERS, GPUS):
        plan = BatchPlan(per_step, config.batch.micro_batch_size, gpus)
        micro_steps = plan.gradient_accumulation_steps
        compute = plan.micro_batch_size * flops_per_row / cluster.flops_per_second
        shares = []
        for backend in BACKENDS.values():
            seconds = cluster.step_seconds(backend, weights_bytes, compute, micro_steps, gpus)
            shares.append(f"{micro_steps * compute / seconds:.0%}")
        split = f"{micro_steps} x {plan.micro_batch_size}"
        print(f"| {cluster.name} | {gpus} | {split} | {' | '.join(shares)} |")
    print()


def shape_of_model(config: Config, vocab_size: int) -> Any:
    """The model without memory for its weights."""
    import torch
    from tokenizers import Tokenizer, models

    from kantai.model.roberta import build_model

    vocabulary = Vocabulary(Tokenizer(models.BPE()), vocab_size, 0, 1, 2, 3, 4, "", "")
    with torch.device("meta"):
        return build_model(config.model, vocabulary, seq_len=config.data.seq_len, seed=config.seed)


def count_bytes(model: Any) -> int:
    """Bytes of a model's weights in fp32."""
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def start_run(run: Path, settings: Sequence[str], backend: str, ranks: int, steps: int) -> Process:
    """Start pretrain.py on CPU with the same rows a rank, whatever their number."""
    sizes = [f"--batch.global_batch_size={ROWS * ranks}", f"--training.max_steps={steps}"]
    launcher = launch_command(ranks, "cpu" if backend == "ddp" else backend)
    return start(pretrain_command(run, [*settings, *sizes], launcher=launcher))


def start(command: list[str]) -> Process:
    """Start a program on CPU with one thread a rank."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(*processes: Process) -> None:
    """Wait until all processes have ended well; exit with the errors of one that failed."""
    for process in processes:
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(errors)


def step_seconds(run: Path) -> float:
    """Median seconds of a run's steps, without the first three."""
    return median(read_values(run, "speed/step_seconds")[3:])


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself: ranks on it send each other nothing else."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def measure_all_reduce(output: Path, size: int) -> None:
    """Be one of two ranks that all-reduce ``size`` bytes; write the bytes a second."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    values = torch.ones(size // 4)
    seconds = []
    for _ in range(12):
        accelerator.wait_for_everyone()
        seconds.append(seconds_of(partial(torch.distributed.all_reduce, values)))
    if accelerator.is_main_process:
        # 2 (n - 1) / n of the bytes move through a rank, and n is 2.
        output.write_text(str(size / median(seconds[2:])))
    accelerator.end_training()


if __name__ == "__main__":
    main()
