"""Who computes and reduces gradients, and keeps what the optimizer steps: PyTorch alone or in DDP, or DeepSpeed.

All offer what :class:`Torch` does. Gradients are averaged over ranks.
"""

import contextlib
import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kantai.optim.optimizer import Optimizer, ParamSlice, ShardedTensor


class Torch:
    """Weights, gradients and moments whole on every rank."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, max_grad_norm: float) -> None:
        self.accelerator, self.model = accelerator, accelerator.prepare(model)
        self.raw_model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm or math.inf
        if isinstance(self.model, DistributedDataParallel):
            self._settle_buckets()

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """A context for a micro-step: before the last one, gradients stay where they are."""
        reduces = is_last or not isinstance(self.model, DistributedDataParallel)
        return contextlib.nullcontext() if reduces else self.model.no_sync()

    def backward(self, loss: Tensor, scale: float) -> None:
        """Add a micro-step's gradients, ``scale`` times as large."""
        torch.autograd.backward(loss * scale)

    def step(self, may_step: Tensor, limit: float, scale: float) -> tuple[Tensor, Tensor]:
        """Clip and step, or leave all as it is; decided on the device, which nobody waits for.

        Args:
            may_step: bool; whether anything may move at all.
            limit: gradient norm from which on nothing does.
            scale: see :meth:`backward`.

        Returns:
            The gradient norm before clipping, and whether a step was taken.
        """
        gradients = [parameter.grad for parameter in self.raw_model.parameters() if parameter.grad is not None]
        # The mean over ranks, which have the same gradients, or should: what one of them sees, all decide by.
        norm = torch.as_tensor(self.accelerator.reduce(_norm(gradients) / scale, reduction="mean"))
        steps = may_step & norm.isfinite() & (norm <= limit)
        self.optimizer.found_inf = (~steps).float()
        self.optimizer.grad_scale = scale * ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)
        self._take()
        return norm, steps

    def set_weight(self, name: str, whole: Tensor) -> None:
        """Let the model have a weight that the optimizer was given: here, its tensor is the model's own."""

    def release(self) -> None:
        """Let go of what takes memory, though others may hold on to the optimizer."""
        vars(self.optimizer).clear()

    def _take(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _settle_buckets(self) -> None:
        """Have a first backward pass, of nothing.

        After the first one, DDP deals gradients into other buckets, and where a gradient lies decides in which order more than two
        ranks add it up: a resumed run would differ from one that went straight on.
        """
        token = torch.zeros(1, 1, dtype=torch.long, device=next(self.raw_model.parameters()).device)
        with torch.compiler.set_stance("force_eager"):
            loss_sum, _ = self.model(token, masked_positions=token, labels=token)
        (loss_sum * 0).backward()
        self.raw_model.zero_grad()


class DeepSpeedZero0(Torch):
    """DeepSpeed's stage 0: its own data parallelism over whole weights. Clipped and skipped as without it."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, max_grad_norm: float) -> None:
        self.accelerator = accelerator
        self.model, _ = accelerator.prepare(model, optimizer)
        self.raw_model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm or math.inf

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """See :meth:`Torch.accumulating`."""
        self.model.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, scale: float) -> None:
        """See :meth:`Torch.backward`."""
        self.model.backward(loss * scale, scale_wrt_gas=False)

    def _take(self) -> None:
        self.model.step()


class DeepSpeedZero(DeepSpeedZero0):
    """DeepSpeed's stages 1 to 3: what the optimizer steps are pieces of flattened parameters, different ones on every rank.

    DeepSpeed's own checkpoints are tied to stage and world size and are written in place, so they are not used.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, max_grad_norm: float, *, is_stage_3: bool) -> None:
        super().__init__(accelerator, model, optimizer, max_grad_norm)
        self.zero: Any = self.model.optimizer
        self.is_stage_3 = is_stage_3
        self._parameters = dict(model.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        optimizer.sharded = self._sharded_by_stage_3() if self.is_stage_3 else self._sharded_by_stages_1_and_2()
        optimizer.sum_over_ranks = lambda values: torch.as_tensor(accelerator.reduce(values.to(accelerator.device), reduction="sum"))
        optimizer.before_step = self._decide
        self._may_step, self._limit = torch.ones((), dtype=torch.bool), math.inf

    def backward(self, loss: Tensor, scale: float) -> None:
        """See :meth:`Torch.backward`; DeepSpeed scales."""
        if scale != self.zero.loss_scale:
            self.zero.override_loss_scale(scale)
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, may_step: Tensor, limit: float, scale: float) -> tuple[Tensor, Tensor]:
        """See :meth:`Torch.step`; DeepSpeed clips, and refuses gradients that are not finite."""
        self._may_step, self._limit = may_step, limit
        self.model.step()
        norm = self._norm()
        return norm, may_step & norm.isfinite() & (norm <= limit)

    def set_weight(self, name: str, whole: Tensor) -> None:
        """See :meth:`Torch.set_weight`; the model's copy is another one."""
        parameter: Any = self._parameters[name]
        if not self.is_stage_3:
            parameter.data.copy_(whole)
            return
        start, numel = self._slice_of_stage_3(parameter)
        parameter.ds_tensor.data[:numel].copy_(whole.flatten()[start : start + numel])
        if parameter.data.numel() == whole.numel():  # small ones stay whole on every rank
            parameter.data.copy_(whole)

    def release(self) -> None:
        """See :meth:`Torch.release`; lists and hooks of stage 3 hold on to this object for ever, but not to what is in it."""
        vars(self.zero).clear()
        super().release()

    def _norm(self) -> Tensor:
        return torch.as_tensor(self.zero._global_grad_norm, device=self._may_step.device, dtype=torch.float32)

    def _decide(self) -> None:
        found_inf = (~(self._may_step & (self._norm() <= self._limit))).float()
        self.optimizer.found_inf = found_inf.to(self.optimizer.sharded[0].tensor.device)  # offloaded: PyTorch would copy it without waiting

    def _sharded_by_stages_1_and_2(self) -> list[ShardedTensor]:
        sharded = []
        for group, tensor, parameters in zip(
            self.optimizer.param_groups, self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups, strict=True
        ):
            parts = []
            for parameter in parameters:
                mapping, shape = parameter._hp_mapping, tuple(parameter.shape)
                start, offset, numel = 0, 0, 0
                if mapping is not None:
                    start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                    offset = mapping.hp_fragment_address.start
                parts.append(ParamSlice(self._names[id(parameter)], shape, start, offset, numel))
            sharded.append(ShardedTensor(tensor, group["kind"], parts))
        return sharded

    def _sharded_by_stage_3(self) -> list[ShardedTensor]:
        sharded = []
        for number, (tensor, parameters) in enumerate(zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True)):
            parts = []
            for parameter in parameters:
                _, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start, numel = self._slice_of_stage_3(parameter)
                parts.append(ParamSlice(self._names[id(parameter)], tuple(parameter.ds_shape), start, offset, numel))
            kind = self.optimizer.param_groups[self.zero.sub_group_to_group_id[number]]["kind"]
            sharded.append(ShardedTensor(tensor, kind, parts))
        return sharded

    def _slice_of_stage_3(self, parameter: Any) -> tuple[int, int]:
        """Start and size of the slice of a flattened parameter that is this rank's; the last ranks' may be short or empty."""
        start = torch.distributed.get_rank() * parameter.ds_tensor.numel()
        return start, max(0, min(parameter.ds_tensor.numel(), parameter.ds_numel - start))


def _norm(gradients: list[Tensor]) -> Tensor:
    if gradients[0].is_cuda:
        return nn.utils.get_total_norm(gradients)
    # On CPU, PyTorch adds up a tensor's squares one after the other: 5e-5 off for 52,000 x 64 of them.
    of_rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    return torch.as_tensor(torch.linalg.vector_norm(torch.cat(of_rows)))
