"""A snapshot writes exactly the tensors in memory, or nothing."""

import errno
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kantai.checkpoint.state import Snapshot


def test_snapshot_detects_corrupted_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.tensor([[math.nan, -0.0]]), "b": torch.tensor(1.0)}
    snapshot = Snapshot("state", tensors, {"steps": 1.0})
    name, entry = snapshot.save(tmp_path)
    assert (name, entry["bytes"]) == ("state", (tmp_path / "state").stat().st_size)

    def save_with_flipped_bit(
        tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]
    ) -> None:
        save_file(
            {**tensors, "b": (tensors["b"].view(torch.int32) ^ 1).view(torch.float32)},
            path,
            metadata,
        )

    monkeypatch.setattr("kantai.checkpoint.state.save_file", save_with_flipped_bit)
    with pytest.raises(OSError, match=r"/state has another b than was written"):
        snapshot.save(tmp_path)


def test_lack_of_space_stops_snapshot_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quota refuses like a disk that other programs fill."""
    snapshot = Snapshot(
        "state",
        {f"tensor-{number}-{'x' * 100}": torch.zeros(3, 4) for number in range(50)},
        {"steps": 1.0},
    )
    reserved: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _, start, size: reserved.append(start + size))
    _, entry = snapshot.save(tmp_path)
    assert entry["bytes"] <= reserved[0] <= entry["bytes"] + 50 * 1024

    def refuse(*_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(
        "kantai.checkpoint.state.save_file",
        lambda *_, **__: pytest.fail("the snapshot was written"),
    )
    with pytest.raises(OSError, match="quota exceeded"):
        snapshot.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
