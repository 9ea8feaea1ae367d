"""What must hold for any input, whoever made it: `check_record` and `check_config` fail where it does not.

Also inputs to begin with, and mutations for where there is no fuzzer to make them. Without atheris.
"""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import fields
from typing import Any

import msgpack
import numpy as np
from samples import (
    make_divergence,
    make_former_support,
    make_head,
    make_logprobs,
    make_own_support,
    make_score_support,
    make_support,
    make_tokens,
    make_verdict,
    make_view,
    make_wide_support,
)

from common.config import Config, ConfigError, keys, parse
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
    read_number,
    read_rid,
)

RECORDS: tuple[Any, ...] = (
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
LEAST = "student: {model: s}\nteacher: {model: t}\n"


# --- records ---


def records() -> list[bytes]:
    """Valid records of every kind."""
    samples: list[Any] = [
        make_head(),
        make_head("r000000001", arm="control", problem=2**53, seed=2**63 - 1, max_new_tokens=8192),
        make_head(teacher="math"),
        make_tokens(finish="eos"),
        make_tokens(list(range(64)), seq=300, start=70_000, policy_version=2**40),
        make_support(),
        make_support(1, 0),
        make_wide_support(16, 64),
        make_logprobs(),
        make_logprobs(16, 64, tail=False),
        make_former_support(16, 64, tail=False),
        make_divergence(),
        make_divergence([], seq=2**33),
        make_score_support(),
        make_score_support(16, 64, tail=False),
        make_own_support(),
        make_own_support(16, 2, 32),
        make_view(),
        make_view([], seq=2**33),
        make_verdict(),
        make_verdict(view=make_view().view),
        make_verdict(finish_reason="length", generated=400, threshold=None, min_window=None, cut=False),
    ]
    return [sample.encode() for sample in samples]


def check_record(data: bytes) -> int:
    """Every decoder on the same bytes; returns how many took them (1 at most)."""
    taken = 0
    for kind in RECORDS:
        try:
            record = kind.decode(data)
        except MessageError:
            continue
        taken += 1
        _check_values(record)
        again = record.encode()
        back = kind.decode(again)
        assert back.encode() == again, f"{kind.KIND}: encoded twice, not the same"
        for field in fields(record):
            sent, found = getattr(record, field.name), getattr(back, field.name)
            assert np.array_equal(sent, found), f"{kind.KIND}.{field.name}: {sent!r} came back as {found!r}"
    _check_entry_fields(data)
    return taken


def _check_values(record: Any) -> None:
    for field in fields(record):
        value, where = getattr(record, field.name), f"{record.KIND}.{field.name}"
        if isinstance(value, np.ndarray) and value.dtype == np.float32:
            assert np.isfinite(value).all(), f"{where}: not finite"
        elif isinstance(value, np.ndarray):
            assert value.dtype == np.int32, f"{where}: {value.dtype}"
            assert (value >= 0).all(), f"{where}: an id below 0"
        elif isinstance(value, float):
            assert math.isfinite(value), f"{where}: not finite"
        elif isinstance(value, int):
            assert 0 <= value < 2**63, f"{where}: {value}"


def _check_entry_fields(data: bytes) -> None:
    with contextlib.suppress(MessageError):
        assert 0 <= read_number(data, "n") < 2**53
    with contextlib.suppress(MessageError):
        rid = read_rid(data)
        assert rid.isascii()
        assert rid.isalnum()
        assert rid.encode() == data


def mutate_tree(data: bytes, draw: random.Random) -> bytes:
    """A record with one value changed and everything around it whole; any bytes where it is no msgpack."""
    try:
        tree = msgpack.unpackb(data, strict_map_key=False)
    except Exception:  # whatever a fuzzer has made of it
        return data
    places: list[tuple[list[Any], int]] = []
    waiting = [tree] if isinstance(tree, list) else []
    while waiting:
        here = waiting.pop()
        places += [(here, at) for at in range(len(here))]
        waiting += [one for one in here if isinstance(one, list)]
    if not places:
        return data
    here, at = draw.choice(places)
    value = here[at]
    if isinstance(value, bytes) and value and draw.random() < 0.7:
        number = draw.choice(_NUMBERS)
        place = draw.randrange(0, len(value), 4)
        here[at] = value[:place] + number + value[place + 4 :]
    elif isinstance(value, list) and draw.random() < 0.5:
        here[at] = value[:-1] if draw.random() < 0.5 else [*value, draw.choice(_ODD)]
    elif isinstance(value, int) and draw.random() < 0.5:
        here[at] = min(max(value + draw.choice((-1, 1, 256, 2**31)), -(2**63)), 2**64 - 1)
    else:
        here[at] = draw.choice(_ODD)
    packed: bytes = msgpack.packb(tree)
    return packed


# Of an array, as float32 and int32: NaN, the infinities, ids below 0, 1.
_NUMBERS = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\1\0\0\0")
_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64 - 1, 1.5, math.nan, math.inf, -0.0),
    *("", "x" * 41, "é", "eos", "treated", b"", b"\0" * 4, b"\0" * 12),
    *([], [[]], [0], [3], [0, 2**28], ["f", [0], b""], ["i", [1], b"\1\0\0\0"], ["f", [1], b"\0\0\x80?"]),
    *({}, msgpack.ExtType(5, b"")),
)


# --- configs ---


def configs() -> list[bytes]:
    """Shipped configs, and every key with its default and with values of other types, each as a small config."""
    texts = [path.read_text() for path in sorted((PACKAGE_ROOT / "ops" / "experiments").glob("*.yaml"))]
    for name, default, _ in keys():
        if default != "required":
            texts += [f"{LEAST}\0{name}={value}" for value in (default, "1.0e-3", "[1, x]")]
    texts += [LEAST + line for line in _LINES]
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def check_config(data: bytes) -> int:
    """A config file, then overrides, with a zero byte between each; returns 1 for a valid one."""
    raw, *overrides = data.split(b"\0")
    try:
        config = parse(raw, [item.decode("utf-8", "replace") for item in overrides[:4]])
    except ConfigError as error:
        assert len(str(error)) < 100_000
        return 0
    again = parse(config.to_yaml())
    assert again == config, "written as YAML and read again, not the same"
    assert isinstance(again, Config)
    assert all(math.isfinite(number) for number in _numbers(config.model_dump())), "a number that is not finite"
    if config.redis.url is not None:
        assert "@" not in config.redis.url.partition("://")[2] or config.redis.url.startswith("unix:///")
    return 1


def _numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in _numbers(value)]
    return [tree] if isinstance(tree, float) else []


_LINES = (
    "learner: &l {max_steps: 3}\nrollout: *l",
    "data: {options: {max_numbers: 4, a: -1}}",
    "seed: 0x1f",
    "seed: 1:30:00",
    "learner: {learning_rate: 1:1:1.5}",
    "seed: 2001-12-14t21:59:43.10-05:00",
    "name: !!binary aGVsbG8=",
    "<<: {seed: 1}",
    "seed: !!int '7'",
    "seed: !!float '1e3'",
    "data: !!set {a, b}",
    "data: !!omap [a: 1]",
    "data: !!pairs [a: 1]",
    'runs_dir: "\\x41\\u00e9\\U0001F600"',
    'runs_dir: "\\N\\L"',
    "? [a]\n: 1",
    "runs_dir: |\n  text\n  more",
    "runs_dir: >-\n  text\n  more",
    "--- {a: 1}\n...\n--- {b: 2}",
    "%YAML 1.1\n---\nseed: 1",
    "redis: {url: 'rediss://h:1/0', username: '{role}', password_file: 'p/{role}', ca_file: c}",
    "redis: {url: 'unix:///tmp/s?db=0', broker_url: 'redis://[::1]:6379/1'}",
    "redis: {url: 'redis://u:p@h:1/0'}",
)
WORDS = tuple(
    word.encode()
    for word in (
        *(":", "- ", "? ", "{", "}", "[", "]", "'", '"', "\n", "\0", "=", "#", "...", "---", "|\n ", ">\n "),
        *("&a ", "*a", "!!int ", "!!float ", "!!set ", "<<: ", "\\U", "null", "true", ".nan", ".inf", "1e999", "0x"),
        *("1:1:1", "2001-01-01", "{role}"),
    )
)


# --- mutation without a fuzzer ---


def mutate_bytes(data: bytes, draw: random.Random, words: tuple[bytes, ...] = ()) -> bytes:
    """One random change, or two: a byte, a piece out, a piece twice, a word in."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.randrange(len(changed) + 1)
        what = draw.randrange(5 if words else 4)
        if what == 0 and at < len(changed):
            changed[at] = draw.randrange(256)
        elif what == 1:
            del changed[at : at + draw.randint(1, 8)]
        elif what == 2:
            changed[at:at] = changed[at : at + draw.randint(1, 16)]
        elif what == 4:
            changed[at:at] = draw.choice(words)
        else:
            changed[at:at] = draw.randbytes(draw.randint(1, 4))
    return bytes(changed)
