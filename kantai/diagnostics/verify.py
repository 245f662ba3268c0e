"""Do the promises hold here? Some steps of a user's run on the user's own machines, dealt in every way, and compared.

What they are compared with is not the engine: plain PyTorch in one process that computes whole batches, and plain DDP.
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

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kantai.checkpoint.state import load_weights
from kantai.cluster.environment import RankInfo
from kantai.config.schema import Config
from kantai.data.dataset import Data, open_data
from kantai.data.inspect import hash_step, hash_stream
from kantai.data.loader import MicroBatch, stream
from kantai.data.masking import IGNORED_LABEL
from kantai.distributed.engine import Engine
from kantai.errors import UserError
from kantai.export import export
from kantai.model.roberta import build_model
from kantai.optim.optimizer import build_optimizer
from kantai.storage.atomic import replaced
from kantai.training.run_dir import RunDir

_MAX_ROWS = 8  # of a micro-batch, however many fit: what is proven does not depend on it
# Largest relative difference between two ways to add up the same batch, of a loss and of a gradient norm. fp32: sums in another order,
# 1e-6 each, amplified by some optimizer steps. fp16 and bf16 round products to 11 and 8 bits, and another shape may be computed by another
# kernel: on CPU, 4e-5 and 4e-4 of the loss were seen, and 5e-4 and 4e-3 of the norm.
TOLERANCES = {"fp32": (1e-5, 1e-4), "fp16": (5e-4, 5e-3), "bf16": (4e-3, 2e-2)}
_LOSS_SCALE = 2.0**14  # of fp16 without the engine
# Attention is blind to what all keys have in common: their bias has no gradient but rounding, which AdamW makes as large as any other's.
_MOVED_BY_ROUNDING = "attention.self.key.bias"
_OF_LOGITS = 1e-3  # absolute; fp32, but perhaps computed by a GPU here and a CPU there


@dataclass(frozen=True)
class Finding:
    """One comparison: what was compared, how far apart it was at most, and how far it may be."""

    promise: str
    compared: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; one that is no number is not."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Trace:
    """What some steps came to."""

    losses: list[float]
    grad_norms: list[float]

    def against(self, other: "Trace", promise: str, compared: str, tolerances: tuple[float, float]) -> Iterator[Finding]:
        """How far two are apart."""
        yield Finding(promise, f"loss: {compared}", _relative(self.losses, other.losses), tolerances[0])
        yield Finding(promise, f"gradient norm: {compared}", _relative(self.grad_norms, other.grad_norms), tolerances[1])


def certify(config: Config, rank_info: RankInfo, data: Data, steps: int, output: Path) -> bool:
    """Compare everything on all ranks, print a table, and write a certificate.

    Args:
        steps: of each comparison.
        output: the certificate; checkpoints lie beside it for a while, so all nodes must see its folder.

    Returns:
        Whether all promises hold.
    """
    rows = min(config.batch.micro_batch_size, _MAX_ROWS)
    small = config.model_copy(
        update={
            "stages": [],
            # Two micro-steps a rank, and the last row of the last is empty.
            "batch": config.batch.model_copy(update={"global_batch_size": 2 * rows * rank_info.world_size - 1, "micro_batch_size": rows}),
            "model": config.model.model_copy(update={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
        }
    )
    here = _Here(rank_info, dataclasses.replace(data, config=small), steps)
    if rank_info.is_main:
        print(f"{rank_info.world_size} ranks; {small.batch.global_batch_size} sequences a step, {steps} steps, without dropout\n")
        print("| promise | compared | difference | allowed | holds |\n|---|---|---|---|---|", flush=True)
    findings, folder = [], None
    try:
        folder = Path(here.engine.from_main(tempfile.mkdtemp(prefix=".verify-", dir=output.parent) if rank_info.is_main else ""))
        for found in _findings(here, data, folder):
            finding = dataclasses.replace(found, difference=max(here.engine.from_all(found.difference), key=_or_infinite))
            findings.append(finding)
            if rank_info.is_main:
                answer = "yes" if finding.holds else "NO"
                print(
                    f"| {finding.promise} | {finding.compared} | {finding.difference:.1e} | {finding.tolerance:.0e} | {answer} |",
                    flush=True,
                )
        here.engine.wait_for_all()
    finally:
        if rank_info.is_main and folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    certificate = _certificate(data, here, findings)
    if rank_info.is_main:
        with replaced(output) as partial:
            partial.write_text(json.dumps(certificate, indent=1) + "\n", encoding="utf-8")
        print(f"\n{'All promises hold here.' if certificate['holds'] else 'A PROMISE DOES NOT HOLD HERE.'} Written to {output}", flush=True)
    here.engine.leave()
    return bool(certificate["holds"])


class _Here:
    """An engine for the batches of a config, with the run's first weights."""

    def __init__(self, rank_info: RankInfo, data: Data, steps: int) -> None:
        gc.collect()  # an engine that nobody needs any more refers to itself, and holds its memory until then
        self.rank_info, self.data, self.steps = rank_info, data, steps
        self.precision = data.config.training.precision
        self.model = build_model(data.config.model, data.vocabulary, seq_len=data.config.data.seq_len, seed=data.config.seed)
        self.engine = Engine(rank_info, self.model, data.config.optimizer, data.config.training, seed=data.config.seed)

    def again(self, micro_batch_size: int | None = None) -> "_Here":
        """A fresh one, perhaps with other micro-batches."""
        batch = self.data.config.batch
        batch = batch.model_copy(update={"micro_batch_size": micro_batch_size or batch.micro_batch_size})
        config = self.data.config.model_copy(update={"batch": batch})
        return _Here(self.rank_info, dataclasses.replace(self.data, config=config), self.steps)

    def train(self, first_step: int = 0) -> Trace:
        """Steps by the engine."""
        batches, trace = self.data.training_batches(self.rank_info.world_size), Trace([], [])
        rate, workers = self.data.config.optimizer.learning_rate, self.data.config.data.workers
        for step, dealt, _ in stream(batches, self.rank_info.rank, first_step, first_step + self.steps, workers):
            result = self.engine.train_step(step, dealt, rate)
            trace.losses.append(result.loss)
            trace.grad_norms.append(result.grad_norm)
        return trace

    def save(self, folder: Path) -> Path:
        """A checkpoint's state."""
        if self.rank_info.is_main:
            folder.mkdir()
        self.engine.wait_for_all()
        self.engine.save_state(folder)
        return folder


def _findings(here: _Here, users: Data, folder: Path) -> Iterator[Finding]:
    tolerances, rank_info = TOLERANCES[here.precision], here.rank_info
    yield _stream(here, users)
    trace = here.train()
    saved = here.save(folder / "saved")
    yield from _plain(here, 1).against(trace, "true loss", "one process alone with plain PyTorch", tolerances)
    if rank_info.world_size > 1:
        yield from _plain(here, rank_info.world_size).against(trace, "true loss", "plain DDP", tolerances)
    rows = here.data.config.batch.micro_batch_size
    most = users.config.batch.micro_batch_size  # that fit
    for size in sorted({1, -(-rows // 2), min(2 * rows, most)} - {rows}):
        other = here.again(size)
        plan = other.data.training_batches(rank_info.world_size).stage_at(0).plan
        compared = f"{plan.gradient_accumulation_steps} micro-steps of {plan.micro_batch_size} rows, {plan.empty_rows} in all empty"
        found = other.train()
        other.engine.release()
        del other  # before there is another one
        yield from found.against(trace, "true loss", compared, tolerances)

    straight, resumed = here.train(here.steps), here.again()
    resumed.engine.load_state(saved)
    # Kernels on GPUs may add up in another order each time.
    same = (0.0, 0.0) if here.engine.device.type == "cpu" else tolerances
    yield from resumed.train(here.steps).against(straight, "nothing lost", "straight on, and saved and resumed", same)
    state = here.save(folder / "straight")
    difference = of_states(state, resumed.save(folder / "resumed"), with_rounding=same[1] == 0)
    yield Finding("nothing lost", "weights and moments afterwards", difference, same[1])
    yield Finding("export", "logits: trained here, and loaded by transformers", _of_logits(here, state, folder / "exported"), _OF_LOGITS)


def _stream(here: _Here, users: Data) -> Finding:
    """What the user's own run deals to all ranks, against what one rank would be dealt."""
    rank_info, digest = here.rank_info, hashlib.sha256()
    batches = users.training_batches(rank_info.world_size)
    for step, mine, _ in stream(batches, rank_info.rank, 0, here.steps, users.config.data.workers):
        of_ranks = here.engine.from_all([micro_batch.batch for micro_batch in mine])
        dealt = (batch for of_rank in of_ranks for batch in of_rank)
        hash_step(digest, dealt, batches.stage_at(step).plan.global_batch_size, batches.pad_id)
    expected = hash_stream(users.training_batches(1), 0, here.steps)
    return Finding("world-free", "SHA-256 of what all ranks are shown, and one alone", float(digest.hexdigest() != expected), 0.0)


def _plain(here: _Here, world_size: int) -> Trace:
    """The steps without the engine: in a world of one on every rank, which then compute the same; else by PyTorch's DDP."""
    gc.collect()
    settings, device, trace = here.data.config.optimizer, here.engine.device, Trace([], [])
    raw = build_model(here.data.config.model, here.data.vocabulary, seq_len=here.data.seq_len, seed=here.data.seed).to(device)
    raw.compute_dtype = here.model.compute_dtype
    model: Any = DistributedDataParallel(raw) if world_size > 1 else raw
    optimizer, batches = build_optimizer(raw, settings), here.data.training_batches(world_size)
    scale = _LOSS_SCALE if here.precision == "fp16" else 1.0
    model.train()
    for step in range(here.steps):
        micro_steps = range(batches.stage_at(step).plan.gradient_accumulation_steps)
        dealt = [batches.micro_batch(step, micro_step, here.rank_info.rank if world_size > 1 else 0) for micro_step in micro_steps]
        loss_sum, masked = torch.zeros(2, device=device)
        masked += sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in dealt)
        if world_size > 1:
            torch.distributed.all_reduce(masked)
        for micro_step, batch in enumerate(dealt):
            with model.no_sync() if world_size > 1 and micro_step < len(dealt) - 1 else contextlib.nullcontext():
                loss, _ = model(**MicroBatch(batch).on(device))
                (loss * (scale * world_size / masked)).backward()  # DDP averages over ranks
            loss_sum += loss.detach()
        if world_size > 1:
            torch.distributed.all_reduce(loss_sum)
        gradients = [parameter.grad for parameter in raw.parameters() if parameter.grad is not None]
        for gradient in gradients:
            gradient.div_(scale)
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, (settings.max_grad_norm or math.inf) / norm))
        optimizer.step()
        optimizer.zero_grad()
        trace.losses.append((loss_sum / masked).item())
        trace.grad_norms.append(norm)
    return trace


def of_states(one: Path, other: Path, *, with_rounding: bool) -> float:
    """How far weights and moments of two checkpoints of the same ranks are apart: the largest distance of a tensor, relative to its norm.

    Args:
        with_rounding: compare also what nothing moves but rounding.
    """
    worst = 0.0
    for path in sorted(one.glob("*.safetensors")):
        with safe_open(path, framework="pt") as ours, safe_open(other / path.name, framework="pt") as theirs:
            for name in ours.keys():
                if with_rounding or _MOVED_BY_ROUNDING not in name:
                    tensor = ours.get_tensor(name).double()
                    apart = (tensor - theirs.get_tensor(name)).norm() / tensor.norm().clamp(min=1e-30)
                    worst = max(worst, _or_infinite(apart.item()))
    return worst


@torch.no_grad()
def _of_logits(here: _Here, state: Path, output: Path) -> float:
    """Largest difference between a logit of the engine's model and of the exported one, on one held-out sequence."""
    batches, _ = here.data.held_out_batches(rows=1)
    ids = torch.from_numpy(batches.micro_batch(0, 0, 0).input_ids[:1])
    ids = ids[:, ids[0] != here.data.vocabulary.pad_id]
    precision, here.model.compute_dtype = here.model.compute_dtype, torch.float32
    here.engine.model.eval()
    trained: Tensor = here.engine.model(ids.to(here.engine.device)).logits.cpu()
    here.model.compute_dtype = precision
    if not here.rank_info.is_main:
        return 0.0
    # In a process of its own, as a user would: in this one, under ZeRO-3, transformers would have all ranks load a part.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            loaded = process.submit(_exported, here.data.config, 2 * here.steps, state, output, ids).result()
        except UserError as error:
            print(error, flush=True)
            return math.inf
    return float((loaded - trained).abs().max())


@torch.no_grad()
def _exported(config: Config, step: int, state: Path, output: Path, ids: Tensor) -> Tensor:
    """Export the weights of a checkpoint, and return the logits of what transformers loads."""
    transformers.utils.logging.disable_progress_bar()
    data = open_data(config, hashes=False)
    model = build_model(config.model, data.vocabulary, seq_len=config.data.seq_len, seed=config.seed)
    load_weights(model, state)
    export(RunDir(output, config, data), model, step, output)
    logits: Tensor = transformers.RobertaForMaskedLM.from_pretrained(output).eval()(ids).logits
    return logits


def _certificate(users: Data, here: _Here, findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "holds": all(finding.holds for finding in findings),
        "findings": [{**dataclasses.asdict(finding), "holds": finding.holds} for finding in findings],
        "world_size": here.rank_info.world_size,
        "backend": here.engine.backend_name,
        "devices": here.engine.from_all(_device(here.engine.device)),
        "precision": here.precision,
        "steps": here.steps,
        "stream_sha256": hash_stream(users.training_batches(1), 0, here.steps),
        "lineage": RunDir(Path(users.config.run_dir), users.config, users).lineage,
    }


def _device(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{platform.node()}: {name}"


def _relative(one: Sequence[float], other: Sequence[float]) -> float:
    return max(_or_infinite(abs(a - b) / max(abs(a), abs(b), 1e-30)) for a, b in zip(one, other, strict=True))


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value
