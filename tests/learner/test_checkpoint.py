"""Checkpoints: training continues bit for bit, and a damaged checkpoint is never loaded."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner import checkpoint
from learner.checkpoint import (
    CheckpointState,
    TornCheckpointError,
    capture,
    load,
    load_newest,
    restore,
    save,
    untied_tensors,
)

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def tiny(seed: int, *, tied: bool = True) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def adamw(model: Any, lr: float = 1e-2) -> torch.optim.AdamW:
    """AdamW in two groups, as weight decay is used: matrices with, vectors without."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Some steps on batches drawn from torch's own generator, whose state is thus part of what comes next."""
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 16, (2, 8))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        losses.append(loss.item())
    return losses


def snapshot(model: Any, optimizer: torch.optim.Optimizer, step: int) -> CheckpointState:
    return capture(
        model,
        optimizer,
        step=step,
        policy_version=step + 100,
        consumed=[f"r{step}-1", f"r{step}-2"],
        counters={"tokens_trained": 10 * step},
    )


@pytest.fixture(scope="module")
def states() -> dict[int, CheckpointState]:
    """Small states of steps 1 to 9, each with different numbers."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    found = {}
    for step in range(1, 10):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        found[step] = snapshot(model, optimizer, step)
    return found


def same(left: CheckpointState, right: CheckpointState) -> bool:
    """Whether two states are equal in every field, tensors bit by bit."""
    names = ("step", "policy_version", "consumed", "counters", "optimizer_groups", "rng")
    return all(getattr(left, name) == getattr(right, name) for name in names) and all(
        a.keys() == b.keys() and all(bits(a[key]) == bits(b[key]) for key in a)
        for a, b in ((left.model, right.model), (left.optimizer, right.optimizer))
    )


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), raw.numpy().tobytes()


# ------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("tied", [True, False])
def test_resumed_training_is_bit_equal(tmp_path: Path, tied: bool) -> None:
    """Three steps, a checkpoint, four more: the same bits as in a fresh process that loads it."""
    model = tiny(0, tied=tied)
    optimizer = adamw(model)
    torch.manual_seed(42)
    train(model, optimizer, 3)
    save(tmp_path, snapshot(model, optimizer, 3), keep=1)
    losses = train(model, optimizer, 4)
    end = snapshot(model, optimizer, 7)

    other = tiny(1, tied=tied)  # other weights, other learning rate, another generator state
    other_optimizer = adamw(other, lr=0.5)
    torch.manual_seed(7)
    train(other, other_optimizer, 1)
    loaded = load_newest(tmp_path)
    assert loaded is not None and loaded.step == 3 and loaded.policy_version == 103
    restore(other, other_optimizer, loaded)
    assert train(other, other_optimizer, 4) == losses
    assert same(snapshot(other, other_optimizer, 7), end)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


def test_tied_tensors_are_saved_once(tmp_path: Path) -> None:
    tied, untied = tiny(0), tiny(0, tied=False)
    assert "lm_head.weight" not in snapshot(tied, adamw(tied), 1).model
    assert "lm_head.weight" in snapshot(untied, adamw(untied), 1).model
    state = snapshot(tied, adamw(tied), 1)
    assert set(state.model) | {"lm_head.weight"} == set(tied.state_dict())
    assert untied_tensors(tied)["model.embed_tokens.weight"] is tied.lm_head.weight
    with pytest.raises(ValueError, match=r"model: the checkpoint lacks lm_head\.weight"):
        restore(untied, adamw(untied), state)


def test_a_state_is_a_copy(tmp_path: Path) -> None:
    """Training after capture, or after restore, does not change the state."""
    model = tiny(0)
    optimizer = adamw(model)
    train(model, optimizer, 2)
    state = snapshot(model, optimizer, 2)
    save(tmp_path, state, keep=1)
    train(model, optimizer, 2)
    restore(model, optimizer, state)
    train(model, optimizer, 2)
    loaded = load_newest(tmp_path)
    assert loaded is not None and same(loaded, state)


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    model = tiny(0)
    save(tmp_path, snapshot(model, adamw(model), 0), keep=1)
    loaded = load_newest(tmp_path)
    assert loaded is not None and loaded.optimizer == {}
    other = tiny(1)
    optimizer = adamw(other)
    train(other, optimizer, 2)
    restore(other, optimizer, loaded)
    assert not optimizer.state_dict()["state"]
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_the_files_of_a_checkpoint(tmp_path: Path, states: dict[int, CheckpointState]) -> None:
    """Four files under a name with eight digits; the manifest is right by an independent count; no pickle."""
    state = replace(states[3], consumed=("r3-1", "ä"), rng={"cpu": b"\x00\xff"})
    path = save(tmp_path / "new" / "checkpoints", state, keep=2)
    assert path.name == "step-00000003"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 1 and sorted(manifest["files"]) == sorted(FILES[:3])
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert not content.startswith((b"PK", b"\x80"))  # the beginnings of torch.save and of pickle
    written = json.loads((path / "state.json").read_text())
    assert (written["step"], written["policy_version"]) == (3, 103)
    assert written["consumed"] == ["r3-1", "ä"] and written["counters"] == {"tokens_trained": 30}
    assert base64.b64decode(written["rng"]["cpu"]) == b"\x00\xff"
    assert same(load(path), state)


def test_one_with_fields_that_are_no_longer_written_loads(tmp_path: Path, states: dict[int, CheckpointState]) -> None:
    path = save(tmp_path, states[3], keep=2)
    fields = json.loads((path / "state.json").read_text()) | {"schedule": {"name": "cosine"}, "extra": {}}
    content = json.dumps(fields).encode()
    (path / "state.json").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert same(load(path), states[3])


def test_retention_keeps_the_newest(tmp_path: Path, states: dict[int, CheckpointState]) -> None:
    for step in range(1, 6):
        save(tmp_path, states[step], keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    with pytest.raises(ValueError, match="keep is 0"):
        save(tmp_path, states[6], keep=0)


def test_the_same_step_again_replaces(tmp_path: Path, states: dict[int, CheckpointState]) -> None:
    save(tmp_path, states[2], keep=2)
    again = replace(states[2], consumed=("other",))
    save(tmp_path, again, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    loaded = load_newest(tmp_path)
    assert loaded is not None and same(loaded, again)


def test_without_checkpoints_load_newest_returns_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "nowhere") is None
    (tmp_path / "step-00000001.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    assert load_newest(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counters": {"x": float("nan")}}, "not JSON compliant"),
        ({"counters": {"x": object()}}, "the state is not JSON"),
    ],
)
def test_a_state_that_is_not_json_is_refused(
    tmp_path: Path, states: dict[int, CheckpointState], change: Any, message: str
) -> None:
    save(tmp_path, states[1], keep=1)
    with pytest.raises(ValueError, match=message):
        save(tmp_path, replace(states[2], **change), keep=1)
    loaded = load_newest(tmp_path)
    assert loaded is not None and same(loaded, states[1])


# ------------------------------------------------------------------------------ restoring elsewhere


def other_shape(state: CheckpointState) -> CheckpointState:
    return replace(state, model=dict(state.model) | {"model.norm.weight": torch.zeros(3)})


def other_dtype(state: CheckpointState) -> CheckpointState:
    return replace(state, model={name: tensor.bfloat16() for name, tensor in state.model.items()})


def one_more(state: CheckpointState) -> CheckpointState:
    return replace(state, model=dict(state.model) | {"adapter": torch.zeros(1)})


def other_moment(state: CheckpointState) -> CheckpointState:
    name = "model.norm.weight/exp_avg"
    return replace(state, optimizer=dict(state.optimizer) | {name: torch.zeros(3)})


def unknown_moment(state: CheckpointState) -> CheckpointState:
    return replace(state, optimizer=dict(state.optimizer) | {"gone/exp_avg": torch.zeros(3)})


def other_groups(state: CheckpointState) -> CheckpointState:
    return replace(state, optimizer_groups=state.optimizer_groups[::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_shape, r"model.norm.weight is torch.float32\[3\] in the checkpoint, torch.float32\[16\]"),
        (other_dtype, r"is torch.bfloat16\[16, 16\] in the checkpoint"),
        (one_more, "the checkpoint has adapter, which the model lacks"),
        (other_moment, r"model.norm.weight/exp_avg is \[3\], the parameter another shape"),
        (unknown_moment, "the checkpoint has gone/exp_avg, which the model lacks"),
        (other_groups, "the parameter groups in the checkpoint differ"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(
    change: Callable[[CheckpointState], CheckpointState], message: str
) -> None:
    source = tiny(0)
    optimizer = adamw(source)
    train(source, optimizer, 1)
    state = change(snapshot(source, optimizer, 1))
    target = tiny(1)
    target_optimizer = adamw(target)
    before = snapshot(target, target_optimizer, 0)
    with pytest.raises(ValueError, match=message):
        restore(target, target_optimizer, state)
    assert same(snapshot(target, target_optimizer, 0), before)


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="a parameter that is not the model's"):
        snapshot(tiny(0), adamw(tiny(0)), 0)


# ------------------------------------------------------------------------------ damage


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def long(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" x")


def flipped(path: Path) -> None:
    """One bit of the middle; in the manifest, where it falls into a digest."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = [missing, empty, short, long, flipped]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_skipped_and_named(
    tmp_path: Path,
    states: dict[int, CheckpointState],
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    save(tmp_path, states[1], keep=3)
    newest = save(tmp_path, states[2], keep=3)
    damage(newest / name)
    with pytest.raises(TornCheckpointError, match=r"step-00000002"):
        load(newest)
    with caplog.at_level(logging.WARNING):
        loaded = load_newest(tmp_path)
    assert loaded is not None and same(loaded, states[1])
    assert "step-00000002" in caplog.text
    assert (name in caplog.text) or (name == "manifest.json" and damage is flipped)

    # Training continues from step 1 and reaches step 2 again.
    save(tmp_path, states[2], keep=3)
    loaded = load_newest(tmp_path)
    assert loaded is not None and same(loaded, states[2])


def resealed(path: Path, name: str, content: bytes) -> None:
    """Replace a file and make the manifest agree: damage from before the manifest was written."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!"),
        ("optimizer.safetensors", b""),
        ("state.json", b"{"),
        ("state.json", b"[]"),
        ("state.json", b'{"step": 2}'),
        ("state.json", b"\xff\xfe"),
    ],
)
def test_an_unparsable_file_with_the_right_digest_is_torn(
    tmp_path: Path, states: dict[int, CheckpointState], name: str, content: bytes
) -> None:
    path = save(tmp_path, states[2], keep=1)
    resealed(path, name, content)
    with pytest.raises(TornCheckpointError, match=name):
        load(path)


@pytest.mark.parametrize("content", ["[]", '{"format": 1}', '{"format": 1, "files": {}}', '{"format": 1, "files": 3}'])
def test_a_manifest_that_names_nothing(tmp_path: Path, states: dict[int, CheckpointState], content: str) -> None:
    path = save(tmp_path, states[2], keep=1)
    (path / "manifest.json").write_text(content)
    with pytest.raises(TornCheckpointError, match="manifest"):
        load(path)


def test_if_all_are_torn_it_is_an_error_and_training_does_not_restart(
    tmp_path: Path, states: dict[int, CheckpointState]
) -> None:
    for step in (1, 2):
        path = save(tmp_path, states[step], keep=2)
        (path / "model.safetensors").unlink()
    with pytest.raises(TornCheckpointError, match="all 2 checkpoints are torn, the newest is step-00000002"):
        load_newest(tmp_path)
    with pytest.raises(TornCheckpointError, match=r"manifest\.json is missing"):
        load(tmp_path / "step-00000009")


def test_another_format_is_an_error_and_not_skipped(tmp_path: Path, states: dict[int, CheckpointState]) -> None:
    save(tmp_path, states[1], keep=2)
    path = save(tmp_path, states[2], keep=2)
    (path / "manifest.json").write_text('{"format": 2, "files": {}}')
    with pytest.raises(ValueError, match="format 2 is not known"):
        load_newest(tmp_path)


def test_a_torn_checkpoint_of_a_later_step_does_not_displace_a_good_one(
    tmp_path: Path, states: dict[int, CheckpointState], caplog: pytest.LogCaptureFixture
) -> None:
    """Retention counts up to the step just saved: a torn step 9 must not push step 5 out."""
    path = save(tmp_path, states[9], keep=1)
    (path / "state.json").unlink()
    save(tmp_path, states[5], keep=1)
    loaded = load_newest(tmp_path)
    assert loaded is not None and same(loaded, states[5])
    assert "step-00000009 is of a later step" in caplog.text


# ------------------------------------------------------------------------------ crashes


class Crash(Exception):
    """The process ends here."""


class Machine:
    """Counts the calls that change the disk, and ends the process at one of them, before or after it."""

    CALLS = ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (checkpoint, "save_file"), (Path, "mkdir"))

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.crash_at: int | None = None
        self.after = False
        for owner, name in self.CALLS:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name), name))

    def _counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            crashes = self.crash_at is not None and len(self.calls) > self.crash_at
            if crashes and not self.after:
                raise Crash
            result = call(*args, **kwargs)
            if crashes:
                raise Crash
            return result

        return counted

    def arm(self, crash_at: int | None, after: bool) -> None:
        self.calls, self.crash_at, self.after = [], crash_at, after


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("old", "new", "keep"), [(1, 2, 1), (1, 2, 2), (2, 2, 1)])
def test_a_crash_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path,
    states: dict[int, CheckpointState],
    monkeypatch: pytest.MonkeyPatch,
    old: int,
    new: int,
    keep: int,
    after: bool,
) -> None:
    """Whichever call a save crashes in, one of the two loads; then saving again works and removes leftovers."""
    machine = Machine(monkeypatch)
    former, latter = states[old], replace(states[new], consumed=("new",))
    save(tmp_path / "probe", former, keep=keep)
    machine.arm(None, after)
    save(tmp_path / "probe", latter, keep=keep)
    count = len(machine.calls)
    assert count >= 9
    outcomes = []
    for crash_at in range(count):
        folder = tmp_path / f"{crash_at}"
        machine.arm(None, after)
        save(folder, former, keep=keep)
        machine.arm(crash_at, after)
        with pytest.raises(Crash):
            save(folder, latter, keep=keep)
        machine.arm(None, after)
        loaded = load_newest(folder)
        assert loaded is not None
        assert same(loaded, former) or same(loaded, latter)
        outcomes.append(same(loaded, latter))

        save(folder, latter, keep=keep)
        loaded = load_newest(folder)
        assert loaded is not None and same(loaded, latter)
        expected = {f"step-{step:08d}" for step in ((old, new) if keep == 2 else (new,))}
        assert {p.name for p in folder.iterdir()} == expected
    assert outcomes == sorted(outcomes)  # once the new one is in force it stays so
    assert not outcomes[0] and outcomes[-1]


def test_the_first_checkpoint_crashing_leaves_none(
    tmp_path: Path, states: dict[int, CheckpointState], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    machine.arm(None, False)
    save(tmp_path / "probe", states[1], keep=1)
    for crash_at in range(machine.calls.index("replace") + 1):
        machine.arm(crash_at, False)
        with pytest.raises(Crash):
            save(tmp_path / f"{crash_at}", states[1], keep=1)
        machine.arm(None, False)
        assert load_newest(tmp_path / f"{crash_at}") is None


def test_a_half_removed_checkpoint_has_no_checkpoints_name(
    tmp_path: Path, states: dict[int, CheckpointState], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would count as a torn checkpoint."""
    save(tmp_path, states[1], keep=1)

    def half(path: Path) -> None:
        (path / "manifest.json").unlink()
        raise Crash

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(Crash):
        save(tmp_path, states[2], keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001.tmp", "step-00000002"]


def test_everything_is_on_the_disk_before_its_name_is(
    tmp_path: Path, states: dict[int, CheckpointState], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and their directory are fsynced before the rename, the manifest last, the parent after it."""
    log: list[str] = []
    fsync, replace_ = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        log.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def logged_replace(source: Path, target: Path) -> None:
        log.append(f"replace {source.name} {target.name}")
        replace_(source, target)

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    save(folder, states[4], keep=1)
    assert sorted(log[:3]) == sorted(f"fsync {name}" for name in FILES[:3])
    assert log[3:] == [
        "fsync manifest.json",
        "fsync step-00000004.tmp",
        "replace step-00000004.tmp step-00000004",
        "fsync checkpoints",
    ]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path, states: dict[int, CheckpointState]) -> None:
    for name in ("step-00000001.tmp", "step-00000007.tmp", "step-00000001.old.tmp", "notes.tmp", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    save(tmp_path, states[2], keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "notes.tmp", "step-00000002"]
