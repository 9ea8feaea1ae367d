"""A model's folder as the base of adapters, for a process that holds no model: merged weights go from file to file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from actors.engine.adapters import Adapter, check_base, merged, weights_digest
from common.pretrained import weight_files

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the base: the file that holds it, its shape, and the dtype that it gets."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class BaseFiles:
    """The weights in `folder`, in `dtype` if they are floating-point numbers: those that slots would load."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._folder, self._dtype = folder, dtype

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self._folder)

    @cached_property
    def _tensors(self) -> dict[str, _Stored]:
        """By name, in the order in which they are written: those of wide dtypes first, so that all are aligned."""
        found: dict[str, _Stored] = {}
        for path in weight_files(self._folder):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dictionary
                    part = file.get_slice(name)
                    found[name] = _Stored(path, tuple(part.get_shape()), self._dtype_of(name, part.get_dtype()))
        return dict(sorted(found.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))

    def _dtype_of(self, name: str, stored: str) -> torch.dtype:
        if stored not in _DTYPES:
            raise ValueError(f"{self._folder}: {name} is stored as {stored}; allowed: {', '.join(_DTYPES)}")
        dtype = _DTYPES[stored]
        return self._dtype if dtype.is_floating_point else dtype

    def check(self, adapter: Adapter) -> None:
        """Raises ValueError unless the adapter was trained on these weights and fits them, ModelError for a folder that
        cannot be read."""
        check_base(adapter, self._digest)
        for name, (left, right) in adapter.factors.items():
            if name not in self._tensors:
                raise ValueError(f"an adapter for {name}, which the files in {self._folder} do not have")
            if (shape := self._tensors[name].shape) != (len(left), right.shape[1]):
                raise ValueError(f"{name}: an adapter [{len(left)}, {right.shape[1]}] for {[*shape]}")

    def write(self, path: Path, adapter: Adapter) -> None:
        """Write all of them, with an adapter that was checked, as one safetensors file. They are the numbers that slots
        merge (`Base.merge`), to the bit. In memory is one tensor at a time."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, one in self._tensors.items():
            begin, end = end, end + one.size
            header[name] = {"dtype": _NAMES[one.dtype], "shape": [*one.shape], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in self._merged(adapter):
                _write(file, tensor)

    def _merged(self, adapter: Adapter) -> Iterator[Tensor]:
        for name, one in self._tensors.items():
            with safe_open(one.path, framework="pt") as file:
                base = file.get_tensor(name).to(one.dtype)
            factors = adapter.factors.get(name)
            yield base if factors is None else merged(base, *factors, adapter.scaling)


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
