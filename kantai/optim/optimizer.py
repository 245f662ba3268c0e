"""Parameter groups, AdamW and Muon."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kantai.config.schema import OptimizerConfig
from kantai.optim.muon import orthogonalize

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
_BUCKET_ELEMENTS = 2**25


@dataclass(frozen=True)
class ParamSlice:
    """Which elements of a parameter lie where in a tensor that an optimizer steps on this rank."""

    name: str
    shape: tuple[int, ...]
    start: int  # in the flattened parameter
    offset: int  # in the tensor
    numel: int  # 0 where another rank has all of it


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor that an optimizer steps on this rank: one parameter, or pieces of many laid end to end by ZeRO."""

    tensor: Tensor
    kind: str  # a key of MOMENTS
    parts: list[ParamSlice]  # of all parameters that lie in it on some rank, in the same order on all ranks


class Optimizer(torch.optim.AdamW):
    """Fused AdamW, and Muon for the groups of that kind, over whole parameters or ZeRO's pieces of them.

    Attributes:
        sharded: what is updated on this rank; an engine whose backend regroups parameters says what came of it.
        sum_over_ranks: adds a tensor over the ranks that hold pieces of the same parameters; None where everything is whole.
        found_inf: 1.0 makes the next step leave all as it is, decided on the device; ``grad_scale`` divides gradients first. Both are
            PyTorch's, for gradient scalers.
        before_step: called first in a step; ZeRO knows the gradient norm no sooner.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        betas = (config.adam_beta1, config.adam_beta2)
        super().__init__(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True)
        self.muon_momentum = config.muon_momentum
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.before_step: Callable[[], None] = lambda: None
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None
        self.sharded = [
            ShardedTensor(parameter, group["kind"], [ParamSlice(name, tuple(parameter.shape), 0, 0, parameter.numel())])
            for group in self.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step what has gradients."""
        self.before_step()
        groups = self.param_groups
        muon = [(parameter, group) for group in groups if group["kind"] == "muon" for parameter in group["params"]]
        self._muon([(parameter, group) for parameter, group in muon if parameter.grad is not None])
        self.param_groups = [group for group in groups if group["kind"] != "muon"]
        super().step()
        self.param_groups = groups

    def whole(self, sharded: ShardedTensor, values: Tensor) -> Iterator[tuple[ParamSlice, Tensor]]:
        """Every parameter that lies in a sharded tensor, whole, from ``values`` laid out like that tensor. A collective under ZeRO."""
        values = values.reshape(-1)
        if self.sum_over_ranks is None:
            yield from ((part, values[part.offset : part.offset + part.numel].view(part.shape)) for part in sharded.parts)
            return
        for parts in _buckets(sharded.parts):
            sizes = [math.prod(part.shape) for part in parts]
            flat = torch.zeros(sum(sizes), dtype=values.dtype, device=values.device)
            for part, room in zip(parts, torch.split(flat, sizes), strict=True):
                room[part.start : part.start + part.numel] = values[part.offset : part.offset + part.numel]
            rooms = torch.split(self.sum_over_ranks(flat), sizes)
            yield from ((part, room.view(part.shape)) for part, room in zip(parts, rooms, strict=True))

    def moments(self, sharded: ShardedTensor) -> dict[str, Tensor]:
        """The moments of a sharded tensor; zeros before the first step."""
        state, names = self.state[sharded.tensor], MOMENTS[sharded.kind]
        if names[0] not in state:
            if sharded.kind == "adamw":
                state["step"] = torch.zeros((), device=sharded.tensor.device)
            state.update({name: torch.zeros_like(sharded.tensor) for name in names})
        return {name: state[name] for name in names}

    def set_steps(self, steps: float) -> None:
        """How often AdamW has stepped, which its bias correction needs; after the moments are there."""
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(steps)

    def _muon(self, updated: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
        """Momentum, orthogonalised, for matrices (Jordan et al. 2024).

        Steps are scaled to the root mean square of AdamW's, so that one learning rate serves both (Liu et al. 2025, "Muon is scalable
        for LLM training", section 2.2).
        """
        sharded_by_id = {id(sharded.tensor): sharded for sharded in self.sharded}
        moved, matrices = [], []
        for parameter, _ in updated:
            sharded = sharded_by_id[id(parameter)]
            gradient = _gradient(parameter, self.grad_scale)
            moved.append(self.moments(sharded)["momentum_buffer"].lerp(gradient, 1 - self.muon_momentum))
            matrices += [matrix for _, matrix in self.whole(sharded, gradient.lerp(moved[-1], self.muon_momentum))]
        directions = iter(orthogonalize(matrices))
        for (parameter, group), momentum in zip(updated, moved, strict=True):
            sharded = sharded_by_id[id(parameter)]
            direction = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)  # also where ZeRO pads
            for part, whole in zip(sharded.parts, directions, strict=False):
                direction[part.offset : part.offset + part.numel] = whole.flatten()[part.start : part.start + part.numel]
            self._move(parameter, parameter * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction.view_as(parameter))
            self._move(self.moments(sharded)["momentum_buffer"], momentum)

    def _move(self, old: Tensor, new: Tensor) -> None:
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf.to(old.device).bool(), old, new))


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The config's optimizer, which decays matrices and embeddings, but no bias and no layer norm.

    Muon takes the matrices between embedding and vocabulary; AdamW all else.
    """
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [(name, parameter) for name, parameter in parameters if parameter.ndim >= 2]
    hidden = [
        (name, parameter) for name, parameter in matrices if config.name == "muon" and "embeddings" not in name and "decoder" not in name
    ]
    ours = {name for name, _ in hidden}
    groups = [
        _group("muon", config.weight_decay, hidden),
        _group("adamw", config.weight_decay, [(name, parameter) for name, parameter in matrices if name not in ours]),
        _group("adamw", 0.0, [(name, parameter) for name, parameter in parameters if parameter.ndim < 2]),
    ]
    return Optimizer([group for group in groups if group["params"]], config)


def _buckets(parts: Sequence[ParamSlice]) -> Iterator[list[ParamSlice]]:
    """Parameters in turn, as many at once as are worth a collective."""
    bucket: list[ParamSlice] = []
    for part in parts:
        bucket.append(part)
        if sum(math.prod(part.shape) for part in bucket) >= _BUCKET_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _group(kind: str, weight_decay: float, named: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    names, parameters = [name for name, _ in named], [parameter for _, parameter in named]
    return {"params": parameters, "names": names, "kind": kind, "weight_decay": weight_decay}


def _gradient(parameter: Tensor, scale: Tensor | None) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad if scale is None else parameter.grad / scale.to(parameter.device)
