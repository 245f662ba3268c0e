"""How gradients are computed, reduced and applied: PyTorch alone or in DDP, or DeepSpeed.

Three backends with the methods of :class:`Backend`. All average gradients over ranks.
"""

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kantai.optim.optimizer import Optimizer
from kantai.optim.sharding import Layout, ParamSlice, ShardedTensor


class Backend(Protocol):
    """What an engine needs to know of a backend."""

    model: Any  # to call; the backend may have wrapped it

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """A context for a micro-step. Before the last one, gradients are not reduced."""
        ...

    def backward(self, loss: Tensor, scale: float) -> None:
        """Add the gradients of a micro-step, ``scale`` times as large."""
        ...

    def step(self, may_step: Tensor, limit: float, scale: float) -> tuple[Tensor, Tensor]:
        """Clip gradients and move weights, or leave all as it is.

        The decision is made on the device, which nobody waits for.

        Args:
            may_step: bool; whether anything may move at all.
            limit: largest gradient norm with which anything may move.
            scale: of the gradients; see :meth:`backward`.

        Returns:
            The gradient norm before clipping, and whether weights moved.
        """
        ...

    def set_weight(self, name: str, whole: Tensor) -> None:
        """Give the model a weight that the optimizer's tensors have been given."""
        ...

    def release(self) -> None:
        """Let go of what takes memory, though libraries may hold on to the objects."""
        ...


def make_backend(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, max_grad_norm: float
) -> tuple[Backend, str]:
    """The backend that the launcher chose, and its name.

    Args:
        max_grad_norm: gradients are scaled down to this norm; 0: never.
    """
    clip_norm = max_grad_norm or math.inf
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        backend = PyTorch(accelerator, model, optimizer, clip_norm)
        is_ddp = isinstance(backend.model, DistributedDataParallel)
        return backend, "PyTorch DDP" if is_ddp else "PyTorch"
    stage: int = plugin.deepspeed_config["zero_optimization"]["stage"]
    if stage == 0:
        return DeepSpeedDDP(accelerator, model, optimizer, clip_norm), "DeepSpeed ZeRO-0"
    return DeepSpeedZero(accelerator, model, optimizer, stage), f"DeepSpeed ZeRO-{stage}"


class PyTorch:
    """One process alone, or PyTorch's DDP: every rank has all weights, gradients and moments."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, clip_norm: float
    ) -> None:
        self.model = accelerator.prepare(model)
        self._accelerator = accelerator
        self._optimizer = optimizer
        self._parameters = list(model.parameters())
        self._clip_norm = clip_norm
        if isinstance(self.model, DistributedDataParallel):
            # Our buffers hold positions, which never change. (As an argument of DDP's, this makes
            # PyTorch 2.13 warn at every start.)
            self.model.broadcast_buffers = False
            _settle_buckets(self.model, model)

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        if is_last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def backward(self, loss: Tensor, scale: float) -> None:
        torch.autograd.backward(loss * scale)

    def step(self, may_step: Tensor, limit: float, scale: float) -> tuple[Tensor, Tensor]:
        norm = _mean_norm(self._accelerator, self._parameters, scale)
        steps = may_step & norm.isfinite() & (norm <= limit)
        self._optimizer.set_scaling((~steps).float(), _clip_scale(norm, self._clip_norm, scale))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm, steps

    def set_weight(self, name: str, whole: Tensor) -> None:
        """Nothing to do: the optimizer's tensors are the model's own."""

    def release(self) -> None:
        vars(self._optimizer).clear()


class DeepSpeedDDP:
    """DeepSpeed's stage 0: its own data parallelism, with all weights and moments on every rank."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, clip_norm: float
    ) -> None:
        self.model, _ = accelerator.prepare(model, optimizer)
        self._accelerator = accelerator
        self._optimizer = optimizer
        self._parameters = list(model.parameters())
        self._clip_norm = clip_norm

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        self.model.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, scale: float) -> None:
        self.model.backward(loss * scale, scale_wrt_gas=False)

    def step(self, may_step: Tensor, limit: float, scale: float) -> tuple[Tensor, Tensor]:
        """Clips and skips as without DeepSpeed."""
        norm = _mean_norm(self._accelerator, self._parameters, scale)
        steps = may_step & norm.isfinite() & (norm <= limit)
        self._optimizer.set_scaling((~steps).float(), _clip_scale(norm, self._clip_norm, scale))
        self.model.step()
        return norm, steps

    def set_weight(self, name: str, whole: Tensor) -> None:
        """Nothing to do: the optimizer's tensors are the model's own."""

    def release(self) -> None:
        vars(self._optimizer).clear()


class DeepSpeedZero:
    """DeepSpeed's stages 1 to 3: every rank updates its own slices of flattened parameters.

    DeepSpeed's own checkpoints depend on stage and world size and are overwritten file by file,
    so they are not used.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, stage: int
    ) -> None:
        self.model, _ = accelerator.prepare(model, optimizer)
        self._optimizer = optimizer
        self._zero: Any = self.model.optimizer
        self._parameters = dict(model.named_parameters())
        self._is_stage_3 = stage == 3
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        find = _tensors_of_stage_3 if self._is_stage_3 else _tensors_of_stages_1_and_2

        def sum_over_ranks(values: Tensor) -> Tensor:
            on_device = values.to(accelerator.device)
            return torch.as_tensor(accelerator.reduce(on_device, reduction="sum"))

        optimizer.set_layout(Layout(find(self._zero, optimizer, names), sum_over_ranks))
        optimizer.register_step_pre_hook(self._decide)
        self._may_step = torch.ones((), dtype=torch.bool)
        self._limit = math.inf

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        self.model.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, scale: float) -> None:
        """DeepSpeed scales."""
        if scale != self._zero.loss_scale:
            self._zero.override_loss_scale(scale)
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, may_step: Tensor, limit: float, scale: float) -> tuple[Tensor, Tensor]:
        """DeepSpeed clips, and refuses gradients that are not finite."""
        self._may_step = may_step
        self._limit = limit
        self.model.step()
        norm = self._norm()
        return norm, may_step & norm.isfinite() & (norm <= limit)

    def set_weight(self, name: str, whole: Tensor) -> None:
        """The model's copy is another one than the optimizer's."""
        parameter: Any = self._parameters[name]
        if not self._is_stage_3:
            parameter.data.copy_(whole)
            return
        start, numel = _slice_of_stage_3(parameter)
        parameter.ds_tensor.data[:numel].copy_(whole.flatten()[start : start + numel])
        if parameter.data.numel() == whole.numel():  # small ones stay whole on every rank
            parameter.data.copy_(whole)

    def release(self) -> None:
        """Stage 3's lists and hooks keep this object alive for ever."""
        vars(self._zero).clear()
        vars(self._optimizer).clear()

    def _norm(self) -> Tensor:
        norm = self._zero._global_grad_norm
        return torch.as_tensor(norm, device=self._may_step.device, dtype=torch.float32)

    def _decide(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Called before each step of the optimizer: DeepSpeed knows the gradient norm no sooner."""
        assert isinstance(optimizer, Optimizer)
        found_inf = (~(self._may_step & (self._norm() <= self._limit))).float()
        # Where the optimizer is offloaded, PyTorch would copy this without waiting for it.
        optimizer.set_scaling(found_inf.to(optimizer.layout.tensors[0].tensor.device))


def _mean_norm(accelerator: Accelerator, parameters: list[nn.Parameter], scale: float) -> Tensor:
    """The norm of all gradients, unscaled: its mean over ranks, by which all of them decide alike.

    The ranks have the same gradients, or should have: what one of them sees, all heed.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = accelerator.reduce(_norm(gradients) / scale, reduction="mean")
    return torch.as_tensor(norm)


def _norm(gradients: list[Tensor]) -> Tensor:
    if gradients[0].is_cuda:
        return nn.utils.get_total_norm(gradients)
    # On CPU, PyTorch adds up a tensor's squares one by one: 5e-5 off for 52,000 x 64 of them.
    rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    return torch.as_tensor(torch.linalg.vector_norm(torch.cat(rows)))


def _clip_scale(norm: Tensor, clip_norm: float, scale: float) -> Tensor:
    """What gradients are to be divided by: it unscales them and clips them to ``clip_norm``."""
    return scale * ((norm + 1e-6) / clip_norm).clamp(min=1.0)


def _settle_buckets(ddp: DistributedDataParallel, model: nn.Module) -> None:
    """Do a first backward pass, of nothing.

    After the first one, DDP deals gradients into other buckets, and where a gradient lies decides
    in which order more than two ranks add it up. A resumed run would differ from one that went
    straight on.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.compiler.set_stance("force_eager"):
        loss_sum, _ = ddp(token, masked_positions=token, labels=token)
    (loss_sum * 0).backward()
    model.zero_grad()


def _tensors_of_stages_1_and_2(
    zero: Any, optimizer: Optimizer, names: dict[int, str]
) -> list[ShardedTensor]:
    groups = zip(
        optimizer.param_groups, zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True
    )
    found = []
    for group, tensor, parameters in groups:
        slices = []
        for parameter in parameters:
            start = offset = numel = 0
            mapping = parameter._hp_mapping
            if mapping is not None:
                start = mapping.lp_fragment_address.start
                numel = mapping.lp_fragment_address.numel
                offset = mapping.hp_fragment_address.start
            shape = tuple(parameter.shape)
            slices.append(ParamSlice(names[id(parameter)], shape, start, offset, numel))
        found.append(ShardedTensor(tensor, group["kind"], slices))
    return found


def _tensors_of_stage_3(
    zero: Any, optimizer: Optimizer, names: dict[int, str]
) -> list[ShardedTensor]:
    found = []
    groups = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    for number, (tensor, parameters) in enumerate(groups):
        slices = []
        for parameter in parameters:
            _, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            start, numel = _slice_of_stage_3(parameter)
            shape = tuple(parameter.ds_shape)
            slices.append(ParamSlice(names[id(parameter)], shape, start, offset, numel))
        kind = optimizer.param_groups[zero.sub_group_to_group_id[number]]["kind"]
        found.append(ShardedTensor(tensor, kind, slices))
    return found


def _slice_of_stage_3(parameter: Any) -> tuple[int, int]:
    """Start and size of this rank's slice of a flattened parameter; the last may be empty."""
    size = parameter.ds_tensor.numel()
    start = torch.distributed.get_rank() * size
    return start, max(0, min(size, parameter.ds_numel - start))
