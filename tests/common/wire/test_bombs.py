"""A megabyte that would unpack to gigabytes: refused, and for less than ten megabytes of memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import msgpack
import pytest
from samples import (
    make_divergence,
    make_former_support,
    make_head,
    make_logprobs,
    make_score_support,
    make_support,
    make_tokens,
    make_verdict,
    make_view,
)

from common.config import ConfigError, parse
from common.pretrained import PACKAGE_ROOT
from common.wire.messages import (
    ChunkLogprobs,
    ChunkSupport,
    ChunkTokens,
    FormerSupport,
    MessageError,
    RolloutHead,
    ScoreDivergence,
    ScoreSupport,
    ScoreView,
    Verdict,
)
from ops.bench.resident import forget_peak, peak_mb

KINDS = (
    RolloutHead,
    ChunkTokens,
    ChunkSupport,
    ChunkLogprobs,
    FormerSupport,
    ScoreDivergence,
    ScoreSupport,
    ScoreView,
    Verdict,
)
SAMPLES = (
    make_head(),
    make_tokens(),
    make_support(),
    make_logprobs(),
    make_former_support(),
    make_divergence(),
    make_score_support(),
    make_view(),
    make_verdict(view=make_view().view),
)
SIZE = 1 << 20
LIMIT = 10 << 20


def filled(piece: bytes) -> bytes:
    return piece * (SIZE // len(piece))


def tree(leaf: bytes, wide: int, deep: int) -> bytes:
    """Arrays in arrays, each of `wide`, down to `leaf`."""
    data = leaf
    for _ in range(deep):
        data = b"\xdc" + wide.to_bytes(2, "big") + data * wide
    return data


# What may stand where a record or one of its fields is looked for.
PIECES = {
    "empty lists, 64 by 64 by 64": tree(b"\x90", 64, 3) * 3,
    "empty lists, 16 deep of 15": tree(b"\x90", 15, 5),
    "empty maps, 64 by 64 by 64": tree(b"\x80", 64, 3) * 3,
    "a wide list of empty lists": b"\xdd" + SIZE.to_bytes(4, "big") + b"\x90" * SIZE,
    "a wide list of small numbers": b"\xdd" + SIZE.to_bytes(4, "big") + b"\x01" * SIZE,
    "a wide list of nothing": b"\xdd" + SIZE.to_bytes(4, "big") + b"\xc0" * SIZE,
    "lists of 64 floats": tree(b"\xcb" + bytes(8), 64, 2) * 28,
    "lists of 64 texts": tree(b"\xa1x", 64, 3) * 2,
    "lists begun and never ended": filled(b"\xdc\x00\x40"),
    "huge lists begun and never ended": filled(b"\xdd\xff\xff\xff\xff"),
    "lists of 64, the last one of which goes on": filled(b"\xdc\x00\x40" + b"\x01" * 63),
    "maps begun and never ended": filled(b"\xde\x00\x40\x01"),
    "a list in a list, a million deep": b"\x91" * SIZE,
    "a map in a map": filled(b"\x81\x01"),
    "a long text": b"\xdb" + SIZE.to_bytes(4, "big") + b"x" * SIZE,
    "long texts in lists": b"\xdc\x00\x40" + (b"\xda\x10\x00" + b"x" * 4096) * 64 + bytes(SIZE // 2),
    "a long text that is not there": filled(b"\xdb\xff\xff\xff\xff"),
    "bytes that are not there": filled(b"\xc6\xff\xff\xff\xff"),
    "an extension": b"\xc9" + SIZE.to_bytes(4, "big") + b"\x05" + bytes(SIZE),
    "many extensions": tree(b"\xd4\x05\x00", 64, 3),
    "many times": tree(b"\xd6\xff" + bytes(4), 64, 3),
    "empty extensions": tree(b"\xc7\x00\x05", 64, 3),
}


def bombs(kind: type, sample: bytes) -> dict[str, bytes]:
    """Each piece by itself, and in the place of each field of a valid record."""
    values = msgpack.unpackb(sample)
    made = dict(PIECES)
    for name, piece in PIECES.items():
        for place in (0, 1, len(values) - 1):
            parts = [msgpack.packb(value) for value in values]
            parts[place] = piece
            made[f"{name}, as field {place}"] = b"\xdc" + len(parts).to_bytes(2, "big") + b"".join(parts)
    # Shapes that promise more than there is.
    for shape in ([2**28, 2**28], [2**31], [0, 2**28], [2**64 - 1]):
        parts = [*values[:-1], ["f", shape, b""]]
        made[f"shape {shape}"] = msgpack.packb(parts)
    return made


@pytest.mark.parametrize(
    ("kind", "sample"), list(zip(KINDS, SAMPLES, strict=True)), ids=[kind.__name__ for kind in KINDS]
)
def test_a_bomb_is_refused_in_little_memory(kind: type[RolloutHead], sample: RolloutHead) -> None:
    for name, data in bombs(kind, sample.encode()).items():
        tracemalloc.start()
        with pytest.raises(MessageError):
            kind.decode(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < LIMIT, f"{name}: {peak / 2**20:.1f} MB"


_CHILD = """
import sys
from pathlib import Path
from common.wire import messages
from ops.bench.resident import forget_peak, peak_mb
kinds = [getattr(messages, name) for name in sys.argv[2:]]
files = sorted(Path(sys.argv[1]).iterdir())
for kind in kinds:
    try:
        kind.decode(b"x")
    except messages.MessageError:
        pass
data = files[0].read_bytes()
before = forget_peak("cpu")
for path in files:
    data = path.read_bytes()
    for kind in kinds:
        try:
            kind.decode(data)
        except messages.MessageError:
            pass
print(int((peak_mb("cpu") - before) * (1 << 20)))
"""


@pytest.mark.slow
def test_a_process_that_reads_bombs_does_not_grow(tmp_path: Path) -> None:
    """The same by what the system says, so that memory which Python does not count is seen as well."""
    for number, data in enumerate(bombs(Verdict, make_verdict().encode()).values()):
        (tmp_path / f"{number:03d}").write_bytes(data)
    arguments = [sys.executable, "-c", _CHILD, str(tmp_path), *(kind.__name__ for kind in KINDS)]
    done = subprocess.run(arguments, cwd=PACKAGE_ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < LIMIT + (2 << 20)  # two of the files themselves


def merged(levels: int) -> str:
    """YAML whose merge keys hold nine times more with every line."""
    lines = ["b0: &b0 {" + ", ".join(f"k{n}: {n}" for n in range(9)) + "}"]
    lines += [f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (merged(12), "'<<' is not allowed"),
        ("seed: " + ":".join(["1"] * 400_000), "more than 400 characters"),
        ("seed: 0x" + "f" * 900_000, "more than 400 characters"),
        ("learner: {learning_rate: " + "9" * 900_000 + "}", "more than 400 characters"),
        ("learner: {learning_rate: " + ":".join(["1"] * 199) + ".5}", "not valid YAML"),
        ('runs_dir: "\\UFFFFFFFF"', "not valid YAML"),
        ("data: " + "[" * 900_000, "not valid YAML"),
        ("data: " + "{a: " * 200_000, "not valid YAML"),
        ("".join(f"k{n}: 1\n" for n in range(2000)), "and 1980 more"),
    ],
    ids=[
        *("merge keys", "base 60", "hexadecimal", "a long float", "a float of base 60"),
        *("no character", "lists", "maps", "unknown keys"),
    ],
)
def test_a_config_that_would_take_minutes_or_gigabytes_is_refused_at_once(text: str, words: str) -> None:
    before = forget_peak("cpu")
    with pytest.raises(ConfigError, match=words):
        parse("student: {model: s}\nteacher: {model: t}\n" + text)
    assert peak_mb("cpu") - before < 300
