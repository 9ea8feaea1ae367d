"""Published weights: files in the run's folder that appear whole or not at all. No torch.

Learner → rollout workers, evaluator. A reader gets a file's content only if the file is in the run's
folder and has the announced digest.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.files import sha256_of, write_atomically

log = logging.getLogger("katana.weights")
_NAME = re.compile(r"v([0-9]{8})\.safetensors")
_COUNT = re.compile(r"[0-9]{1,15}", re.ASCII)


class BadWeights(ValueError):
    """Weights that are missing, torn, or not the announced ones."""


@dataclass(frozen=True, slots=True)
class WeightsRef:
    """The policy pointer: version, file name inside `weights/`, sha256 (hex)."""

    version: int
    file: str
    sha256: str


def read_pointer(fields: Mapping[str, str]) -> tuple[WeightsRef, int] | None:
    """The weights that the policy pointer (the hash `policy`) announces, and their step; None before the first. Raises
    BadWeights for a pointer that no learner wrote."""
    if "version" not in fields:
        return None
    for name in ("version", "step"):
        if not _COUNT.fullmatch(fields.get(name, "")):
            raise BadWeights(f"policy pointer: {name} {fields.get(name)!r:.40} is not a number")
    for name in ("file", "sha256"):
        if name not in fields:
            raise BadWeights(f"policy pointer: version {fields['version']} without a {name}")
    return WeightsRef(int(fields["version"]), fields["file"], fields["sha256"]), int(fields["step"])


def file_of(version: int) -> str:
    """The name of a version's file."""
    return f"v{version:08d}.safetensors"


def publish(folder: Path, version: int, write: Callable[[Path], None]) -> WeightsRef:
    """Write `weights/v{version}.safetensors`; returns what to announce."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_of(version)
    digests: list[str] = []

    def write_and_digest(draft: Path) -> None:
        # Digest of the draft: damage to the file after others can see it must not be announced as correct.
        write(draft)
        digests.append(sha256_of(draft))

    write_atomically(path, write_and_digest)
    return WeightsRef(version, path.name, digests[0])


def verified(folder: Path, ref: WeightsRef) -> bytes:
    """The content of the file that a reference names, read once. Raises BadWeights for another name, a missing file or
    another digest."""
    if not _NAME.fullmatch(ref.file):
        raise BadWeights(f"policy version {ref.version}: {ref.file!r:.80} is not the name of a weights file")
    path = folder / ref.file
    if path.resolve().parent != folder.resolve():
        raise BadWeights(f"policy version {ref.version}: {path} is a link to a place outside its folder")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadWeights(f"policy version {ref.version}: {path}: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != ref.sha256:
        raise BadWeights(
            f"policy version {ref.version}: {path} has sha256 {found[:12]}…, announced was {ref.sha256[:12]}…"
        )
    return data


def version_of(file: str) -> int | None:
    match = _NAME.fullmatch(file)
    return int(match.group(1)) if match else None


def newest_version(folder: Path) -> int:
    """The highest version among the files; -1 if there is none."""
    names = folder.iterdir() if folder.is_dir() else ()
    return max((version for path in names if (version := version_of(path.name)) is not None), default=-1)


def retain(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` weights."""
    found = sorted((version, path) for path in folder.iterdir() if (version := version_of(path.name)) is not None)
    for _, path in found[: max(0, len(found) - keep)]:
        path.unlink(missing_ok=True)
    for draft in folder.glob("*.tmp"):
        draft.unlink(missing_ok=True)
