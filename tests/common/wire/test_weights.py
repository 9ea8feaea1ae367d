"""Weights appear whole or not at all, and are read only if they are those that were announced."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from common.files import sha256_of, write_atomically
from common.wire.weights import BadWeights, WeightsRef, publish, retain, verified, version_of


def put(folder: Path, version: int, data: bytes = b"weights") -> WeightsRef:
    return publish(folder, version, lambda path: path.write_bytes(data) and None)


def test_what_is_published_can_be_had_by_its_reference(tmp_path: Path) -> None:
    ref = put(tmp_path / "weights", 12, b"abc")
    # sha256 of "abc", from FIPS 180-2.
    assert ref == WeightsRef(
        12, "v00000012.safetensors", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert verified(tmp_path / "weights", ref) == b"abc"
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["v00000012.safetensors"]


def test_a_writer_that_fails_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(draft: Path) -> None:
        draft.write_bytes(b"half of the n")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda draft: draft.write_bytes(b"new") and None)
    assert path.read_bytes() == b"new"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    write_atomically(tmp_path / "file", lambda draft: draft.write_bytes(b"x") and None)
    assert events == ["fsync", "rename", "fsync"]


def test_files_can_be_read_by_others_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = tmp_path / put(tmp_path, 1).file
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "name",
    ["../v00000001.safetensors", "/etc/passwd", "v1.safetensors", "v00000001.safetensors\n", "v00000001.safetensors~",
     "w/v00000001.safetensors", "w/../v00000001.safetensors", "..", "\0", "", "v00000001.bin", "v٠٠٠٠٠٠٠١.safetensors"],
)  # fmt: skip
def test_names_that_could_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, 1)
    with pytest.raises(BadWeights, match="not the name of a weights file"):
        verified(tmp_path, WeightsRef(1, name, "00"))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    ref = put(tmp_path / "elsewhere", 1, b"secret")
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / ref.file).symlink_to(tmp_path / "elsewhere" / ref.file)
    with pytest.raises(BadWeights, match="is a link to a place outside its folder"):
        verified(folder, ref)
    # The folder itself may be a link: a run's folder may lie on another disk.
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    assert verified(tmp_path / "linked", ref) == b"secret"


def test_missing_torn_and_other_weights_are_refused(tmp_path: Path) -> None:
    ref = put(tmp_path, 3, b"whole")
    path = tmp_path / ref.file
    for damaged in (b"whol", b"whole ", b"wholf", b""):
        path.write_bytes(damaged)
        with pytest.raises(BadWeights, match=r"policy version 3: .* has sha256"):
            verified(tmp_path, ref)
    path.unlink()
    with pytest.raises(BadWeights, match="No such file"):
        verified(tmp_path, ref)


def test_the_digest_is_that_of_the_whole_file(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "f").write_bytes(data)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_the_newest_are_retained(tmp_path: Path) -> None:
    for version in (0, 2, 9, 10, 11, 100):
        put(tmp_path, version)
    (tmp_path / "v00000012.safetensors.tmp").write_bytes(b"torn")
    (tmp_path / "notes.txt").write_bytes(b"not ours")
    retain(tmp_path, 2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"v00000011.safetensors", "v00000100.safetensors", "notes.txt"}
    retain(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == left
    retain(tmp_path, 1)
    assert {version_of(path.name) for path in tmp_path.iterdir()} == {100, None}
