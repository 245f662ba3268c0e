"""Verification of the promises: some steps of a user's run, dealt in every way, and compared.

They are compared not with the engine but with plain PyTorch: in one process that computes whole
batches, and in plain DDP.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import multiprocessing
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kantai.checkpoint.state import load_weights
from kantai.cluster.environment import RankInfo
from kantai.config.schema import Config
from kantai.data.batches import Batch, Batches
from kantai.data.dataset import Data, open_data
from kantai.data.inspect import hash_step, hash_stream
from kantai.data.loader import MicroBatch, stream
from kantai.data.masking import IGNORED_LABEL
from kantai.distributed.engine import Engine
from kantai.errors import UserError
from kantai.export import export
from kantai.model.roberta import MaskedRoberta, build_model
from kantai.optim.optimizer import build_optimizer
from kantai.storage.atomic import replaced
from kantai.training.run_dir import RunDir

_MAX_ROWS = 8  # of a micro-batch, however many fit: what is proven does not depend on it

# Largest relative difference between two ways to add up the same batch, of a loss and of a gradient
# norm. fp32: sums in another order, 1e-6 each, amplified by some optimizer steps. fp16 and bf16
# round products to 11 and 8 bits, and another shape may be computed by another kernel: on CPU, 4e-5
# and 4e-4 of the loss were seen, and 5e-4 and 4e-3 of the norm.
TOLERANCES = {"fp32": (1e-5, 1e-4), "fp16": (5e-4, 5e-3), "bf16": (4e-3, 2e-2)}
_LOSS_SCALE = 2.0**14  # of fp16 without the engine
# Attention is blind to what all keys have in common: their bias has no gradient but rounding, which
# AdamW makes as large as any other's.
_MOVED_BY_ROUNDING = "attention.self.key.bias"
_LOGIT_TOLERANCE = 1e-3  # absolute; fp32, but perhaps computed by a GPU here and a CPU there


@dataclass(frozen=True)
class Finding:
    """One comparison."""

    promise: str
    compared: str  # in words
    difference: float  # the largest one found
    tolerance: float  # the largest one allowed

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Trace:
    """Losses and gradient norms of some steps."""

    losses: list[float] = dataclasses.field(default_factory=list)
    grad_norms: list[float] = dataclasses.field(default_factory=list)

    def append(self, loss: float, grad_norm: float) -> None:
        """Take note of a step."""
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    def against(
        self, other: "Trace", promise: str, compared: str, tolerances: tuple[float, float]
    ) -> Iterator[Finding]:
        """Compare two traces."""
        losses = _relative(self.losses, other.losses)
        norms = _relative(self.grad_norms, other.grad_norms)
        yield Finding(promise, f"loss: {compared}", losses, tolerances[0])
        yield Finding(promise, f"gradient norm: {compared}", norms, tolerances[1])


def certify(config: Config, rank_info: RankInfo, data: Data, steps: int, output: Path) -> bool:
    """Compare everything on all ranks, print a table, and write a certificate.

    Args:
        steps: of each comparison.
        output: the certificate. Checkpoints lie beside it for a while, so all nodes must see its
            folder.

    Returns:
        Whether all promises hold.
    """
    small = _small(config, rank_info.world_size)
    subject = _Subject(rank_info, dataclasses.replace(data, config=small), steps)
    rows = small.batch.global_batch_size
    _print_on_main(
        rank_info,
        f"{rank_info.world_size} ranks; {rows} sequences a step, {steps} steps, without dropout\n\n"
        "| promise | compared | difference | allowed | holds |\n|---|---|---|---|---|",
    )
    findings: list[Finding] = []
    folder = None
    try:
        made = ""
        if rank_info.is_main:
            made = tempfile.mkdtemp(prefix=".verify-", dir=output.parent)
        folder = Path(subject.engine.from_main(made))
        for found in _findings(subject, data, folder):
            differences = subject.engine.from_all(found.difference)
            worst = max(differences, key=_or_infinite)
            finding = dataclasses.replace(found, difference=worst)
            findings.append(finding)
            _print_on_main(rank_info, _row(finding))
        subject.engine.wait_for_all()
    finally:
        if rank_info.is_main and folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    certificate = _certificate(data, subject, findings)
    holds = bool(certificate["holds"])
    if rank_info.is_main:
        with replaced(output) as partial:
            partial.write_text(json.dumps(certificate, indent=1) + "\n", encoding="utf-8")
    verdict = "All promises hold here." if holds else "A PROMISE DOES NOT HOLD HERE."
    _print_on_main(rank_info, f"\n{verdict} Written to {output}")
    subject.engine.leave()
    return holds


def _small(config: Config, world_size: int) -> Config:
    """The config without stages and dropout, and with small batches.

    Every rank has two micro-steps, and the last row of the last one is empty.
    """
    rows = min(config.batch.micro_batch_size, _MAX_ROWS)
    sizes = {"global_batch_size": 2 * rows * world_size - 1, "micro_batch_size": rows}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return config.model_copy(
        update={
            "stages": [],
            "batch": config.batch.model_copy(update=sizes),
            "model": config.model.model_copy(update=no_dropout),
        }
    )


class _Subject:
    """An engine for the batches of a config, with the run's first weights."""

    def __init__(self, rank_info: RankInfo, data: Data, steps: int) -> None:
        gc.collect()  # an engine refers to itself, and holds its memory until it is collected
        config = data.config
        self.rank_info = rank_info
        self.data = data
        self.steps = steps
        self.model = _first_model(data)
        self.engine = Engine(
            rank_info, self.model, config.optimizer, config.training, seed=data.seed
        )

    def fresh(self, micro_batch_size: int | None = None) -> "_Subject":
        """Another one that has not trained, perhaps with other micro-batches."""
        batch = self.data.config.batch
        if micro_batch_size is not None:
            batch = batch.model_copy(update={"micro_batch_size": micro_batch_size})
        config = self.data.config.model_copy(update={"batch": batch})
        data = dataclasses.replace(self.data, config=config)
        return _Subject(self.rank_info, data, self.steps)

    def batches(self) -> Batches:
        """The training batches of all ranks."""
        return self.data.training_batches(self.rank_info.world_size)

    def train(self, first_step: int = 0) -> Trace:
        """Do steps by the engine."""
        rate = self.data.config.optimizer.learning_rate
        stop_step = first_step + self.steps
        trace = Trace()
        for step, dealt, _ in stream(
            self.batches(), self.rank_info.rank, first_step, stop_step, self.data.workers
        ):
            result = self.engine.train_step(step, dealt, rate)
            trace.append(result.loss, result.grad_norm)
        return trace

    def save(self, folder: Path) -> Path:
        """Save a checkpoint's state into a new folder."""
        if self.rank_info.is_main:
            folder.mkdir()
        self.engine.wait_for_all()
        self.engine.save_state(folder)
        return folder


def _findings(subject: _Subject, users: Data, folder: Path) -> Iterator[Finding]:
    tolerances = TOLERANCES[subject.engine.precision]
    yield _compare_stream(subject, users)
    trace = subject.train()
    saved = subject.save(folder / "saved")
    yield from _compare_with_plain(subject, trace, tolerances)
    yield from _compare_micro_batches(subject, users, trace, tolerances)

    straight = subject.train(subject.steps)
    resumed = subject.fresh()
    resumed.engine.load_state(saved)
    # Kernels on GPUs may add up in another order each time.
    same = (0.0, 0.0) if subject.engine.device.type == "cpu" else tolerances
    trace = resumed.train(subject.steps)
    yield from trace.against(straight, "nothing lost", "straight on, and saved and resumed", same)
    state = subject.save(folder / "straight")
    other = resumed.save(folder / "resumed")
    difference = compare_states(state, other, with_rounding=same[1] == 0)
    yield Finding("nothing lost", "weights and moments afterwards", difference, same[1])
    yield Finding(
        "export",
        "logits: trained here, and loaded by transformers",
        _compare_logits(subject, state, folder / "exported"),
        _LOGIT_TOLERANCE,
    )


def _compare_stream(subject: _Subject, users: Data) -> Finding:
    """Compare what the user's own run shows all ranks with what it would show one rank."""
    rank_info = subject.rank_info
    found = hashlib.sha256()
    batches = users.training_batches(rank_info.world_size)
    for step, dealt, _ in stream(batches, rank_info.rank, 0, subject.steps, users.workers):
        own = [
            [batch.input_ids.tolist(), batch.masked_positions.tolist(), batch.labels.tolist()]
            for batch in (micro_batch.batch for micro_batch in dealt)
        ]
        of_ranks = subject.engine.from_all(own)
        rows = batches.stage_at(step).plan.global_batch_size
        received = (_received(*arrays) for of_rank in of_ranks for arrays in of_rank)
        hash_step(found, received, rows, batches.pad_id)
    expected = hash_stream(users.training_batches(1), 0, subject.steps)
    differs = float(found.hexdigest() != expected)
    return Finding("world-free", "SHA-256 of what all ranks are shown, and one alone", differs, 0.0)


def _received(ids: list[Any], positions: list[Any], labels: list[Any]) -> Batch:
    """A batch of another rank: as much of it as is hashed."""
    arrays = [np.array(numbers, np.int64) for numbers in (ids, positions, labels)]
    return Batch(arrays[0], None, arrays[1], arrays[2], None, 0, 0)


def _compare_with_plain(
    subject: _Subject, trace: Trace, tolerances: tuple[float, float]
) -> Iterator[Finding]:
    """Compare the engine with plain PyTorch, and on several ranks with plain DDP."""
    alone = "one process alone with plain PyTorch"
    world_size = subject.rank_info.world_size
    yield from _train_plainly(subject, 1).against(trace, "true loss", alone, tolerances)
    if world_size > 1:
        plain = _train_plainly(subject, world_size)
        yield from plain.against(trace, "true loss", "plain DDP", tolerances)


def _compare_micro_batches(
    subject: _Subject, users: Data, trace: Trace, tolerances: tuple[float, float]
) -> Iterator[Finding]:
    """Compare the engine with itself in smaller and larger micro-batches."""
    rows = subject.data.config.batch.micro_batch_size
    fitting = users.config.batch.micro_batch_size
    for size in sorted({1, -(-rows // 2), min(2 * rows, fitting)} - {rows}):
        other = subject.fresh(size)
        plan = other.batches().stage_at(0).plan
        found = other.train()
        other.engine.release()
        del other  # before there is another one
        compared = (
            f"{plan.gradient_accumulation_steps} micro-steps of {plan.micro_batch_size} rows, "
            f"{plan.empty_rows} in all empty"
        )
        yield from found.against(trace, "true loss", compared, tolerances)


def _train_plainly(subject: _Subject, world_size: int) -> Trace:
    """Do the steps without the engine.

    Args:
        world_size: 1 has every rank compute the same, alone; else PyTorch's DDP is used.
    """
    gc.collect()
    config = subject.data.config.optimizer
    device = subject.engine.device
    raw = _first_model(subject.data).to(device)
    raw.compute_dtype = subject.model.compute_dtype
    model: Any = DistributedDataParallel(raw) if world_size > 1 else raw
    optimizer = build_optimizer(raw, config)
    batches = subject.data.training_batches(world_size)
    rank = subject.rank_info.rank if world_size > 1 else 0
    scale = _LOSS_SCALE if subject.engine.precision == "fp16" else 1.0
    trace = Trace()
    model.train()
    for step in range(subject.steps):
        micro_steps = range(batches.stage_at(step).plan.gradient_accumulation_steps)
        dealt = [batches.micro_batch(step, micro_step, rank) for micro_step in micro_steps]
        loss = _backward_plainly(model, dealt, device, scale, world_size)
        gradients = [p.grad for p in raw.parameters() if p.grad is not None]
        norm = _clip_plainly(gradients, scale, config.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        trace.append(loss, norm)
    return trace


def _backward_plainly(
    model: Any, dealt: list[Batch], device: torch.device, scale: float, world_size: int
) -> float:
    """Add up the gradients of a step, ``scale`` times as large. Returns the loss."""
    loss_sum = torch.zeros((), device=device)
    masked = torch.zeros((), device=device)
    masked += sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in dealt)
    if world_size > 1:
        torch.distributed.all_reduce(masked)
    for micro_step, batch in enumerate(dealt):
        is_last = micro_step == len(dealt) - 1
        reduces = is_last or world_size == 1
        with contextlib.nullcontext() if reduces else model.no_sync():
            loss, _ = model(**MicroBatch(batch).on(device))
            (loss * (scale * world_size / masked)).backward()  # DDP averages over ranks
        loss_sum += loss.detach()
    if world_size > 1:
        torch.distributed.all_reduce(loss_sum)
    return (loss_sum / masked).item()


def _clip_plainly(gradients: list[Tensor], scale: float, max_norm: float) -> float:
    """Unscale and clip gradients. Returns their norm before clipping."""
    for gradient in gradients:
        gradient.div_(scale)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, max_norm / norm))
    return norm


def compare_states(one: Path, other: Path, *, with_rounding: bool) -> float:
    """The largest distance of a weight or moment in two checkpoints, relative to its norm.

    Args:
        with_rounding: compare also what nothing moves but rounding.
    """
    worst = 0.0
    for path in sorted(one.glob("*.safetensors")):
        with (
            safe_open(path, framework="pt") as ours,
            safe_open(other / path.name, framework="pt") as theirs,
        ):
            for name in ours.keys():
                if with_rounding or _MOVED_BY_ROUNDING not in name:
                    tensor = ours.get_tensor(name).double()
                    distance = (tensor - theirs.get_tensor(name)).norm()
                    apart = distance / tensor.norm().clamp(min=1e-30)
                    worst = max(worst, _or_infinite(apart.item()))
    return worst


@torch.no_grad()
def _compare_logits(subject: _Subject, state: Path, output: Path) -> float:
    """Compare the engine's model with the exported one, on one held-out sequence."""
    batches, _ = subject.data.held_out_batches(rows=1)
    ids = torch.from_numpy(batches.micro_batch(0, 0, 0).input_ids)
    ids = ids[:, ids[0] != subject.data.vocabulary.pad_id]
    precision = subject.model.compute_dtype
    subject.model.compute_dtype = torch.float32
    subject.engine.model.eval()
    trained: Tensor = subject.engine.model(ids.to(subject.engine.device)).logits.cpu()
    subject.model.compute_dtype = precision
    if not subject.rank_info.is_main:
        return 0.0
    # In a process of its own, as a user would: in this one, under ZeRO-3, transformers would have
    # all ranks load a part.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        arguments = (subject.data.config, 2 * subject.steps, state, output, ids)
        try:
            loaded = process.submit(_logits_of_export, *arguments).result()
        except UserError as error:
            print(error, flush=True)
            return math.inf
    return float((loaded - trained).abs().max())


@torch.no_grad()
def _logits_of_export(config: Config, step: int, state: Path, output: Path, ids: Tensor) -> Tensor:
    """Export the weights of a checkpoint, and return the logits of what transformers loads."""
    transformers.utils.logging.disable_progress_bar()
    data = open_data(config, hashes=False)
    model = _first_model(data)
    load_weights(model, state)
    export(RunDir(output, config, data), model, step, output)
    loaded = transformers.RobertaForMaskedLM.from_pretrained(output)
    logits: Tensor = loaded.eval()(ids).logits
    return logits


def _first_model(data: Data) -> MaskedRoberta:
    return build_model(data.config.model, data.vocabulary, seq_len=data.seq_len, seed=data.seed)


def _certificate(users: Data, subject: _Subject, findings: Sequence[Finding]) -> dict[str, Any]:
    engine = subject.engine
    return {
        "holds": all(finding.holds for finding in findings),
        "findings": [
            {**dataclasses.asdict(finding), "holds": finding.holds} for finding in findings
        ],
        "world_size": subject.rank_info.world_size,
        "backend": engine.backend_name,
        "devices": engine.from_all(_device_in_words(engine.device)),
        "precision": engine.precision,
        "steps": subject.steps,
        "stream_sha256": hash_stream(users.training_batches(1), 0, subject.steps),
        "lineage": RunDir(Path(users.config.run_dir), users.config, users).lineage,
    }


def _device_in_words(device: torch.device) -> str:
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else platform.machine()
    return f"{platform.node()}: {name}"


def _row(finding: Finding) -> str:
    answer = "yes" if finding.holds else "NO"
    return (
        f"| {finding.promise} | {finding.compared} | {finding.difference:.1e} | "
        f"{finding.tolerance:.0e} | {answer} |"
    )


def _print_on_main(rank_info: RankInfo, text: str) -> None:
    if rank_info.is_main:
        print(text, flush=True)


def _relative(one: Sequence[float], other: Sequence[float]) -> float:
    pairs = zip(one, other, strict=True)
    return max(_or_infinite(abs(a - b) / max(abs(a), abs(b), 1e-30)) for a, b in pairs)


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value
