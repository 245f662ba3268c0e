"""Where parameters lie in the tensors that an optimizer updates: whole, or cut up by ZeRO."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BUCKET_ELEMENTS = 2**25


@dataclass(frozen=True)
class ParamSlice:
    """Which elements of a parameter lie where in a tensor that is updated on this rank."""

    name: str  # of the parameter
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # first element, in the flattened parameter
    offset: int  # where it lies in the tensor
    numel: int  # number of elements; 0 where another rank has all of them


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor that is updated on this rank: one parameter, or slices of many laid end to end."""

    tensor: Tensor  # fp32
    kind: str  # which optimizer moves it, "adamw" or "muon"
    slices: list[ParamSlice]  # of all parameters in it on some rank, in one order on all ranks

    @classmethod
    def of_parameter(cls, name: str, parameter: Tensor, kind: str) -> "ShardedTensor":
        """A parameter that is whole on every rank."""
        whole = ParamSlice(name, tuple(parameter.shape), 0, 0, parameter.numel())
        return cls(parameter, kind, [whole])


@dataclass(frozen=True)
class Layout:
    """All tensors that are updated on this rank."""

    tensors: list[ShardedTensor]
    # Adds a tensor over the ranks that hold slices of the same parameters; None where every rank
    # has all of them.
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None

    def gather(self, sharded: ShardedTensor, values: Tensor) -> Iterator[tuple[ParamSlice, Tensor]]:
        """Yield every parameter that lies in a tensor, whole. A collective under ZeRO.

        Args:
            values: weights, gradients or moments, laid out like that tensor.
        """
        values = values.reshape(-1)
        if self.sum_over_ranks is None:
            for part in sharded.slices:
                yield part, values[part.offset : part.offset + part.numel].view(part.shape)
            return
        for bucket in _buckets(sharded.slices):
            sizes = [math.prod(part.shape) for part in bucket]
            flat = torch.zeros(sum(sizes), dtype=values.dtype, device=values.device)
            for part, room in zip(bucket, torch.split(flat, sizes), strict=True):
                own = values[part.offset : part.offset + part.numel]
                room[part.start : part.start + part.numel] = own
            gathered = torch.split(self.sum_over_ranks(flat), sizes)
            for part, whole in zip(bucket, gathered, strict=True):
                yield part, whole.view(part.shape)


def _buckets(slices: Sequence[ParamSlice]) -> Iterator[list[ParamSlice]]:
    """Parameters in turn, as many at once as are worth a collective."""
    bucket: list[ParamSlice] = []
    for part in slices:
        bucket.append(part)
        if sum(math.prod(part.shape) for part in bucket) >= _BUCKET_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
