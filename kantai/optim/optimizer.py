"""AdamW and Muon side by side, over whole parameters or ZeRO's slices of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from kantai.config.schema import OptimizerConfig
from kantai.optim.muon import Muon
from kantai.optim.sharding import Layout, ShardedTensor

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


class Optimizer(torch.optim.Optimizer):
    """Fused AdamW for the groups of kind "adamw", and Muon for those of kind "muon".

    Each has its own step; both keep their moments in this optimizer's state, under the tensors
    that this optimizer's groups name. DeepSpeed puts other tensors there, and some groups at a
    time, so each step looks anew.

    Attributes:
        layout: the tensors that are updated on this rank, and which parameters lie in them.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.learning_rate})
        betas = (config.adam_beta1, config.adam_beta2)
        self.adamw = torch.optim.AdamW(
            self._groups_of("adamw"), betas=betas, eps=config.adam_eps, fused=True
        )
        self.optimizers: list[Any] = [self.adamw]
        muon_groups = self._groups_of("muon")
        self.muon = Muon(muon_groups, config.muon_momentum) if muon_groups else None
        if self.muon is not None:
            self.optimizers.insert(0, self.muon)
        for optimizer in self.optimizers:
            optimizer.state = self.state
        self.set_layout(
            Layout(
                [
                    ShardedTensor.of_parameter(name, parameter, group["kind"])
                    for group in self.param_groups
                    for name, parameter in zip(group["names"], group["params"], strict=True)
                ]
            )
        )

    def _groups_of(self, kind: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["kind"] == kind]

    def set_layout(self, layout: Layout) -> None:
        """Say where parameters lie after a backend has cut them up."""
        self.layout = layout
        if self.muon is not None:
            self.muon.layout = layout

    def set_scaling(self, found_inf: Tensor, grad_scale: Tensor | None = None) -> None:
        """Say how the next step treats gradients. Decided on the device; nobody waits for it.

        Args:
            found_inf: 1.0 to leave all as it is, else 0.0.
            grad_scale: divides all gradients first: unscaling and clipping in one.
        """
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf
            optimizer.grad_scale = grad_scale

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move what has gradients."""
        for optimizer, kind in ((self.muon, "muon"), (self.adamw, "adamw")):
            if optimizer is not None:
                optimizer.param_groups = self._groups_of(kind)
                optimizer.step()

    def moments(self, sharded: ShardedTensor) -> dict[str, Tensor]:
        """The moments of a tensor; zeros before the first step."""
        state = self.state[sharded.tensor]
        names = MOMENTS[sharded.kind]
        if names[0] not in state:
            if sharded.kind == "adamw":
                state["step"] = torch.zeros((), device=sharded.tensor.device)
            for name in names:
                state[name] = torch.zeros_like(sharded.tensor)
        return {name: state[name] for name in names}

    @torch.no_grad()
    def is_finite(self) -> Tensor:
        """Whether all weights and moments that this rank updates are finite; on the device.

        Only parameters are looked at, and not what ZeRO pads them with. A number whose square
        overflows (1.8e19) counts as infinite.
        """
        parts = [
            values.view(-1)[part.offset : part.offset + part.numel]
            for sharded in self.layout.tensors
            for values in (sharded.tensor, *self.moments(sharded).values())
            for part in sharded.slices
            if part.numel
        ]
        # The norm of the largest number takes 9 to 16 times as long on CPU as that of the squares.
        return get_total_norm(parts).isfinite()

    @property
    def steps(self) -> float:
        """Steps that AdamW has taken, for its bias correction. Skipped ones do not count."""
        counts = (state["step"] for state in self.state.values() if "step" in state)
        return float(next(counts))

    @steps.setter
    def steps(self, steps: float) -> None:
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(steps)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The config's optimizer. It decays matrices and embeddings, but no bias and no layer norm.

    Muon takes the matrices between embedding and vocabulary; AdamW takes all else.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    vectors = [(name, p) for name, p in named if p.ndim < 2]
    matrices = [(name, p) for name, p in named if p.ndim >= 2]
    is_hidden = {name: "embeddings" not in name and "decoder" not in name for name, _ in matrices}
    hidden = [(name, p) for name, p in matrices if config.name == "muon" and is_hidden[name]]
    others = [(name, p) for name, p in matrices if config.name != "muon" or not is_hidden[name]]
    groups = [
        _group("muon", config.weight_decay, hidden),
        _group("adamw", config.weight_decay, others),
        _group("adamw", 0.0, vectors),
    ]
    return Optimizer([group for group in groups if group["params"]], config)


def _group(kind: str, weight_decay: float, named: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    return {
        "params": [parameter for _, parameter in named],
        "names": [name for name, _ in named],
        "kind": kind,
        "weight_decay": weight_decay,
    }
