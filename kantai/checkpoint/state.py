"""The tensors of a checkpoint: a rank's snapshot on its way to the disk, and what is read back.

A checkpoint holds weights and moments in fp32 by parameter name, ``NAME`` and ``NAME/MOMENT``. It
knows neither backend nor world size.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kantai.errors import UserError
from kantai.model.roberta import MaskedRoberta
from kantai.optim.optimizer import MOMENTS, Optimizer
from kantai.storage.atomic import MANIFEST, Damaged, manifest_entry, read_manifest

_NUMBERS = "numbers"
_MAX_HEADER_BYTES = 512  # of a tensor: its name, shape and offsets


@dataclass(frozen=True)
class Snapshot:
    """A rank's share of a state, in host memory."""

    file_name: str
    tensors: dict[str, Tensor]  # weights and moments by their names in a checkpoint, in fp32
    numbers: dict[str, float]  # what else a run needs to go on

    @property
    def size_bytes(self) -> int:
        """Size on a disk, but for the names."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def save(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """Write the snapshot to the device and read it back. No collective: any thread may do it.

        Returns:
            The file's name and manifest entry.

        Raises:
            OSError: there is no room, which shows before anything is written; or the file holds
                other bits than the memory.
        """
        path = folder / self.file_name
        self._reserve_room(path)
        # One entry: safetensors keeps no order.
        save_file(self.tensors, path, metadata={_NUMBERS: json.dumps(self.numbers)})
        entry = manifest_entry(path)
        with safe_open(path, framework="pt") as file:
            for name, tensor in self.tensors.items():
                read_back = file.get_tensor(name)
                # Bits are compared, as NaN does not equal NaN.
                if not torch.equal(read_back.view(torch.int32), tensor.view(torch.int32)):
                    raise OSError(
                        f"{path} has another {name} than was written: the disk or the memory is "
                        "faulty"
                    )
        return path.name, entry

    def _reserve_room(self, path: Path) -> None:
        """Have the file system set room aside, quotas and all, and let go of it.

        safetensors writes under another name first, so others may fill the room in between.
        """
        needed = self.size_bytes + _MAX_HEADER_BYTES * (1 + len(self.tensors))
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, needed)
            except (AttributeError, OSError) as error:  # not every system can
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
            finally:
                path.unlink()


class SavedState:
    """The tensors of a checkpoint by name, whichever file they are in, each read when asked for.

    Attributes:
        shapes: of all tensors.
        metadata: what else the files say.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Open the files.

        Raises:
            UserError: one of them cannot be read, or is not what :class:`Snapshot` writes.
        """
        self.checkpoint = checkpoint
        try:
            names = _file_names(checkpoint)
            files = [safe_open(checkpoint / name, framework="pt") for name in names]
            self._files = {name: file for file in files for name in file.keys()}
            self.shapes = {
                name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
            }
            self.metadata: dict[str, str] = {}
            for file in files:
                self.metadata |= file.metadata() or {}
        except (Damaged, SafetensorError) as error:
            raise UserError(f"{checkpoint} is no checkpoint: {error}") from None
        except OSError as error:  # it says nothing of the content: rights, too many open files
            raise UserError(f"{checkpoint} cannot be read: {error}") from None

    def check_shapes(self, expected: dict[str, tuple[int, ...]], *, strict: bool = True) -> None:
        """Compare names and shapes with a model's.

        Args:
            strict: refuse tensors that are not expected, too.

        Raises:
            UserError: a tensor is missing, is one too many, or has another shape.
        """
        for name in sorted(expected.keys() ^ self.shapes.keys()):
            if name in expected or strict:
                fault = "lacks" if name in expected else "has an unknown"
                raise UserError(f"{self.checkpoint} {fault} tensor {name}: it is of another model")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise UserError(
                    f"{self.checkpoint}: {name} has shape {list(self.shapes[name])}, the model's "
                    f"is {list(shape)}"
                )

    def numbers(self, *names: str) -> dict[str, float]:
        """What a snapshot holds beside tensors.

        Raises:
            UserError: some are missing.
        """
        try:
            numbers = json.loads(self.metadata[_NUMBERS])
            return {name: float(numbers[name]) for name in names}
        except (KeyError, TypeError, ValueError, ArithmeticError):
            raise UserError(
                f"{self.checkpoint} lacks the numbers that a run goes on with: it is no "
                "checkpoint of kantai's"
            ) from None

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, read now."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


class InitialState:
    """What a run begins with, by the names of a checkpoint: new weights, and moments of zeros."""

    def __init__(self, model: MaskedRoberta) -> None:
        self._weights = dict(model.named_parameters())

    def __getitem__(self, name: str) -> Tensor:
        """A weight or a moment."""
        parameter, _, moment = name.partition("/")
        weight = self._weights[parameter].detach()
        return torch.zeros_like(weight) if moment else weight


def _file_names(checkpoint: Path) -> list[str]:
    """The files of a checkpoint, by its manifest, which knows no copy that a sync tool left."""
    if (checkpoint / MANIFEST).exists():
        return sorted(read_manifest(checkpoint)["files"])
    return sorted(path.name for path in checkpoint.glob("state-*.safetensors"))  # not published


def load_weights(model: MaskedRoberta, checkpoint: Path) -> None:
    """Set a model's weights from a checkpoint.

    Raises:
        UserError: a weight is missing or has another shape.
    """
    saved = SavedState(checkpoint)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    saved.check_shapes(shapes, strict=False)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def named_state(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight and moment, whole, by its name. A collective under ZeRO."""
    for sharded in optimizer.layout.tensors:
        for key, tensor in (("", sharded.tensor), *optimizer.moments(sharded).items()):
            for part, whole in optimizer.layout.gather(sharded, tensor.detach()):
                yield _entry(part.name, key), whole


def check_named_state(optimizer: Optimizer, saved: SavedState) -> None:
    """Compare the tensors of a checkpoint with an optimizer's: names and shapes."""
    saved.check_shapes(
        {
            _entry(part.name, key): part.shape
            for sharded in optimizer.layout.tensors
            for part in sharded.slices
            for key in ("", *MOMENTS[sharded.kind])
        }
    )


@torch.no_grad()
def load_named_state(
    optimizer: Optimizer,
    saved: SavedState | InitialState,
    set_weight: Callable[[str, Tensor], None],
) -> None:
    """Set the weights and moments that this rank updates.

    Args:
        saved: of the optimizer's model, as :func:`check_named_state` finds out.
        set_weight: gives the model a weight, where the optimizer's tensors are not its own.
    """
    for sharded in optimizer.layout.tensors:
        moments = optimizer.moments(sharded)
        for part in sharded.slices:
            for key, tensor in (("", sharded.tensor), *moments.items()):
                if key and not part.numel:  # another rank's moment, which is not read
                    continue
                name = _entry(part.name, key)
                whole = saved[name]
                own = whole.flatten()[part.start : part.start + part.numel]
                tensor.view(-1)[part.offset : part.offset + part.numel] = own
                if not key:
                    set_weight(name, whole)


def _entry(name: str, key: str) -> str:
    """The name of a parameter's weight (key "") or moment in a checkpoint."""
    return f"{name}/{key}" if key else name
