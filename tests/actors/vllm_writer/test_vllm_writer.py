"""The writer before a server: the stand-in, and with `make test-vllm` the real one. What it writes, and whose it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM
from vllm_servers import KINDS, Server, serving
from vllm_writers import (  # noqa: F401
    CHUNK,
    LENGTH,
    PROMPT,
    RUN,
    SERVER,
    Make,
    Models,
    Written,
    make_fixture,
    models_fixture,
)

from actors.engine.adapters import Adapter, header_of, weights_digest
from actors.vllm.weights import label_of
from common import metrics
from learner.lora import factors_of, targets_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(kind: str, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(kind, models.folder, tmp_path_factory.mktemp("server") / "log", *SERVER) as found:
        yield found


def label(server: Server) -> str:
    return str(server.get("/weight_info").json()["weight_version"])


def write_a_little(server: Server, written: Written, tokens: int) -> None:
    """Have a server write more than so many tokens and not all, however slow this process is: it is paused then."""
    server.pause()
    before = server.generated()
    written.take(written.writer.step())  # asks for chunks
    while server.generated() - before <= tokens:
        server.resume()
        server.pause()


# --- what is written -----------------------------------------------------------------------------------------------


def test_rollouts_are_written_in_chunks_and_counted_to_the_token(server: Server, make: Make, models: Models) -> None:
    written = make(server)
    before = server.generated()
    written.add("a", "b", "c", length=42)
    written.add("long", length=100, unwatched=80)
    assert (written.writer.slots, written.writer.free, written.writer.busy) == (8, 4, ("a", "b", "c", "long"))
    written.finish()
    for more in range(40):  # servers draw differently: until one has not ended by itself
        if any(chunk.finish == "length" for chunks in written.chunks.values() for chunk in chunks):
            break
        written.add(f"more {more}", seed=100 + more, length=42)
        written.finish()
    assert written.writer.decoded_tokens == server.generated() - before
    assert written.writer.decoded_tokens == sum(len(written.tokens(key)) for key in written.chunks)
    for key, chunks in written.chunks.items():
        lengths = [len(chunk.tokens) for chunk in chunks]
        assert lengths[:-1] == ([64, 16, 8, 8][: len(lengths) - 1] if key == "long" else [CHUNK] * (len(lengths) - 1))
        assert [chunk.finish for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish == ("length" if len(written.tokens(key)) == (100 if key == "long" else 42) else "eos")
        assert models.worst(chunks) < 2e-3
        assert all(np.array_equal(chunk.sampled_logprobs, chunk.rollout_logprobs) for chunk in chunks)
    assert any(chunk.finish == "length" for chunks in written.chunks.values() for chunk in chunks)


def test_a_rollout_that_is_resumed_goes_on_with_the_same_draws(server: Server, make: Make) -> None:
    first = make(server)
    for seed in range((1 << 63) + 5, (1 << 63) + 45):  # servers draw differently: the first that is long enough
        key = f"{seed}"
        first.add(key, seed=seed, length=3 * CHUNK)
        first.finish()
        if len(first.chunks[key]) == 3:
            break
    again = make(server)
    known = first.chunks[key][0].tokens
    again.chunks[key] = [first.chunks[key][0]]
    again.writer.add(key, PROMPT, seed=seed, max_new_tokens=3 * CHUNK, generated=known)
    again.finish()
    assert again.tokens(key) == first.tokens(key)
    assert len(first.chunks[key]) == 3


def test_a_nucleus_is_sampled_and_its_mass_known(server: Server, make: Make, models: Models) -> None:
    written = make(server, top_p=0.5)
    written.add("a", "b")
    written.finish()
    for key in written.chunks:
        text = [*PROMPT.tolist(), *written.tokens(key)]
        rows = np.exp(models.logprobs(1, text)[len(PROMPT) - 1 : -1])
        sampled = np.concatenate([chunk.sampled_logprobs for chunk in written.chunks[key]])
        for row, token, logprob in zip(rows, written.tokens(key), sampled, strict=True):
            order = np.argsort(-row)
            nucleus = order[: int(np.searchsorted(np.cumsum(row[order]), 0.5)) + 1]
            assert token in nucleus or row[token] == pytest.approx(row[nucleus[-1]], rel=1e-3)
            expected = row[token] / row[nucleus].sum()
            found = float(np.exp(logprob))
            # Where the list ends before the nucleus, its mass is taken as top_p.
            assert expected * 0.999 <= found <= expected * (1 + row[order[9]] / 0.5) * 1.001


def test_a_held_rollout_gets_no_further_than_its_chunk(server: Server, make: Make) -> None:
    written = make(server)
    written.add("a")
    written.step_until(lambda: bool(written.chunks["a"]))
    written.writer.hold("a")
    before = server.generated()
    for _ in range(20):
        assert written.writer.step() == []
    assert server.generated() == before
    written.writer.release("a")
    written.finish()
    with pytest.raises(KeyError):
        written.writer.hold("a")


def test_what_a_stopped_rollout_had_written_counts(server: Server, make: Make) -> None:
    written = make(server)
    before = server.generated()
    written.add("a", "b", length=100, unwatched=100)
    write_a_little(server, written, 4)
    counts = [written.writer.remove(key) for key in ("a", "b")]
    server.resume()
    assert written.writer.busy == ()
    time.sleep(0.2)
    assert sum(counts) == server.generated() - before == written.writer.decoded_tokens
    with pytest.raises(KeyError):
        written.writer.remove("a")


def test_closing_chunks_takes_what_is_written_so_far(server: Server, make: Make, models: Models) -> None:
    written = make(server)
    before = server.generated()
    written.add("a", "b", length=100, unwatched=100)
    write_a_little(server, written, 4)
    closed = written.take(written.writer.close_chunks())
    server.resume()
    assert {chunk.key for chunk in closed} <= {"a", "b"} and closed
    assert server.generated() - before == sum(len(chunk.tokens) for chunk in closed)
    assert written.writer.close_chunks() == []
    written.finish()
    assert server.generated() - before == sum(len(written.tokens(key)) for key in ("a", "b"))
    assert max(map(models.worst, written.chunks.values())) < 2e-3


def test_what_cannot_be_written_is_refused(server: Server, make: Make, models: Models) -> None:
    writer = make(server).writer
    size = models.outcomes().vocab_size
    for prompt, length, words in (
        (PROMPT[:0], 10, "at least 1"),
        (PROMPT, LENGTH, "do not fit"),
        (np.array([size], np.int32), 10, "outside the vocabulary"),
        (np.array([-1], np.int32), 10, "outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=words):
            writer.add("a", prompt, seed=1, max_new_tokens=length)
    writer.add("a", PROMPT, seed=1, max_new_tokens=10)
    with pytest.raises(ValueError, match="already"):
        writer.add("a", PROMPT, seed=1, max_new_tokens=10)
    for place in range(7):
        writer.add(f"b{place}", PROMPT, seed=1, max_new_tokens=10)
    with pytest.raises(RuntimeError, match="no free slot"):
        writer.add("c", PROMPT, seed=1, max_new_tokens=10)


def test_workers_go_round_servers_by_their_numbers(server: Server, make: Make, models: Models, tmp_path: Path) -> None:
    with serving("standin", models.folder, tmp_path / "log", *SERVER) as other:
        urls = [server.url, other.url]
        before = [one.generated() for one in (server, other)]
        for number in (1, 3):
            written = make(None, urls=urls, number=number)
            written.add("a", length=16)
            written.finish()
        assert server.generated() == before[0] and other.generated() > before[1]
        for number in (0, 2):
            assert make(None, urls=urls, number=number).writer.slots == 8
        assert label(server) == label(other)


# --- weights -------------------------------------------------------------------------------------------------------


def test_a_swap_while_another_worker_writes_splits_its_chunk(server: Server, make: Make, models: Models) -> None:
    one, other = make(server, version=2), make(server, version=2)
    before = server.generated()
    other.add(*"abcdefgh", length=110, unwatched=110)  # some of them are long
    write_a_little(server, other, 10)  # the swap goes on from there
    one.writer.swap(one.writer.read_weights(models.published[3]), 3)
    assert label(server).startswith(f"katana:{RUN}:3:")
    other.finish()
    assert server.generated() - before == sum(len(other.tokens(key)) for key in other.chunks)
    versions = {key: [chunk.version for chunk in chunks] for key, chunks in other.chunks.items()}
    assert any({2, 3} == {*found} for found in versions.values()), versions
    apart = []
    for key, chunks in other.chunks.items():
        assert versions[key] == sorted(versions[key])  # type: ignore[type-var]
        text = [*PROMPT.tolist(), *other.tokens(key)]
        for chunk in chunks:
            # The first token after a swap is drawn from what the former weights had read of the text before it.
            if chunk.version == 2:
                assert models.difference(text, chunk) < 2e-3
            else:
                rows = models.logprobs(2, text)[len(PROMPT) + chunk.start - 1 :][: len(chunk.tokens)]
                apart += [np.abs(rows[np.arange(len(rows)), chunk.tokens] - chunk.rollout_logprobs).max()]
    assert np.median(apart) > 1e-2
    other.writer.swap(other.writer.read_weights(models.published[3]), 3)  # which the server has
    assert label(server).startswith(f"katana:{RUN}:3:")


def test_older_weights_do_not_replace_newer_ones_of_the_run_but_those_of_another(
    server: Server, make: Make, models: Models
) -> None:
    new = make(server, version=4)
    had = label(server)
    make(server, version=1)
    assert label(server) == had
    make(server, version=1, run="run-2")
    assert label(server).startswith("katana:run-2:1:")
    new.add("a", length=16)
    refused = metrics.vllm_tokens_refused._value.get()
    new.finish()
    assert metrics.vllm_tokens_refused._value.get() > refused
    assert label(server) == had
    assert [chunk.version for chunk in new.chunks["a"]] == [4] * len(new.chunks["a"])
    assert models.worst(new.chunks["a"]) < 2e-3


def test_nothing_is_read_that_weights_of_another_run_have_cached(server: Server, make: Make, models: Models) -> None:
    """Texts longer than a block of the cache (32 tokens on a CPU), computed by another run's weights first: vLLM
    empties its cache at a pause."""
    mine = make(server, version=4)
    make(server, version=1, run="run-2")
    rng = np.random.default_rng(0)
    prompts = {f"long-{place}": rng.integers(4, 30, 40).astype(np.int32) for place in range(4)}
    for key, prompt in prompts.items():
        mine.chunks[key] = []
        mine.writer.add(key, prompt, seed=0, max_new_tokens=30)
    refused = metrics.vllm_tokens_refused._value.get()
    mine.finish()
    assert metrics.vllm_tokens_refused._value.get() > refused
    for key, prompt in prompts.items():
        written = mine.tokens(key)
        rows = models.logprobs(4, [*prompt.tolist(), *written])[len(prompt) - 1 : -1]
        said = np.concatenate([chunk.rollout_logprobs for chunk in mine.chunks[key]])
        assert np.abs(rows[np.arange(len(written)), written] - said).max() < 2e-3


def test_a_swap_that_was_interrupted_is_made_again(server: Server, make: Make, models: Models) -> None:
    """A worker that died has left a paused server, with weights that no label vouches for."""
    written = make(server, version=4)
    written.add("a", length=30)
    server.pause()
    server.post("/update_weight_version", {"new_version": f"katana:loading:{RUN}:0123456789ab"})
    late = make(server, version=4)
    assert label(server).startswith(f"katana:{RUN}:4:")
    assert server.get("/is_paused").json() == {"is_paused": False}
    written.finish()
    late.add("b", length=10)
    late.finish()
    server.pause()  # this one died between label and resume
    make(server, version=4)
    assert server.get("/is_paused").json() == {"is_paused": False}


def test_who_has_lost_the_lock_changes_nothing(server: Server, models: Models, make: Make, tmp_path: Path) -> None:
    written = make(server, version=4)
    had = label(server)
    assert written.writer._shared is not None
    locks: Any = written.writer._shared.exclusively
    locks.lost = True
    written.writer.swap(written.writer.read_weights(models.published[1]), 5)
    locks.lost = False
    assert label(server) == had
    written.add("a", length=10)
    server.resume()  # as the worker that has the lock does in the end
    written.finish()
    assert label(server).startswith(f"katana:{RUN}:5:")


def test_the_weights_on_the_shared_disk_are_those_that_the_server_has(
    server: Server, make: Make, models: Models, tmp_path: Path
) -> None:
    written = make(server, version=4)
    for version in (7, 8):
        weights = written.writer.read_weights(models.published[version - 6])
        written.writer.swap(weights, version)
    assert label(server) == label_of(RUN, 8, weights)
    (folder,) = (tmp_path / "weights" / "vllm").iterdir()
    (held,) = folder.iterdir()
    assert (held / "model.safetensors").read_bytes() == models.published[2]


def test_an_adapter_is_merged_for_the_server_to_what_peft_makes_of_it(
    server: Server, make: Make, models: Models, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    plain = AutoModelForCausalLM.from_pretrained(models.folder, dtype=torch.float32)
    names = targets_of(plain, "all-linear")
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=12, target_modules=names))
    torch.manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    inner = theirs.base_model.model
    adapter = Adapter(weights_digest(models.folder), 12 / 4, factors_of(inner))
    assert len(adapter.factors) == len(names) > 10
    written = make(server)
    weights = written.writer.read_weights(save(adapter.tensors(), header_of(adapter.base, adapter.scaling)))
    written.writer.swap(weights, 9)
    assert label(server) == label_of(RUN, 9, weights)
    written.add("a", "b")
    written.finish()
    whole = {name: one.contiguous() for name, one in theirs.merge_and_unload().state_dict().items()}
    models.published[9] = save(whole)
    for chunks in written.chunks.values():
        assert {chunk.version for chunk in chunks} == {9}
        assert models.worst(chunks) < 2e-3
    models.published[9] = (models.folder / "model.safetensors").read_bytes()
    assert max(map(models.worst, written.chunks.values())) > 0.05  # without the adapter
    (folder,) = (tmp_path / "weights" / "vllm").iterdir()
    (held,) = folder.iterdir()
    assert load_file(held / "model.safetensors").keys() == whole.keys()


def test_weights_of_no_use_are_refused_before_the_server_is_touched(server: Server, make: Make, tmp_path: Path) -> None:
    writer = make(server, version=4).writer
    path = tmp_path / "adapter.safetensors"
    factors = {"a.left": torch.zeros(2, 1), "a.right": torch.zeros(1, 2)}
    save_file(factors, path, metadata=header_of("0" * 64, 1.0))
    with pytest.raises(ValueError, match="an adapter for the base 000000000000…, this worker holds"):
        writer.read_weights(path.read_bytes())
    with pytest.raises(ValueError, match=r"an adapter, but the config has no learner\.lora"):
        make(server, version=4, adapters=False).writer.read_weights(path.read_bytes())
    with pytest.raises(Exception, match=r"(?i)header"):
        writer.read_weights(b"not weights")
