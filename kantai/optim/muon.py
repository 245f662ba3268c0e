"""Muon's orthogonalization (Jordan et al. 2024)."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Newton-Schulz iteration: coefficients and number of steps of Jordan et al., "Muon: An optimizer for hidden layers" (2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The nearest half-orthogonal matrix of each, roughly, with a root mean square of 0.2 at most."""
    by_shape: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(place)
    found = list(matrices)
    for (rows, columns), places in by_shape.items():
        x = torch.stack([matrices[place] for place in places])
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
        for place, result in zip(places, x.float() * (0.2 * max(rows, columns) ** 0.5), strict=True):
            found[place] = result
    return found
