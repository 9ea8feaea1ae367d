"""Published adapters of LoRA: the file, and how they are merged into the weights of a model's folder.

Learner → rollout workers, evaluator, audit. They hold the model's folder, so an adapter is all that they need; each
computes the merged weights itself, by `merged`, to the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load
from torch import Tensor

from common.pretrained import ModelError, weight_files

_FORMAT = "adapter 1"
_LEFT, _RIGHT = ".left", ".right"
_PIECES = {"cpu": 1 << 18}  # numbers that are merged at a time: on a CPU as many as stay in its caches,
_LARGE_PIECE = 1 << 26  # elsewhere so many that launches do not count; the result does not depend on it
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Adapter:
    """What training has added to the model `base`.

    base: digest of its weights (`weights_digest`). factors: by parameter [n, m], float32 `left`
    [n, r] and `right` [r, m]; the parameter becomes itself + scaling · left · right.
    """

    base: str
    scaling: float
    factors: Mapping[str, tuple[Tensor, Tensor]]

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds, by name."""
        found = {}
        for name, (left, right) in self.factors.items():
            found[name + _LEFT], found[name + _RIGHT] = left, right
        return found


def header_of(base: str, scaling: float) -> dict[str, str]:
    """The metadata of an adapter's safetensors file: one entry, since safetensors writes several in any order."""
    return {"katana": json.dumps({"format": _FORMAT, "base": base, "scaling": scaling})}


def unpacked(data: bytes) -> dict[str, Tensor] | Adapter:
    """The content of a published safetensors file: all weights of a model by name, or an adapter. Raises ValueError,
    SafetensorError."""
    tensors = load(data)  # checks the header
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    if "katana" not in header:
        return tensors
    try:
        facts = json.loads(header["katana"])
        kind, base, scaling = facts["format"], str(facts["base"]), float(facts["scaling"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"weights whose header has not format, base and scaling: {header['katana']:.200}") from error
    if kind != _FORMAT:
        raise ValueError(f"weights of the format {kind!r:.40}; known is {_FORMAT!r}")
    if not math.isfinite(scaling):
        raise ValueError(f"the scaling of an adapter is {scaling}")
    return adapter_of(tensors, base=base, scaling=scaling)


def adapter_of(tensors: Mapping[str, Tensor], *, base: str, scaling: float) -> Adapter:
    """The adapter that these tensors of a file are. Raises ValueError if one is missing, unknown or of no use."""
    names = [name.removesuffix(_LEFT) for name in tensors if name.endswith(_LEFT)]
    unknown = sorted(tensors.keys() - {name + end for name in names for end in (_LEFT, _RIGHT)})
    if unknown:
        raise ValueError(f"an adapter has pairs *{_LEFT} and *{_RIGHT}; unknown: {unknown[:3]}")
    factors = {}
    for name in names:
        left, right = tensors[name + _LEFT], tensors.get(name + _RIGHT)
        if right is None or left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise ValueError(f"{name}: its {_LEFT} and {_RIGHT} cannot be multiplied")
        factors[name] = (left.float(), right.float())
    return Adapter(base, scaling, factors)


@torch.no_grad()
def merged(base: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """base [n, m] + scaling · left [n, r] · right [r, m]: summed in float32, returned in the dtype of `base`.

    The same bits on every device, with any number of threads: products and sums are rounded one at a time and in a
    fixed order, as IEEE 754 says, where a library's product of matrices sums as it likes. Several times as slow as
    that; r is small.
    """
    out = torch.empty_like(base)
    scaled = left.to(base.device) * scaling
    right = right.to(base.device)
    rows = max(1, _PIECES.get(base.device.type, _LARGE_PIECE) // max(1, base.shape[1]))
    for target, part, factor in zip(*(torch.split(one, rows) for one in (out, base, scaled)), strict=True):
        change = factor[:, :1] * right[:1]
        term = torch.empty_like(change)
        for k in range(1, right.shape[0]):
            torch.mul(factor[:, k : k + 1], right[k], out=term)
            change.add_(term)  # not addcmul: some devices round its product and sum once, together
        target.copy_(change.add_(part.float()))
    return out


def check_base(adapter: Adapter, digest: str | None) -> None:
    """Raises ValueError unless the adapter was trained on the weights with this digest. None: of no base."""
    if digest is None:
        raise ValueError("an adapter, but this model is not the base of any: the config has no learner.lora")
    if adapter.base != digest:
        raise ValueError(
            f"an adapter for the base {adapter.base[:12]}…, this worker holds {digest[:12]}…: student.model "
            f"must be the same weights for the learner and for all workers"
        )


def weights_digest(folder: Path) -> str:
    """sha256 (hex) of the weights in a model's folder: names, dtypes, shapes and bytes of all tensors, in the order of
    their names, in however many files they are. Raises ModelError."""
    digest = hashlib.sha256()
    found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(size))
                found |= {name: (path, 8 + size, facts) for name, facts in header.items() if name != "__metadata__"}
            except (ValueError, AttributeError) as error:
                raise ModelError(f"{path}: not a safetensors file ({error})") from error
    for name in sorted(found):
        path, start, facts = found[name]
        begin, end = facts["data_offsets"]
        digest.update(json.dumps([name, facts["dtype"], facts["shape"]]).encode())
        with path.open("rb") as file:
            file.seek(start + begin)
            _update(digest, file, end - begin)
    return digest.hexdigest()


def _update(digest: Any, file: BinaryIO, size: int) -> None:
    while size > 0 and (part := file.read(min(size, _READ_BYTES))):
        digest.update(part)
        size -= len(part)
