"""Muon: momentum whose direction is orthogonalized, for the matrices between the embeddings.

Jordan et al., "Muon: An optimizer for hidden layers" (2024).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kantai.optim.sharding import Layout, ShardedTensor

# Newton-Schulz iteration: coefficients and number of steps of Jordan et al.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon over whole matrices or ZeRO's slices of them.

    Its step has the root mean square of AdamW's, so that one learning rate serves both (Liu et
    al. 2025, "Muon is scalable for LLM training", section 2.2).

    Attributes:
        layout: where matrices lie in the tensors of ``param_groups``.
        grad_scale: a divisor of all gradients, or None.
        found_inf: 1.0 makes the next step leave all as it is, decided on the device; or None.
            Both are what PyTorch's gradient scalers set on its own optimizers.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float) -> None:
        super().__init__(groups, {})
        self.momentum = momentum
        self.layout = Layout([])
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        sharded_by_id = {id(sharded.tensor): sharded for sharded in self.layout.tensors}
        updated = [
            (sharded_by_id[id(parameter)], group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        momenta: list[Tensor] = []
        matrices: list[Tensor] = []
        for sharded, _ in updated:
            gradient = self._gradient(sharded.tensor)
            momentum = self._momentum_buffer(sharded).lerp(gradient, 1 - self.momentum)
            nesterov = gradient.lerp(momentum, self.momentum)
            momenta.append(momentum)
            matrices += [matrix for _, matrix in self.layout.gather(sharded, nesterov)]
        directions = iter(orthogonalize(matrices))
        for (sharded, group), momentum in zip(updated, momenta, strict=True):
            direction = _scatter(sharded, directions)
            decayed = sharded.tensor * (1 - group["lr"] * group["weight_decay"])
            self._assign(sharded.tensor, decayed - group["lr"] * direction)
            self._assign(self._momentum_buffer(sharded), momentum)

    def _gradient(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        if self.grad_scale is None:
            return parameter.grad
        return parameter.grad / self.grad_scale.to(parameter.device)

    def _momentum_buffer(self, sharded: ShardedTensor) -> Tensor:
        state = self.state[sharded.tensor]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(sharded.tensor)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _assign(self, old: Tensor, new: Tensor) -> None:
        if self.found_inf is not None:
            new = torch.where(self.found_inf.to(old.device).bool(), old, new)
        old.copy_(new)


def _scatter(sharded: ShardedTensor, directions: Iterable[Tensor]) -> Tensor:
    """This rank's slices of the next directions, laid out like its tensor."""
    tensor = sharded.tensor
    # Zeros also where ZeRO pads.
    scattered = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    for part, whole in zip(sharded.slices, directions, strict=False):
        own = whole.flatten()[part.start : part.start + part.numel]
        scattered[part.offset : part.offset + part.numel] = own
    return scattered.view_as(tensor)


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The nearest semi-orthogonal matrix of each, roughly, scaled to a root mean square of 0.2."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(index)
    found = list(matrices)
    for (rows, columns), indices in by_shape.items():
        x = torch.stack([matrices[index] for index in indices])
        if x.is_cuda:  # where it is several times faster; the iteration heals its own rounding
            x = x.bfloat16()
        if rows > columns:
            x = x.mT
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        a, b, c = _QUINTIC
        for _ in range(_NEWTON_SCHULZ_STEPS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        if rows > columns:
            x = x.mT
        scaled = x.float() * (0.2 * max(rows, columns) ** 0.5)
        for index, result in zip(indices, scaled, strict=True):
            found[index] = result
    return found
