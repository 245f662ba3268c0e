"""Exchange of small values between ranks, as JSON in tensors.

PyTorch and Accelerate exchange objects as pickles, and reading a pickle runs what is in it: whoever
reached a rank's port could have it run a program.
"""

import json
from typing import Any

import torch
from torch import Tensor, distributed


def from_rank_0(value: Any, device: torch.device) -> Any:
    """Rank 0's value, on all ranks. Tuples become lists."""
    own = _as_bytes(value, device)
    size = torch.tensor([len(own)], device=device)
    distributed.broadcast(size, 0)
    if distributed.get_rank() != 0:
        own = own.new_empty(int(size))
    distributed.broadcast(own, 0)
    return _from_bytes(own)


def from_all_ranks(value: Any, device: torch.device) -> list[Any]:
    """Every rank's value in the order of the ranks, on all ranks. Tuples become lists."""
    own = _as_bytes(value, device)
    world_size = distributed.get_world_size()
    of_ranks = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    distributed.all_gather(of_ranks, torch.tensor([len(own)], device=device))
    sizes = torch.cat(of_ranks).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded)
    # One copy to the host: a thousand ranks would be a thousand waits for the device.
    contents = torch.stack(gathered).cpu()
    return [_from_bytes(row[:size]) for row, size in zip(contents, sizes, strict=True)]


def by_way_of_json(value: Any) -> Any:
    """What another rank would receive."""
    return json.loads(json.dumps(value))


def _as_bytes(value: Any, device: torch.device) -> Tensor:
    content = bytearray(json.dumps(value).encode())
    return torch.frombuffer(content, dtype=torch.uint8).to(device)


def _from_bytes(content: Tensor) -> Any:
    return json.loads(content.cpu().numpy().tobytes())
