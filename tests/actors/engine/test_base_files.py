"""Adapters merged from file to file: the numbers that slots merge, to the bit, and a tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.engine.adapters import Adapter, weights_digest
from actors.engine.base import Base
from actors.engine.base_files import BaseFiles
from actors.engine.models import load_model
from common.pretrained import PACKAGE_ROOT, read_facts

STUDENT = PACKAGE_ROOT / "ops" / "models" / "student"


def adapter_for(folder: Path, tensors: dict[str, torch.Tensor]) -> Adapter:
    torch.manual_seed(3)
    names = [name for name, one in tensors.items() if one.dim() == 2 and "proj" in name]
    factors = {
        name: (torch.randn(len(tensors[name]), 3), torch.randn(3, tensors[name].shape[1]) * 0.02) for name in names
    }
    return Adapter(weights_digest(folder), 1.7, factors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_has_the_bits_that_slots_merge(dtype: str, tmp_path: Path) -> None:
    adapter = adapter_for(STUDENT, load_file(STUDENT / "model.safetensors"))
    files = BaseFiles(STUDENT, getattr(torch, dtype))
    files.check(adapter)
    files.write(tmp_path / "model.safetensors", adapter)
    found = load_file(tmp_path / "model.safetensors")
    model = load_model(STUDENT, dtype=dtype, device="cpu", vocab_size=read_facts(STUDENT).vocab_size)
    Base(model, weights_digest(STUDENT)).merge(adapter)
    own = model.state_dict()
    assert found.keys() <= own.keys() and len(found) > 10
    assert set(own.keys() - found.keys()) <= {"lm_head.weight"}  # tied
    for name, tensor in found.items():
        assert tensor.dtype == own[name].dtype and torch.equal(tensor, own[name]), name


def own_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_a_base_in_several_files_is_written_whole_and_one_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"layers.{place}.q_proj.weight": torch.randn(1024, 1025) for place in range(24)}
    tensors |= {"counts": torch.arange(5), "mask": torch.tensor([True, False, True]), "scale": torch.tensor(0.3)}
    places = {name: f"model-{at % 3}.safetensors" for at, name in enumerate(tensors)}
    for file in sorted({*places.values()}):
        save_file({name: one for name, one in tensors.items() if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    adapter = adapter_for(tmp_path, tensors)
    files, out = BaseFiles(tmp_path, torch.bfloat16), tmp_path / "out.safetensors"
    files.check(adapter)
    merged, before, most = files._merged, own_bytes(), 0

    def watched(adapter: Adapter) -> Iterator[torch.Tensor]:
        nonlocal most
        for tensor in merged(adapter):
            most = max(most, own_bytes())
            yield tensor

    monkeypatch.setattr(files, "_merged", watched)  # torch's profiler does not see that safetensors frees
    files.write(out, adapter)
    assert most - before < sum(one.nbytes for one in tensors.values()) / 2
    found = load_file(out)
    assert found.keys() == tensors.keys()
    for name in ("counts", "mask"):
        assert torch.equal(found[name], tensors[name])
    assert found["scale"].item() == pytest.approx(0.3, rel=4e-3) and found["scale"].dtype == torch.bfloat16
    left, right = adapter.factors["layers.7.q_proj.weight"]
    exact = tensors["layers.7.q_proj.weight"].double() + 1.7 * left.double() @ right.double()
    torch.testing.assert_close(found["layers.7.q_proj.weight"].double(), exact, rtol=8e-3, atol=1e-2)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(4, 3)}, tmp_path / "model.safetensors")
    files, digest = BaseFiles(tmp_path, torch.float32), weights_digest(tmp_path)
    pair = (torch.zeros(4, 2), torch.zeros(2, 3))
    files.check(Adapter(digest, 1.0, {"a.weight": pair}))
    for adapter, words in (
        (Adapter("0" * 64, 1.0, {"a.weight": pair}), "an adapter for the base 000000000000…, this worker holds"),
        (Adapter(digest, 1.0, {"b.weight": pair}), r"an adapter for b\.weight, which the files in .* do not have"),
        (Adapter(digest, 1.0, {"a.weight": (pair[0], pair[1][:, :2])}), r"a\.weight: an adapter \[4, 2\] for \[4, 3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            files.check(adapter)
