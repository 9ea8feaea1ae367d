"""A rollout as people read it: texts of single tokens add up to the whole, and nothing broken is taken for text."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import put_rows, put_tiny_qwen3
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import Run, make_config, make_divergence, make_logprobs, make_support, make_tokens, make_verdict, script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from actors.books import Booking, Books, line_of, unjudged_line
from common.config import Config, ConfigError
from common.pretrained import find_model
from common.runfiles import records
from common.wire.messages import Verdict
from ops.reading.rollouts import (
    Words,
    WrittenChunk,
    audited_chunks,
    booked_ends,
    booked_line,
    reading_from_hash,
    reading_of_line,
    readings_from_folder,
    texts_of,
    tokens_of,
)

MODELS = {"student": {"model": "ops/models/student"}, "teacher": {"model": "ops/models/teacher"}}


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE: 256 bytes, a special token, and what merges of a few words gave."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world über 😀 10 €"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


BYTES = byte_level()


def decode(ids: Sequence[int]) -> str:
    return str(BYTES.decode(list(ids), clean_up_tokenization_spaces=False))


def ids_of(text: str) -> list[int]:
    return list(BYTES(text)["input_ids"])


# --- texts ---


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    ids = [*ids_of("a漢"), 0]
    assert [decode([token]) for token in ids] == ["a", "\ufffd", "\ufffd", "\ufffd", "<|end|>"]
    assert texts_of(ids, decode) == ["a", "", "", "漢", "<|end|>"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    ids = ids_of("x漢")[:-1]
    assert texts_of(ids, decode) == ["x", "", "\ufffd"]
    assert texts_of([], decode) == []


@settings(deadline=None)
@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=40))
def test_the_texts_of_any_tokens_add_up_to_the_whole(ids: list[int]) -> None:
    assert "".join(texts_of(ids, decode)) == decode(ids)


@settings(deadline=None)
@given(st.lists(st.sampled_from([i for i in range(len(BYTES)) if decode([i]) == "\ufffd"]), max_size=60))
def test_also_of_bytes_that_are_no_text(ids: list[int]) -> None:
    """No character is there to wait for, so the work stays in proportion: see how little is decoded at a time."""
    longest = 0

    def measured(some: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(some))
        return decode(some)

    assert "".join(texts_of(ids, measured)) == decode(ids)
    assert longest <= 16


def test_a_space_that_a_decoder_takes_off_a_beginning_stays() -> None:
    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "s": 2}, unk_token="s"))
    words.decoder = decoders.Metaspace()
    assert words.decode([1]) == "two"
    assert texts_of([0, 1, 2, 1], lambda ids: words.decode(list(ids))) == ["one", " two", "s", " two"]


# --- tokens ---


def test_every_token_has_its_part_and_its_divergence() -> None:
    ids = ids_of("abcd")
    tokens = tokens_of([*ids, 0], [0.5, 0.25, 0.0], decode, keep=2, trigger=4, stop_ids={0})
    assert [(token.text, token.divergence, token.part, token.stop) for token in tokens] == [
        ("a", 0.5, "kept", False),
        ("b", 0.25, "kept", False),
        ("c", 0.0, "detection", False),
        ("d", None, "detection", False),
        ("<|end|>", None, "overshoot", True),
    ]
    assert [token.id for token in tokens] == [*ids, 0]


def test_where_no_tokenizer_is_to_be_had_ids_are_shown(tmp_path: Path) -> None:
    words = Words(make_config(tmp_path))
    assert "student" in words.missing
    assert words.decode([3, 14]) == "⟨3⟩⟨14⟩"
    shipped = Words(make_config(tmp_path, **MODELS))
    assert not shipped.missing
    assert shipped.decode([10**6]) == "⟨1000000⟩"


def tokenizer_in(folder: Path, text: str | None = None) -> None:
    """The tokenizer that ships, or a file of this text in its place."""
    folder.mkdir(parents=True)
    shipped = find_model("ops/models/student") / "tokenizer.json"
    (folder / "tokenizer.json").write_text(shipped.read_text() if text is None else text)


def test_the_tokenizer_is_that_of_the_model_that_the_run_left_behind(tmp_path: Path) -> None:
    config = make_config(tmp_path)  # the student's folder is gone
    tokenizer_in(config.run_dir / "model")
    words = Words(config)
    assert not words.missing
    assert "⟨" not in words.decode([3, 4])
    moved = tmp_path / "moved"
    config.run_dir.rename(moved)
    assert Words(config).missing
    assert Words(config, moved).decode([3, 4]) == words.decode([3, 4])


@pytest.mark.parametrize("text", ["{", "[]", "{}", ""])
def test_a_damaged_tokenizer_gives_way_to_the_students_and_then_to_ids(tmp_path: Path, text: str) -> None:
    config = make_config(tmp_path, **MODELS)
    tokenizer_in(config.run_dir / "model", text)
    assert "⟨" not in Words(config).decode([3, 4])
    student = tmp_path / "student"
    tokenizer_in(student, text)
    (student / "config.json").write_text("{}")
    words = Words(make_config(tmp_path, student={"model": str(student)}))
    assert str(student) in words.missing
    assert words.decode([3, 4]) == "⟨3⟩⟨4⟩"


# --- from Redis ---


def hash_of(run: Run, rid: str = "r1") -> dict[bytes, bytes]:
    return run.plane.rollout(rid)


def spelled(ids: Sequence[int]) -> str:
    return "".join(chr(96 + token) for token in ids)


def test_a_rollout_that_is_being_written(run: Run) -> None:
    run.admit(arm="control", problem=4, prompt=np.array([8, 9], np.int32))
    run.take("w7", "n1")
    run.chunk(tokens=(1, 2, 3), version=2)
    run.chunk(seq=1, start=3, tokens=(4, 5), version=3)
    run.score()
    reading = reading_from_hash(hash_of(run), spelled)
    assert (reading.rid, reading.arm, reading.problem, reading.prompt) == ("r1", "control", 4, "hi")
    assert not reading.finished
    assert [token.text for token in reading.tokens] == list("abcde")
    assert [token.divergence for token in reading.tokens] == [0.5, 0.25, 0.0, None, None]
    assert {token.part for token in reading.tokens} == {"kept"}
    assert reading.chunks == (WrittenChunk(0, 0, 3, 2, "n1", "w7"), WrittenChunk(1, 3, 2, 3, "n1", "w7"))
    assert (reading.versions, reading.generated, reading.threshold) == ((2, 3), 5, None)


def test_one_that_was_handed_on_names_the_last_writer_alone(run: Run) -> None:
    run.admit()
    run.take("w1", "n1")
    run.chunk()
    entry = run.field("r1", "entry")
    run.plane.call(script("release", "w1", "r1", entry, "n1"))
    run.take("w2", "n2", idle_ms=1)
    later = make_tokens(seq=1, start=3, writer="n2").encode()
    shard = run.plane.shard_of("r1")
    stored = run.plane.call(
        script("chunk", "r1", "n2", 1, later, make_support().encode(), make_logprobs().encode(), shard, 6, "")
    )
    assert stored[0] == b"ok"
    first, second = reading_from_hash(hash_of(run), spelled).chunks
    assert (first.writer, first.worker) == ("n1", "")
    assert (second.writer, second.worker) == ("n2", "w2")


def test_one_that_has_its_verdict(run: Run) -> None:
    run.judged()
    reading = reading_from_hash(hash_of(run), spelled)
    assert (reading.finish_reason, reading.keep, reading.trigger, reading.stopped) == ("kl_trap", 2, 3, True)
    assert [token.part for token in reading.tokens] == ["kept", "kept", "detection"]
    assert (reading.threshold, reading.min_window) == (0.25, 0.125)


def test_what_was_written_after_the_verdicts_tokens_is_overshoot(run: Run) -> None:
    run.admit()
    run.take()
    run.chunk()
    run.chunk(seq=1, start=3, tokens=(4,))
    run.score()
    assert run.verdict(stop=True) == b"ok"
    tokens = reading_from_hash(hash_of(run), spelled).tokens
    assert [(token.part, token.divergence) for token in tokens][-2:] == [("detection", 0.0), ("overshoot", None)]


def test_broken_records_are_said_and_the_rest_is_read(run: Run) -> None:
    run.judged()
    run.client.hset(run.key("rollout:r1"), mapping={"head": b"junk", "d:0": b"", "t:1": b"\xff", "chunks": 2})
    reading = reading_from_hash(hash_of(run), spelled, rid="r1")
    assert (reading.rid, reading.arm, reading.finish_reason) == ("r1", "?", "kl_trap")
    assert [note.partition(":")[0] for note in reading.notes] == ["head", "t", "d"]
    assert [token.text for token in reading.tokens] == list("abc")
    assert [token.divergence for token in reading.tokens] == [None, None, None]
    nothing = reading_from_hash({b"chunks": b"many", b"length": b"-1"}, spelled, rid="r9")
    assert (nothing.rid, nothing.tokens) == ("r9", [])


def test_scores_that_do_not_fit_are_left_out(run: Run) -> None:
    run.judged()
    run.client.hset(run.key("rollout:r1"), "d:0", make_divergence([0.5]).encode())
    reading = reading_from_hash(hash_of(run), spelled)
    assert "d:0: 1 divergences of 3 tokens" in reading.notes
    assert {token.divergence for token in reading.tokens} == {None}


def test_a_dead_one(run: Run) -> None:
    run.admit()
    run.take()
    run.chunk()
    for _ in range(3):
        run.plane.fail("r1", "teacher", "broken", max_attempts=3)
    reading = reading_from_hash(hash_of(run), spelled)
    assert (reading.finish_reason, reading.ending, len(reading.tokens)) == ("unfinished", "dead", 3)
    assert reading.finished


# --- from the folder ---


def booking(rid: str, verdict: Verdict | None) -> Booking:
    if verdict is None:
        return Booking(unjudged_line(rid, "treated", 3, ending="dropped", reason="run_end", generated=7))
    line = line_of(verdict, ending="trained", reason="", generated=5, staleness=1, active=True, correct=True)
    chunks = [records.Chunk(0, None, 0, 3, 1, "n4"), records.Chunk(1, broken="…")]
    audit = records.Audit(rid, [("n4", 0)], chunks, None, True)
    return Booking(line, verdict, audit)


def book(folder: Path, *rids: str, without: str = "") -> None:
    books = Books(folder, record_traces=True, record_audit=True)
    books.write([booking(rid, None if rid == without else make_verdict(rid)) for rid in rids])
    books.close()


def test_booked_rollouts_are_read_in_order_and_by_id(tmp_path: Path) -> None:
    config = make_config(tmp_path, **MODELS)
    book(tmp_path, "r1", "r2", "r3", without="r2")
    readings = list(readings_from_folder(tmp_path, config))
    assert [reading.rid for reading in readings] == ["r1", "r3"]
    [only] = readings_from_folder(tmp_path, config, {"r3"})
    assert only == readings[1]
    assert (only.keep, only.trigger, only.generated, only.ending, only.min_window) == (2, 3, 5, "trained", 0.125)
    assert [token.divergence for token in only.tokens] == [0.5, 0.25, 0.0]
    assert only.prompt.endswith("?")
    assert audited_chunks(tmp_path, "r3") == (WrittenChunk(0, 0, 3, 1, "n4"),)
    assert list(readings_from_folder(tmp_path, config, {"r9"})) == []


def test_a_run_is_read_where_its_verifier_or_its_data_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    known = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *of: None if name == "math_verify" else known(name, *of)
    )
    model = {"model": str(put_tiny_qwen3(tmp_path / "tiny"))}
    rows = put_rows(tmp_path / "rows", [{"prompt": "one and one?", "answer": "2"}], "jsonl")
    data = {"task": "dataset", "path": str(rows), "verifier": "math-verify"}
    unmeasured = {"every_steps": 0}
    config = make_config(tmp_path / "runs", student=model, teacher=model, data=data, eval=unmeasured)
    book(tmp_path, "r1")
    line = booked_line(tmp_path, "r1")
    assert line is not None
    [reading] = readings_from_folder(tmp_path, config)
    assert (reading.prompt, reading.notes) == ("one and one?", ())

    def prompt_and_note(config: Config = config) -> tuple[str, str]:
        [reading] = readings_from_folder(tmp_path, config)
        assert reading.tokens
        assert reading_of_line(line, config).notes[-1] == reading.notes[0]
        return reading.prompt, reading.notes[0]

    rows.write_text(json.dumps({"prompt": "p" * 300, "answer": "2"}))
    prompt, note = prompt_and_note()
    assert prompt == ""
    assert note.startswith("no prompt: ") and "the prompt has 300 tokens" in note
    rows.unlink()
    assert "there is no such file" in prompt_and_note()[1]
    assert (
        "absent" in prompt_and_note(make_config(tmp_path, student={"model": "./absent"}, data=data, eval=unmeasured))[1]
    )


def test_the_ends_of_the_books_are_by_number_and_not_by_their_order(tmp_path: Path) -> None:
    assert booked_ends(tmp_path) is None
    lines = [json.dumps({"rid": rid}, separators=(",", ":")) for rid in ("r000000007", "r000000003", "r1000000000")]
    (tmp_path / "rollouts.jsonl").write_text("\n".join([*lines, "junk", lines[0]]) + "\n")
    assert booked_ends(tmp_path) == ("r000000003", "r1000000000")


def test_one_without_a_trace_is_what_the_books_tell(tmp_path: Path) -> None:
    config = make_config(tmp_path, **MODELS)
    book(tmp_path, "r1", "r2", without="r2")
    line = booked_line(tmp_path, "r2")
    assert line is not None
    reading = reading_of_line(line, config)
    assert (reading.ending, reading.reason, reading.generated, reading.tokens) == ("dropped", "run_end", 7, [])
    assert "no text" in reading.notes[0]
    assert booked_line(tmp_path, "r9") is None
    assert booked_line(tmp_path / "nowhere", "r2") is None


def test_a_trace_ahead_of_the_books_and_a_torn_line_are_left_out(tmp_path: Path) -> None:
    config = make_config(tmp_path, **MODELS)
    book(tmp_path, "r1", "r2")
    lines = (tmp_path / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "rollouts.jsonl").write_bytes(lines[0] + lines[1][:-1])
    assert [reading.rid for reading in readings_from_folder(tmp_path, config)] == ["r1"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("traces.jsonl", b'{"rid":"r1"\n', "traces.jsonl:1: damaged"),
        ("traces.jsonl", b'["rid"]\n', "traces.jsonl:1: damaged"),
        ("traces.jsonl", b'{"rid":"r1"}\n', "traces.jsonl:1: damaged"),
        ("rollouts.jsonl", b"\xff\n", "rollouts.jsonl:1: damaged"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: bytes, said: str) -> None:
    book(tmp_path, "r1")
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ConfigError, match=said):
        list(readings_from_folder(tmp_path, make_config(tmp_path, **MODELS)))


@pytest.mark.parametrize("value", ["AAA", "@@@@", 7, base64.b64encode(b"12345").decode()])
def test_arrays_that_are_none_are_named(tmp_path: Path, value: Any) -> None:
    book(tmp_path, "r1")
    trace = json.loads((tmp_path / "traces.jsonl").read_text())
    (tmp_path / "traces.jsonl").write_text(json.dumps(trace | {"tokens": value}, separators=(",", ":")) + "\n")
    with pytest.raises(ConfigError, match=r"traces\.jsonl:1: damaged"):
        list(readings_from_folder(tmp_path, make_config(tmp_path, **MODELS)))
