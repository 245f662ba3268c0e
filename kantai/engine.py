"""How is an update done on N ranks? The only module that knows Accelerate and DeepSpeed.

The gradient of an update is that of (sum of the masked tokens' losses over the global batch) / (number of masked tokens in it), however
that batch is dealt over ranks and micro-steps. A mean of means over ranks would weigh a token by how few others its micro-batch has.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kantai import UserError
from kantai.checkpoint import record
from kantai.cluster import Place
from kantai.config import Config
from kantai.data import dropout_seed
from kantai.masking import IGNORED_LABEL
from kantai.model import MaskedRoberta, MicroBatch, training_flops
from kantai.optim import build_optimizer

T = TypeVar("T")

_SECONDS_FOR_GLOO = 0.5

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Outcome:
    """What an update did, over all ranks."""

    loss: float  # nats a masked token
    accuracy: float
    grad_norm: float  # before clipping
    tokens: int
    flops: int

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


class Engine:
    """A model and its optimizer on all ranks, under the backend that the launcher chose."""

    def __init__(self, config: Config, place: Place, model: MaskedRoberta) -> None:
        """Join the other ranks.

        Raises:
            UserError: the world or the backend is not the one that the launcher announced.
        """
        self.config, self.place = config, place
        self.accelerator = _accelerator(config)
        _refuse_other_world(self.accelerator, place)
        self._deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if self._deepspeed:
            self.accelerator.state.deepspeed_plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": 1,  # which serves its own statistics alone
                "gradient_accumulation_steps": 1,  # until the first update says more
                "gradient_clipping": config.optimizer.max_grad_norm,
            }
        self.shape = model.config
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, config.optimizer))
        self.raw_model = model

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(self.accelerator.device)

    def update(self, update: int, micro_batches: Sequence[MicroBatch], learning_rate: float) -> Outcome:
        """Forward and backward over this rank's micro-batches, then one optimizer step.

        Args:
            update: counted from 0; with the seed it decides dropout.
            micro_batches: this rank's rows; all ranks bring as many.
        """
        batches = [micro_batch.batch for micro_batch in micro_batches]
        masked = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
        tokens, pairs = sum(batch.tokens for batch in batches), sum(batch.attended_pairs for batch in batches)
        counts = self.sum_over_ranks(torch.tensor([masked, tokens, pairs], dtype=torch.float64))
        # Accelerate and DeepSpeed divide by the micro-steps, and average over ranks.
        weight = len(micro_batches) * self.place.world_size / max(1.0, counts[0].item())
        self._expect_micro_steps(len(micro_batches))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        sums = torch.zeros(2, device=self.device)
        for micro_step, micro_batch in enumerate(micro_batches):
            torch.manual_seed(dropout_seed(self.config.seed, update, micro_step, self.place.rank))
            with self.accelerator.accumulate(self.model):
                loss_sum, correct = self.model(**micro_batch.on(self.device))
                self.accelerator.backward(loss_sum * weight)
                sums += torch.stack([loss_sum.detach(), correct])
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss, correct = (self.sum_over_ranks(sums).double() / max(1.0, counts[0].item())).tolist()
        _, tokens, pairs = counts.long().tolist()
        flops = training_flops(self.shape, tokens, pairs, int(counts[0]))
        return Outcome(loss, correct, float(grad_norm), tokens, flops)

    def _expect_micro_steps(self, number: int) -> None:
        """Tell the backend how many backward passes the next optimizer step follows: stages of a run differ in that."""
        self.accelerator.step = 0  # Accelerate counts on from update to update, and would step at a multiple of the new number
        if number == self.accelerator.gradient_accumulation_steps:
            return
        self.accelerator.gradient_accumulation_steps = number
        if self._deepspeed:
            self.model.set_train_batch_size(number * self.place.world_size)
            self.model.optimizer.gradient_accumulation_steps = number

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of every rank's tensor, on the device; all ranks must call this together."""
        return torch.as_tensor(self.accelerator.reduce(values.to(self.device), reduction="sum"))

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on some rank: the agreement before every decision that leads to a collective."""
        return bool(self.sum_over_ranks(torch.tensor(float(flag))).item())

    def from_main(self, value: T) -> T:
        """Rank 0's value of something picklable, on all ranks."""
        return broadcast_object_list([value])[0] if self.place.world_size > 1 else value

    def wait_for_all(self) -> None:
        """Return when all ranks have come here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the other ranks in order."""
        # Gloo's thread needs the GIL to let go of the last collective's tensors, and torch joins that thread with the GIL held when the
        # process group goes: a rank that is quick between the two hangs for ever (seen once in some 100 launches). Sleeping lends the GIL.
        time.sleep(_SECONDS_FOR_GLOO)
        self.accelerator.end_training()

    def matmul_flops_per_second(self, seconds: float = 0.3) -> float:
        """Measured rate of square matrix products in the run's precision, all ranks at once, summed over them."""
        on_gpu = self.device.type == "cuda"
        size = 8192 if on_gpu else 768
        dtype = torch.bfloat16 if self.config.training.precision == "bf16" else torch.float32
        left, right = (torch.ones(size, size, dtype=dtype, device=self.device) for _ in range(2))
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

    def save_state(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write weights and moments in fp32 by parameter name, each rank its share, and return all files' manifest entries.

        The format knows no backend and no world size: tensors ``NAME``, ``NAME/exp_avg`` and ``NAME/exp_avg_sq``.
        """
        share: dict[str, Tensor] = {}
        for number, (name, state) in enumerate(self._states()):
            if number % self.place.world_size == self.place.rank:
                share |= {_entry(name, key): value.detach().float().cpu().contiguous() for key, value in state.items()}
        path = folder / f"state-{self.place.rank:05d}-of-{self.place.world_size:05d}.safetensors"
        save_file(share, path)
        return dict(gather_object([(path.name, record(path))]))

    def load_state(self, folder: Path, steps: int) -> None:
        """Take up what :meth:`save_state` wrote, whatever the backend and world size were.

        Args:
            steps: optimizer steps done so far.

        Raises:
            UserError: a tensor is missing, is one too many, or has another shape.
        """
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("state-*.safetensors"))]
        places = {name: file for file in files for name in file.keys()}
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.raw_model.named_parameters()}
        expected = {_entry(name, key): shape for name, shape in shapes.items() for key in ("", *MOMENTS)}
        for name in sorted(expected.keys() ^ places.keys()):
            raise UserError(f"{folder} {'lacks' if name in expected else 'has an unknown'} tensor {name}: it is of another model")
        for name, shape in expected.items():
            if tuple(places[name].get_slice(name).get_shape()) != shape:
                raise UserError(f"{folder}: {name} has shape {places[name].get_slice(name).get_shape()}, the model's is {list(shape)}")

        def read(name: str, key: str) -> Tensor:
            return places[_entry(name, key)].get_tensor(_entry(name, key))  # type: ignore[no-any-return]

        if self._deepspeed:
            self._zero_state().load(read, steps)
            return
        inner = self.optimizer.optimizer
        with torch.no_grad():
            for name, parameter in self.raw_model.named_parameters():
                parameter.copy_(read(name, ""))
                moments = {key: read(name, key).to(parameter.device) for key in MOMENTS}
                inner.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device), **moments}

    def _states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name, weight (key "") and moments of every parameter in turn; a collective under ZeRO."""
        if self._deepspeed:
            yield from self._zero_state().save()
            return
        for name, parameter in self.raw_model.named_parameters():
            state = self.optimizer.optimizer.state[parameter]
            yield name, {"": parameter, **{key: state[key] for key in MOMENTS}}

    def _zero_state(self) -> "_ZeroState":
        return _ZeroState(self.raw_model, self.model.optimizer)


class _ZeroState:
    """Weights and moments by parameter name in and out of a DeepSpeed ZeRO optimizer, which keeps them in flat partitions.

    DeepSpeed's own checkpoints are tied to stage and world size and are written in place, so they are not used.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer
        self.is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")

    def save(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name, weight (key "") and moments of every parameter; all ranks go through it together."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link()
        for name, parameter in self.model.named_parameters():
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            yield name, {"": safe_get_full_fp32_param(parameter), **moments}

    def load(self, get: Callable[[str, str], Tensor], steps: int) -> None:
        """Set every weight and moment from ``get(name, key)``."""
        inner = self.optimizer.optimizer
        partitions = self.optimizer.fp32_partitioned_groups_flat if self.is_stage_3 else self.optimizer.single_partition_of_fp32_groups
        for flat in partitions:  # before the first step there is no state to set; each gets a step count of its own
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            inner.state[flat] = {"step": torch.tensor(float(steps), device=flat.device), **moments}
        self._link()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                for key in ("", *MOMENTS):
                    (self._set_partitioned if self.is_stage_3 else self._set_full)(parameter, get(name, key), key)

    def _set_full(self, parameter: Any, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(parameter.device)
        if key:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)  # the setter leaves the model's own copy as it was

    def _set_partitioned(self, parameter: Any, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        # DeepSpeed's setter of a full value fails where the world size does not divide it; so each rank cuts out its own part.
        size, rank, world = parameter.ds_tensor.numel(), torch.distributed.get_rank(), torch.distributed.get_world_size()
        padded = torch.zeros(size * world, dtype=value.dtype)
        padded[: value.numel()] = value.flatten()
        part = padded[rank * size : (rank + 1) * size].to(parameter.ds_tensor.device)
        if key:
            safe_set_local_optimizer_state(parameter, part, key)
            return
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)
        if parameter.data.numel() == value.numel():  # small ones stay whole on every rank
            parameter.data.copy_(value)

    def _link(self) -> None:
        """Let parameters know where their state is. Stages 1 and 2 do that after the first group's first step only."""
        if not self.is_stage_3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()


def _entry(name: str, key: str) -> str:
    """What a parameter's weight (key "") or moment is called in a checkpoint."""
    return f"{name}/{key}" if key else name


def _accelerator(config: Config) -> Accelerator:
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    on_cpu = not torch.cuda.is_available()
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if deepspeed and on_cpu:
        # Without it every rank believes to be alone in the world. With it and without DeepSpeed, reductions do nothing.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
        _quiet_deepspeed_on_cpu()
    return Accelerator(
        cpu=on_cpu and not deepspeed,
        mixed_precision={"fp32": "no"}.get(config.training.precision, config.training.precision),
        kwargs_handlers=handlers,
    )


def _quiet_deepspeed_on_cpu() -> None:
    """Keep DeepSpeed from compiling, at every first start, an extension that only inference uses: more than a minute."""
    import deepspeed.ops
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel("WARNING")


def _refuse_other_world(accelerator: Accelerator, place: Place) -> None:
    """On CPU, Accelerate trains two independent worlds of one in several spellings, or leaves DeepSpeed out, without a word."""
    seen, announced = (accelerator.num_processes, accelerator.process_index), (place.world_size, place.rank)
    backend = accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        expected = [DistributedType.DEEPSPEED]
    else:
        expected = [DistributedType.MULTI_CPU, DistributedType.MULTI_GPU]
        if place.world_size == 1:
            expected.append(DistributedType.NO)
    if seen != announced or backend not in expected:
        raise UserError(
            f"the launcher announced rank {announced[1]} of {announced[0]} under {expected[0].value}, "
            f"but Accelerate sees rank {seen[1]} of {seen[0]} under {backend.value}: launch with one of configs/accelerate/*.yaml"
        )
