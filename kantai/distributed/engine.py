"""How is a step done on N ranks? The only place that knows Accelerate and DeepSpeed.

The gradient of a step is that of (sum of the masked tokens' losses over the global batch) / (number of masked tokens in it), however
that batch is dealt over ranks and micro-steps. A mean of means over ranks would weigh a token by how few others its micro-batch has.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from kantai.checkpoint.state import NUMBERS, SavedState, Snapshot
from kantai.cluster.environment import RankInfo
from kantai.config.schema import Config
from kantai.data.loader import MicroBatch
from kantai.data.masking import IGNORED_LABEL
from kantai.data.rng import dropout_seed
from kantai.distributed.backends import DeepSpeedZero, DeepSpeedZero0, Torch
from kantai.distributed.launch import join
from kantai.distributed.loss_scale import LossScale
from kantai.errors import UserError
from kantai.model.roberta import MaskedRoberta, training_flops
from kantai.optim.optimizer import MOMENTS, build_optimizer

T = TypeVar("T")
_SECONDS_FOR_GLOO = 0.5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks."""

    loss: float  # nats a masked token
    accuracy: float
    grad_norm: float  # before clipping
    tokens: int
    flops: int
    skipped: bool  # for bad numbers: weights and moments are as they were
    loss_scale: float  # of fp16; else 1

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


class Engine:
    """A model and its optimizer on all ranks, under the backend that the launcher chose.

    Attributes:
        heartbeat: called at every micro-step, for a watchdog.
        zero_stage: DeepSpeed's; None without DeepSpeed.
    """

    def __init__(self, config: Config, rank_info: RankInfo, model: MaskedRoberta, timeout_seconds: float | None = None) -> None:
        """Join the other ranks.

        Args:
            timeout_seconds: after which a collective that not all ranks have come to ends them; None: the backend's default.

        Raises:
            UserError: the world or the backend is not the one that the launcher announced.
        """
        self.config, self.rank_info = config, rank_info
        self.accelerator = join(rank_info, config.optimizer.max_grad_norm, timeout_seconds)
        self.shape, self.raw_model = model.config, model
        model.compute_dtype = _DTYPES[config.training.precision]
        plugin = self.accelerator.state.deepspeed_plugin
        self.zero_stage: int | None = plugin and plugin.deepspeed_config["zero_optimization"]["stage"]
        if config.training.compile and self.zero_stage != 3:  # whose hooks gather and drop weights around every module
            model.compile_parts()
        # Where DeepSpeed or DDP move weights, they do so in place: the optimizer may be built before.
        self.optimizer = build_optimizer(model.to(self.device), config.optimizer)
        parts = (self.accelerator, model, self.optimizer, config.optimizer.max_grad_norm)
        self.backend = (
            Torch(*parts)
            if self.zero_stage is None
            else DeepSpeedZero(*parts, is_stage_3=self.zero_stage == 3)
            if self.zero_stage
            else DeepSpeedZero0(*parts)
        )
        self.model = self.backend.model
        self.loss_scale = LossScale(config.training.precision)
        self.heartbeat: Callable[[], None] = lambda: None
        self._host: dict[str, Tensor] = {}

    @property
    def backend_name(self) -> str:
        """What the launcher chose."""
        return self.accelerator.distributed_type.value if self.zero_stage is None else f"DeepSpeed ZeRO-{self.zero_stage}"

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(self.accelerator.device)

    def train_step(
        self,
        step: int,
        micro_batches: Sequence[MicroBatch],
        learning_rate: float,
        loss_limit: float = math.inf,
        grad_norm_limit: float = math.inf,
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step.

        No rank steps where the loss or the gradient norm is not finite or exceeds its limit on any rank.

        Args:
            step: counted from 0; with the seed it decides dropout.
            micro_batches: this rank's rows; all ranks bring as many.
            loss_limit: above which nothing is updated.
            grad_norm_limit: the same for the gradient norm.
        """
        batches = [micro_batch.batch for micro_batch in micro_batches]
        masked = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
        tokens, pairs = sum(batch.tokens for batch in batches), sum(batch.attended_pairs for batch in batches)
        counts = self.sum_over_ranks(torch.tensor([masked, tokens, pairs], dtype=torch.float64))
        total_masked = max(1.0, counts[0].item())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        sums = torch.zeros(2, device=self.device)
        for micro_step, micro_batch in enumerate(micro_batches):
            torch.manual_seed(dropout_seed(self.config.seed, step, micro_step, self.rank_info.rank))
            with self.backend.accumulating(micro_step == len(micro_batches) - 1):
                loss_sum, correct = self.model(**micro_batch.on(self.device))
                # Backends average over ranks.
                self.backend.backward(loss_sum * (self.rank_info.world_size / total_masked), self.loss_scale.value)
            sums += torch.stack([loss_sum.detach(), correct])
            self.heartbeat()
        sums = self.sum_over_ranks(sums).double() / total_masked
        scale, is_good = self.loss_scale.value, sums[0].isfinite() & (sums[0] <= loss_limit)
        grad_norm, stepped = self.backend.step(is_good, grad_norm_limit, scale)
        loss, correct, norm, has_stepped = torch.stack([*sums, grad_norm.double(), stepped.double()]).tolist()
        overflowed = not math.isfinite(norm) and math.isfinite(loss) and scale > 1
        self.loss_scale.after(overflowed=overflowed)
        _, tokens, pairs = counts.long().tolist()
        flops = training_flops(self.shape, tokens, pairs, int(total_masked))
        return StepResult(loss, correct, norm, tokens, flops, not has_stepped and not overflowed, scale)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of every rank's tensor, on the device; all ranks must call this together."""
        return torch.as_tensor(self.accelerator.reduce(values.to(self.device), reduction="sum"))

    def from_main(self, value: T) -> T:
        """Rank 0's value of something picklable, on all ranks."""
        return broadcast_object_list([value])[0] if self.rank_info.world_size > 1 else value

    def on_main(self, action: Callable[[], T]) -> T:
        """What an action of rank 0 comes to, on all ranks.

        Raises:
            UserError: it failed there; so it does everywhere, and nobody waits.
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
        """Every rank's value of something picklable, in the order of the ranks, on all of them."""
        return list(gather_object([value]))

    def compare_replicas(self) -> None:
        """Compare the weights that every rank has, bit by bit; under ZeRO-3, the few that are whole everywhere.

        Raises:
            UserError: some rank's differ.
        """
        bits = [parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in self.raw_model.parameters()]
        sums = self.from_all((platform.node(), torch.stack(bits).tolist()))
        copies = [tuple(each) for _, each in sums]
        usual = statistics.mode(copies)
        if all(copy == usual for copy in copies):
            return
        has_majority = 2 * copies.count(usual) > len(copies)
        suspects = [f"rank {rank} ({node})" for rank, (node, _) in enumerate(sums) if not has_majority or copies[rank] != usual]
        found = "has other weights than the rest" if has_majority else "differ in their weights, and none has most ranks on its side"
        raise UserError(
            f"{', '.join(suspects)} {found}: a device may be faulty. Leave it out; the same command goes on from the last checkpoint"
        )

    def wait_for_all(self) -> None:
        """Return when all ranks have come here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the other ranks in order."""
        # Gloo's thread needs the GIL to let go of the last collective's tensors, and torch joins that thread with the GIL sharded when the
        # process group goes: a rank that is quick between the two hangs for ever (seen once in some 100 launches). Sleeping lends the GIL.
        time.sleep(_SECONDS_FOR_GLOO)
        self.accelerator.end_training()

    def release(self) -> None:
        """Have the libraries let go of model and optimizer, for another engine to have the room; this one is done with."""
        self.accelerator.free_memory()
        self.backend.release()

    def matmul_flops_per_second(self, seconds: float = 0.3) -> float:
        """Measured rate of square matrix products in the run's precision, all ranks at once, summed over them."""
        on_gpu = self.device.type == "cuda"
        size = 8192 if on_gpu else 768
        left, right = (torch.ones(size, size, dtype=self.raw_model.compute_dtype, device=self.device) for _ in range(2))
        settle: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
        left @ right
        settle()
        self.wait_for_all()
        products, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            left @ right
            products += 1
            settle()
        rate = 2.0 * size**3 * products / (time.perf_counter() - start)
        return self.sum_over_ranks(torch.tensor(rate, dtype=torch.float64)).item()

    def snapshot(self) -> Snapshot:
        """Copy this rank's share of weights and moments to its host's memory; all ranks together.

        Buffers are used again: an earlier snapshot must have been written.
        """
        for number, (name, value) in enumerate(self._state()):
            if number % self.rank_info.world_size == self.rank_info.rank:
                if name not in self._host:
                    self._host[name] = torch.empty(value.shape, pin_memory=value.is_cuda)
                self._host[name].copy_(value, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        name = f"state-{self.rank_info.rank:05d}-of-{self.rank_info.world_size:05d}.safetensors"
        return Snapshot(name, self._host, self._numbers())

    def save_state(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write all ranks' snapshots, and return their manifest entries."""
        return dict(self.from_all(self.snapshot().write(folder)))

    def load_state(self, folder: Path) -> None:
        """Take up what :meth:`save_state` wrote, whatever the backend and world size were.

        Raises:
            UserError: a tensor is missing, is one too many, or has another shape.
        """
        saved = SavedState(folder)
        saved.check_shapes(
            {
                _entry(part.name, key): part.shape
                for sharded in self.optimizer.sharded
                for part in sharded.parts
                for key in ("", *MOMENTS[sharded.kind])
            }
        )
        try:
            numbers = json.loads(saved.metadata[NUMBERS])
            steps, scale, good_steps = float(numbers["steps"]), float(numbers["loss_scale"]), int(numbers["good_steps"])
        except (KeyError, TypeError, ValueError, ArithmeticError):
            raise UserError(f"{folder} lacks the numbers that a run goes on with: it is no checkpoint of kantai's") from None
        self.loss_scale.value, self.loss_scale.good_steps = scale, good_steps
        with torch.no_grad():
            for sharded in self.optimizer.sharded:
                moments = self.optimizer.moments(sharded)
                for part in sharded.parts:
                    for key, tensor in (("", sharded.tensor), *moments.items()):
                        if key and not part.numel:  # another rank's
                            continue
                        name = _entry(part.name, key)
                        whole = saved[name]
                        tensor.view(-1)[part.offset : part.offset + part.numel] = whole.flatten()[part.start : part.start + part.numel]
                        if not key:
                            self.backend.set_weight(name, whole)
        self.optimizer.set_steps(steps)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight and moment, whole, by its name in a checkpoint; a collective under ZeRO."""
        for sharded in self.optimizer.sharded:
            for key, tensor in (("", sharded.tensor), *self.optimizer.moments(sharded).items()):
                for part, whole in self.optimizer.whole(sharded, tensor.detach()):
                    yield _entry(part.name, key), whole

    def _numbers(self) -> dict[str, float]:
        """Steps that AdamW has taken, which are fewer than the steps where some were skipped, and the loss scale."""
        steps = next(state["step"] for state in self.optimizer.state.values() if "step" in state)
        return {"steps": steps.item(), "loss_scale": self.loss_scale.value, "good_steps": self.loss_scale.good_steps}


def _entry(name: str, key: str) -> str:
    """What a parameter's weight (key "") or moment is called in a checkpoint."""
    return f"{name}/{key}" if key else name
