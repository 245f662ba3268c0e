"""One optimizer step on N ranks.

The gradient of a step is that of (sum of the masked tokens' losses over the global batch) /
(number of masked tokens in it), however that batch is dealt over ranks and micro-steps. A mean of
means over ranks would weigh a token by how few others its micro-batch has.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kantai.checkpoint.state import (
    InitialState,
    SavedState,
    Snapshot,
    check_named_state,
    load_named_state,
    named_state,
)
from kantai.cluster.environment import RankInfo
from kantai.config.schema import OptimizerConfig, TrainingConfig
from kantai.data.loader import MicroBatch
from kantai.data.masking import IGNORED_LABEL
from kantai.data.rng import dropout_seed
from kantai.distributed.agreement import refuse_disagreement
from kantai.distributed.backends import make_backend
from kantai.distributed.exchange import by_way_of_json, from_all_ranks, from_rank_0
from kantai.distributed.launch import join
from kantai.distributed.loss_scale import LossScale
from kantai.errors import UserError
from kantai.model.roberta import MaskedRoberta, training_flops
from kantai.optim.optimizer import build_optimizer

T = TypeVar("T")

_SECONDS_FOR_GLOO = 0.5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """What a step came to, over all ranks."""

    loss: float  # nats a masked token
    accuracy: float  # share of the masked tokens that were predicted right
    grad_norm: float  # before clipping
    tokens: int  # that are no padding
    flops: int  # floating-point operations of the model's matrix products
    skipped: bool  # for bad numbers; weights and moments are as they were
    loss_scale: float  # of fp16; else 1


class Engine:
    """A model and its optimizer on all ranks, under the backend that the launcher chose.

    Attributes:
        model: to be called; the backend may have wrapped it.
        raw_model: the same without the backend.
        backend_name: for people.
        precision: of matrix products: fp32, bf16 or fp16.
        heartbeat: called at every micro-step, for a watchdog.
    """

    def __init__(
        self,
        rank_info: RankInfo,
        model: MaskedRoberta,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        *,
        seed: int,
        timeout_seconds: float | None = None,
        in_common: Mapping[str, Any] | None = None,
    ) -> None:
        """Join the other ranks.

        Args:
            seed: of dropout.
            timeout_seconds: after which a collective that not all ranks have come to ends them;
                None: the backend's default.
            in_common: what all ranks must have alike, by name.

        Raises:
            UserError: the world or the backend is not the one that the launcher announced, or the
                ranks do not agree on the run.
        """
        self.rank_info = rank_info
        self.raw_model = model
        self.precision = training.precision
        self.heartbeat: Callable[[], None] = lambda: None
        self.loss_scale = LossScale(training.precision)
        self.accelerator = join(
            rank_info, optimizer.max_grad_norm, training.precision, timeout_seconds
        )
        self._agree(in_common or {})
        self._seed = seed
        model.compute_dtype = _DTYPES[training.precision]
        plugin = self.accelerator.state.deepspeed_plugin
        is_stage_3 = plugin and plugin.deepspeed_config["zero_optimization"]["stage"] == 3
        # Stage 3 gathers and drops weights by hooks around every module, which do not compile.
        self._compiles = training.compile and not is_stage_3
        if self._compiles:
            model.compile_parts()
        # DeepSpeed and DDP move weights in place, so the optimizer may be built before them.
        self.optimizer = build_optimizer(model.to(self.device), optimizer)
        self.backend, self.backend_name = make_backend(
            self.accelerator, model, self.optimizer, optimizer.max_grad_norm
        )
        self.model = self.backend.model
        self._host: dict[str, Tensor] = {}

    def _agree(self, in_common: Mapping[str, Any]) -> None:
        """Compare with the other ranks before the backend deals a model that may differ."""
        state = self.accelerator.state
        deepspeed = state.deepspeed_plugin and state.deepspeed_plugin.deepspeed_config
        backend = {"backend": state.distributed_type.value, "DeepSpeed config": deepspeed}
        refuse_disagreement({**in_common, **backend}, platform.node(), self.from_all)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(self.accelerator.device)

    @property
    def description(self) -> str:
        """Devices, backend and precision in words, for people."""
        ranks = self.rank_info.world_size
        kind = self.device.type.upper()
        if self.device.type == "cuda":
            kind = torch.cuda.get_device_name(self.device)
        backend = self.backend_name
        if torch.distributed.is_initialized():
            backend += f" over {torch.distributed.get_backend()}"
        return f"{ranks} x {kind}: {backend}, precision {self.precision}"

    def train_step(
        self,
        step: int,
        micro_batches: Sequence[MicroBatch],
        learning_rate: float,
        loss_limit: float = math.inf,
        grad_norm_limit: float = math.inf,
    ) -> StepResult:
        """Do forward and backward passes over this rank's micro-batches, then an optimizer step.

        No rank moves its weights where the loss or the gradient norm is not finite, or exceeds its
        limit, on any rank.

        Args:
            step: counted from 0; with the seed it decides dropout.
            micro_batches: this rank's rows; all ranks bring as many.
            loss_limit: largest loss with which weights move.
            grad_norm_limit: the same for the gradient norm.
        """
        masked, tokens, pairs = self._count(micro_batches)
        loss, correct = self._forward_backward(step, micro_batches, masked)
        scale = self.loss_scale.value
        may_step = loss.isfinite() & (loss <= loss_limit)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        grad_norm, stepped = self.backend.step(may_step, grad_norm_limit, scale)
        # One wait for the device.
        numbers = torch.stack([loss, correct, grad_norm.double(), stepped.double()]).tolist()
        loss_value, accuracy, norm, has_stepped = numbers
        overflowed = not math.isfinite(norm) and math.isfinite(loss_value) and scale > 1
        self.loss_scale.after(overflowed=overflowed)
        return StepResult(
            loss=loss_value,
            accuracy=accuracy,
            grad_norm=norm,
            tokens=tokens,
            flops=training_flops(self.raw_model.config, tokens, pairs, masked),
            skipped=not has_stepped and not overflowed,
            loss_scale=scale,
        )

    def _count(self, micro_batches: Sequence[MicroBatch]) -> tuple[int, int, int]:
        """Masked tokens (at least 1), tokens, and attended pairs of a step, over all ranks."""
        batches = [micro_batch.batch for micro_batch in micro_batches]
        own = [
            sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches),
            sum(batch.tokens for batch in batches),
            sum(batch.attended_pairs for batch in batches),
        ]
        masked, tokens, pairs = self.sum_over_ranks(torch.tensor(own, dtype=torch.float64)).tolist()
        return max(1, int(masked)), int(tokens), int(pairs)

    def _forward_backward(
        self, step: int, micro_batches: Sequence[MicroBatch], masked: int
    ) -> tuple[Tensor, Tensor]:
        """Add up gradients. Returns the loss and the accuracy over all ranks, on the device."""
        self.model.train()
        sums = torch.zeros(2, device=self.device)
        for micro_step, micro_batch in enumerate(micro_batches):
            seed = dropout_seed(self._seed, step, micro_step, self.rank_info.rank)
            torch.manual_seed(seed)
            with self.backend.accumulating(micro_step == len(micro_batches) - 1):
                loss_sum, correct = self.model(**micro_batch.on(self.device))
                # Backends average over ranks.
                loss = loss_sum * (self.rank_info.world_size / masked)
                self.backend.backward(loss, self.loss_scale.value)
            sums += torch.stack([loss_sum.detach(), correct])
            self.heartbeat()
        mean_loss, accuracy = self.sum_over_ranks(sums).double() / masked
        return mean_loss, accuracy

    def forget_compiled(self) -> None:
        """Compile anew for the sizes that follow.

        Otherwise PyTorch would compile for sizes that vary, which is slower for good.
        """
        if self._compiles:
            torch.compiler.reset()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of every rank's tensor, on the device; all ranks must call this together."""
        return torch.as_tensor(self.accelerator.reduce(values.to(self.device), reduction="sum"))

    def is_finite(self) -> Tensor:
        """Whether this rank's weights and moments are all finite, on the device."""
        return self.optimizer.is_finite().to(self.device)

    def from_main(self, value: T) -> T:
        """Rank 0's value, on all ranks. It must be one that JSON can write; tuples become lists."""
        if self.rank_info.world_size == 1:
            return by_way_of_json(value)  # type: ignore[no-any-return]
        return from_rank_0(value, self.device)  # type: ignore[no-any-return]

    def on_main(self, action: Callable[[], T]) -> T:
        """What an action of rank 0 returns, on all ranks; see :meth:`from_main`.

        Raises:
            UserError: the action failed on rank 0. All ranks raise it, so nobody waits.
        """
        result: T | None = None
        failure: str | None = None
        if self.rank_info.is_main:
            try:
                result = action()
            except (UserError, OSError) as error:
                failure = str(error)
        result, failure = self.from_main((result, failure))
        if failure is not None:
            raise UserError(failure)
        return result  # type: ignore[return-value]

    def from_all(self, value: T) -> list[T]:
        """Every rank's value in the order of the ranks, on all of them; see :meth:`from_main`."""
        if self.rank_info.world_size == 1:
            return [by_way_of_json(value)]
        return from_all_ranks(value, self.device)

    def wait_for_all(self) -> None:
        """Return when all ranks have come here."""
        self.accelerator.wait_for_everyone()

    def compare_replicas(self) -> None:
        """Compare the weights that every rank has, bit by bit.

        Under ZeRO-3 these are the few small ones that stay whole everywhere.

        Raises:
            UserError: some rank's weights differ.
        """
        bits = [
            parameter.detach().view(torch.int32).sum(dtype=torch.int64)
            for parameter in self.raw_model.parameters()
        ]
        sums = self.from_all((platform.node(), torch.stack(bits).tolist()))
        copies = [tuple(copy) for _, copy in sums]
        usual = statistics.mode(copies)
        if all(copy == usual for copy in copies):
            return
        has_majority = 2 * copies.count(usual) > len(copies)
        suspects = [
            f"rank {rank} ({node})"
            for rank, (node, _) in enumerate(sums)
            if not has_majority or copies[rank] != usual
        ]
        found = "has other weights than the rest"
        if not has_majority:
            found = "differ in their weights, and none has most ranks on its side"
        raise UserError(
            f"{', '.join(suspects)} {found}: a device may be faulty. Leave it out; the same "
            "command goes on from the last checkpoint"
        )

    def leave(self) -> None:
        """Leave the other ranks in order."""
        # Gloo's thread needs the GIL to let go of the last collective's tensors. torch joins that
        # thread with the GIL held when the process group goes, so a rank that is quick between the
        # two hangs for ever (seen once in some 100 launches). Sleeping lends the GIL.
        time.sleep(_SECONDS_FOR_GLOO)
        self.accelerator.end_training()

    def release(self) -> None:
        """Have the libraries let go of model and optimizer. This engine can do nothing more."""
        self.accelerator.free_memory()
        self.backend.release()

    def matmul_flops_per_second(self, seconds: float = 0.3) -> float:
        """Measure square matrix products in the run's precision, on all ranks at once."""
        on_gpu = self.device.type == "cuda"
        settle: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
        size = 8192 if on_gpu else 768
        matrix = torch.ones(size, size, dtype=self.raw_model.compute_dtype, device=self.device)
        other = matrix.clone()
        matrix @ other
        settle()
        self.wait_for_all()
        products = 0
        start = time.perf_counter()
        while time.perf_counter() < start + seconds:
            matrix @ other
            products += 1
            settle()
        rate = 2.0 * size**3 * products / (time.perf_counter() - start)
        return self.sum_over_ranks(torch.tensor(rate, dtype=torch.float64)).item()

    def snapshot(self) -> Snapshot:
        """Copy this rank's share of weights and moments to its host's memory; all ranks together.

        The buffers are used again, so an earlier snapshot must have been written.
        """
        rank = self.rank_info.rank
        world_size = self.rank_info.world_size
        for number, (name, value) in enumerate(named_state(self.optimizer)):
            if number % world_size == rank:
                if name not in self._host:
                    self._host[name] = torch.empty(value.shape, pin_memory=value.is_cuda)
                self._host[name].copy_(value, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        numbers = {
            "steps": self.optimizer.steps,
            "loss_scale": self.loss_scale.value,
            "good_steps": self.loss_scale.good_steps,
        }
        name = f"state-{rank:05d}-of-{world_size:05d}.safetensors"
        return Snapshot(name, self._host, numbers)

    def save_state(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write all ranks' snapshots, and return their manifest entries."""
        return dict(self.from_all(self.snapshot().save(folder)))

    def load_state(self, folder: Path) -> None:
        """Take up what :meth:`save_state` wrote under any backend and world size."""
        saved = SavedState(folder)
        check_named_state(self.optimizer, saved)
        numbers = saved.numbers("steps", "loss_scale", "good_steps")
        self._load(saved, numbers)

    def begin_anew(self, model: MaskedRoberta) -> None:
        """Take up the weights of a model that has not been trained."""
        scale = LossScale(self.precision)
        numbers = {"steps": 0.0, "loss_scale": scale.value, "good_steps": scale.good_steps}
        self._load(InitialState(model), numbers)

    def _load(self, saved: SavedState | InitialState, numbers: dict[str, float]) -> None:
        load_named_state(self.optimizer, saved, self.backend.set_weight)
        self.optimizer.steps = numbers["steps"]
        self.loss_scale.value = numbers["loss_scale"]
        self.loss_scale.good_steps = int(numbers["good_steps"])
