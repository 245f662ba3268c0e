"""The tensors of a checkpoint: a rank's snapshot on its way to the disk, and what is read back."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kantai.errors import UserError
from kantai.model.roberta import MaskedRoberta
from kantai.storage.atomic import manifest_entry

NUMBERS = "numbers"
_MAX_HEADER_BYTES = 512  # of a tensor: its name, shape and place


@dataclass(frozen=True)
class Snapshot:
    """A rank's share of a state, in host memory. What it knows neither of is backend and world size.

    Attributes:
        tensors: ``NAME`` and ``NAME/MOMENT`` of parameters, in fp32.
        numbers: what else a run needs to go on.
    """

    file_name: str
    tensors: dict[str, Tensor]
    numbers: dict[str, float]

    @property
    def size_bytes(self) -> int:
        """What it takes on a disk, but for the names."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """Write it, on to the device, and return its name and manifest entry, read back. No collective: any thread may do it.

        Raises:
            OSError: there is no room, which shows before anything is written; or what is read back is not what was to be written.
        """
        path = folder / self.file_name
        self._refuse_lack_of_room(path)
        save_file(self.tensors, path, metadata={NUMBERS: json.dumps(self.numbers)})  # one entry: safetensors keeps no order
        entry = manifest_entry(path)
        with safe_open(path, framework="pt") as file:
            for name, tensor in self.tensors.items():
                if not torch.equal(file.get_tensor(name).view(torch.int32), tensor.view(torch.int32)):  # bits: NaN is not NaN
                    raise OSError(f"{path} has another {name} than was written: the disk or the memory is faulty")
        return path.name, entry

    def _refuse_lack_of_room(self, path: Path) -> None:
        """Have the file system set the file's size aside, quotas and all, and let go: safetensors writes under another name first."""
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self.size_bytes + _MAX_HEADER_BYTES * (1 + len(self.tensors)))
            except (AttributeError, OSError) as error:  # not every system can
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
            finally:
                path.unlink()


class SavedState:
    """The tensors of a checkpoint by name, whichever of its files they are in, read when they are asked for.

    Attributes:
        shapes: of all of them.
        metadata: what else the files say.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Open the files.

        Raises:
            UserError: one is not what the engine writes.
        """
        self.checkpoint = checkpoint
        try:
            files = [safe_open(path, framework="pt") for path in sorted(checkpoint.glob("state-*.safetensors"))]
            self._files = {name: file for file in files for name in file.keys()}
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}
            self.metadata: dict[str, str] = {key: value for file in files for key, value in (file.metadata() or {}).items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{checkpoint} is no checkpoint: {error}") from None

    def check_shapes(self, expected: dict[str, tuple[int, ...]], *, strict: bool = True) -> None:
        """Compare names and shapes with a model's.

        Args:
            strict: refuse tensors that are not expected, too.

        Raises:
            UserError: a tensor is missing, is one too many, or has another shape.
        """
        for name in sorted(expected.keys() ^ self.shapes.keys()):
            if name in expected or strict:
                raise UserError(
                    f"{self.checkpoint} {'lacks' if name in expected else 'has an unknown'} tensor {name}: it is of another model"
                )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise UserError(f"{self.checkpoint}: {name} has shape {list(self.shapes[name])}, the model's is {list(shape)}")

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, read now."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def load_weights(model: MaskedRoberta, checkpoint: Path) -> None:
    """Set a model's weights from a checkpoint of any backend and world size.

    Raises:
        UserError: a weight is missing or has another shape.
    """
    saved, parameters = SavedState(checkpoint), dict(model.named_parameters())
    saved.check_shapes({name: tuple(parameter.shape) for name, parameter in parameters.items()}, strict=False)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
