"""Published adapters: what a file says, what is refused, and merged weights that are the same bits everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from actors.engine.adapters import Adapter, adapter_of, header_of, merged, unpacked, weights_digest
from common.pretrained import PACKAGE_ROOT

STUDENT = PACKAGE_ROOT / "ops" / "models" / "student"


def factors(n: int, m: int, r: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=drawn) for shape in ((n, m), (n, r), (r, m)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m", "r"), [(7, 5, 3), (1, 9, 1), (300, 1100, 16)])
def test_merged_is_the_sum_within_rounding(n: int, m: int, r: int, dtype: torch.dtype) -> None:
    base, left, right = factors(n, m, r)
    base = base.to(dtype)
    found = merged(base, left, right, 0.5)
    exact = base.double() + 0.5 * left.double() @ right.double()
    assert found.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 1e-5}
    torch.testing.assert_close(found.double(), exact, **tolerance)


def test_merged_has_the_same_bits_with_any_number_of_threads_and_in_pieces_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, left, right = factors(130, 2100, 16)
    former = torch.get_num_threads()
    results = []
    try:
        for threads, piece in ((1, 1 << 18), (2, 1 << 18), (2, 1 << 26), (1, 1000)):
            torch.set_num_threads(threads)
            monkeypatch.setattr("actors.engine.adapters._PIECES", {"cpu": piece})
            results.append(merged(base, left, right, 1.7))
    finally:
        torch.set_num_threads(former)
    assert all(torch.equal(results[0], other) for other in results[1:])
    # As by hand: each product and each sum rounded to float32, in the order of the rank.
    row, scaled = base[3], left[3] * 1.7
    expected = scaled[0] * right[0]
    for k in range(1, 16):
        expected = expected + scaled[k] * right[k]
    assert torch.equal(results[0][3], expected + row)


def test_a_file_is_read_as_what_its_header_says() -> None:
    _, left, right = factors(6, 4, 2)
    adapter = Adapter("ab" * 32, 0.25, {"layer.weight": (left, right)})
    found = unpacked(save(adapter.tensors(), header_of(adapter.base, adapter.scaling)))
    assert isinstance(found, Adapter)
    assert (found.base, found.scaling) == (adapter.base, 0.25)
    assert torch.equal(found.factors["layer.weight"][0], left) and torch.equal(found.factors["layer.weight"][1], right)
    for header in (None, {"format": "pt"}):
        whole = unpacked(save({"layer.weight": left}, header))
        assert isinstance(whole, dict) and torch.equal(whole["layer.weight"], left)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "adapter 2", "base": "a", "scaling": 1}, "format 'adapter 2'; known is 'adapter 1'"),
        ({"format": "adapter 1", "scaling": 1}, "has not format, base and scaling"),
        ({"format": "adapter 1", "base": "a", "scaling": "much"}, "has not format, base and scaling"),
        ([], "has not format, base and scaling"),
        ({"format": "adapter 1", "base": "a", "scaling": float("nan")}, "scaling of an adapter is nan"),
    ],
)
def test_a_header_that_no_learner_wrote_is_refused(header: object, message: str) -> None:
    _, left, right = factors(6, 4, 2)
    with pytest.raises(ValueError, match=message):
        unpacked(save({"w.left": left, "w.right": right}, {"katana": json.dumps(header)}))


def test_factors_that_do_not_belong_together_are_refused() -> None:
    _, left, right = factors(6, 4, 2)
    with pytest.raises(ValueError, match=r"unknown: \['w.middle'\]"):
        adapter_of({"w.left": left, "w.right": right, "w.middle": left}, base="a", scaling=1.0)
    for tensors in ({"w.left": left}, {"w.left": left, "w.right": right[:1]}, {"w.left": left[0], "w.right": right}):
        with pytest.raises(ValueError, match=r"w: its \.left and \.right cannot be multiplied"):
            adapter_of(tensors, base="a", scaling=1.0)


def test_the_digest_is_of_the_weights_and_not_of_their_files(tmp_path: Path) -> None:
    state = load_file(STUDENT / "model.safetensors")
    names = sorted(state)
    split = tmp_path / "split"
    split.mkdir()
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, split / f"model-{number}.safetensors", {"format": "pt"})
    assert weights_digest(split) == weights_digest(STUDENT)
    other = tmp_path / "other"
    shutil.copytree(STUDENT, other)
    state[names[3]].view(-1)[-1] += 1e-3
    save_file(state, other / "model.safetensors")
    assert weights_digest(other) != weights_digest(STUDENT)
