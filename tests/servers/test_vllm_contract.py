"""What Katana relies on of a vLLM server, as tests: of the stand-in always, of the real one with `make test-vllm`.

A fact that only one of them shows is no fact: whatever the tests of Katana do with the stand-in holds with vLLM.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm_servers import KINDS, OPTIONS, Server, make_qwen3, serving, wait_until

from common.pretrained import read_facts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PROMPT = [5, 9, 12, 30, 7]
LONGEST, MOST_LOGPROBS = 256, 36
LONG = 230  # tokens of a request that is still open when something else happens
EOS = 1


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models(kind: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For the real server deep ones: a text of two layers is over before a pause or an abort comes."""
    folder, layers = tmp_path_factory.mktemp("models"), {"vllm": 32}.get(kind)
    return {name: make_qwen3(folder / name, seed, layers=layers) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def of_module(kind: str, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = (*OPTIONS, "--max-model-len", str(LONGEST), "--max-logprobs", str(MOST_LOGPROBS), "--max-num-seqs", "32")
    with serving(kind, models["a"], tmp_path_factory.mktemp(kind) / "server.log", *options) as server:
        yield server


@pytest.fixture
def server(of_module: Server, models: dict[str, Path]) -> Server:
    """It runs, with the weights of model a."""
    of_module.swap(models["a"], "a")
    return of_module


@torch.no_grad()
def logprobs_of(model: Path, text: list[int]) -> torch.Tensor:
    """What a plain forward says of every next token: float32 [tokens, vocabulary]."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: torch.Tensor = plain(input_ids=torch.tensor([text])).logits[0].log_softmax(dim=-1)
    return found


def check_logprobs(choice: dict[str, Any], model: Path, prompt: list[int]) -> None:
    """All that an answer says is within 1e-3 nats of a plain forward over its text."""
    wanted = logprobs_of(model, prompt + choice["token_ids"])[len(prompt) - 1 :]
    for row, content in zip(wanted, choice["logprobs"]["content"], strict=False):
        for entry in content["top_logprobs"]:
            assert entry["logprob"] == pytest.approx(float(row[entry["token_id"]]), abs=1e-3)


# --- an answer ---


def test_an_answer_has_the_tokens_their_logprobs_and_the_version_of_each(server: Server) -> None:
    response = server.ask(PROMPT, name="first", ignore_eos=True)
    assert response.status_code == 200
    answer = response.json()
    assert answer["request_id"] == "generate-tokens-first"
    (choice,) = answer["choices"]
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == 8
    assert choice["finish_reason"] == "length"
    assert choice["weight_versions"] == [{"version": "a", "start": 0, "end": 8}]
    server.answers.append(choice)


def test_a_list_begins_with_the_token_drawn_and_is_cut_at_what_was_asked(server: Server) -> None:
    choice = server.generate(PROMPT, max_tokens=60, logprobs=3, ignore_eos=True)
    outside = 0
    for token, content in zip(choice["token_ids"], choice["logprobs"]["content"], strict=True):
        first, *others = content["top_logprobs"]
        assert first["token_id"] == content["token_id"] == token
        assert first["logprob"] == content["logprob"]
        assert len(others) == 2
        ranks = [entry["rank"] for entry in others]
        assert ranks == [rank for rank in (1, 2, 3) if rank != first["rank"]][:2]
        assert others[0]["logprob"] >= others[1]["logprob"]
        assert token not in [entry["token_id"] for entry in others]
        outside += first["rank"] > 3
    assert outside > 5  # of random weights: the case is there


def test_without_logprobs_there_are_none(server: Server) -> None:
    assert server.generate(PROMPT, logprobs=None)["logprobs"] is None


@pytest.mark.parametrize("way", [{}, {"temperature": 0.5}, {"top_p": 0.3}, {"temperature": 1.7, "top_p": 0.8}])
def test_logprobs_are_those_of_a_plain_forward_at_temperature_1_over_the_whole_head(
    server: Server, models: dict[str, Path], way: dict[str, float]
) -> None:
    choice = server.generate(PROMPT, max_tokens=40, logprobs=MOST_LOGPROBS, ignore_eos=True, **way)
    check_logprobs(choice, models["a"], PROMPT)


def test_top_p_draws_from_the_smallest_prefix_that_reaches_it(server: Server, models: dict[str, Path]) -> None:
    choice = server.generate(PROMPT, max_tokens=60, top_p=0.3, ignore_eos=True)
    text = PROMPT + choice["token_ids"]
    wanted = logprobs_of(models["a"], text)[len(PROMPT) - 1 :]
    for token, row in zip(choice["token_ids"], wanted, strict=False):
        before = row.exp()[row > row[token] + 1e-4].sum()
        assert before < 0.3 + 1e-3


def test_greedy_takes_the_most_probable(server: Server) -> None:
    choice = server.generate(PROMPT, max_tokens=20, temperature=0.0, ignore_eos=True)
    assert [content["rank"] for content in choice["logprobs"]["content"]] == [1] * 20


def test_a_seed_makes_a_request_repeatable(server: Server) -> None:
    tokens = [server.generate(PROMPT, max_tokens=30, seed=seed)["token_ids"] for seed in (11, 11, 12, 2**63 - 1)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_a_text_goes_on_where_another_request_left_it(server: Server, models: dict[str, Path]) -> None:
    first = server.generate(PROMPT, max_tokens=40, ignore_eos=True, top={"cache_salt": "one"})["token_ids"]
    longer = PROMPT + first
    choice = server.generate(longer, logprobs=20, ignore_eos=True, top={"cache_salt": "one"})
    check_logprobs(choice, models["a"], longer)


def test_a_salt_changes_nothing_of_an_answer(server: Server) -> None:
    plain, *salted = (
        server.generate(PROMPT, max_tokens=20, top={} if salt is None else {"cache_salt": salt})
        for salt in (None, "katana:run:1", "katana:run:2")
    )
    assert all(choice["token_ids"] == plain["token_ids"] for choice in salted)


# --- how it ends ---


def test_a_stop_token_is_the_last_of_the_answer(server: Server) -> None:
    whole = server.generate(PROMPT, max_tokens=60, ignore_eos=True)["token_ids"]
    stop = next(token for token in whole[5:] if token != EOS)
    end = whole.index(stop) + 1
    choice = server.generate(PROMPT, max_tokens=60, stop_token_ids=[stop], ignore_eos=True)
    assert choice["token_ids"] == whole[:end]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["content"]) == end
    assert choice["weight_versions"] == [{"version": "a", "start": 0, "end": end}]


def test_the_models_own_end_stops_unless_it_is_ignored(server: Server, models: dict[str, Path]) -> None:
    assert read_facts(models["a"]).stop_ids == (EOS,)
    choices = [server.generate([EOS] * 6 + PROMPT, max_tokens=200, seed=seed) for seed in range(4)]
    ended = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert ended
    assert all(choice["token_ids"].index(EOS) == len(choice["token_ids"]) - 1 for choice in ended)


def test_an_answer_is_never_longer_than_the_model(server: Server) -> None:
    choice = server.generate([7] * (LONGEST - 3), max_tokens=10, ignore_eos=True)
    assert (len(choice["token_ids"]), choice["finish_reason"]) == (3, "length")


def test_an_aborted_request_answers_with_what_it_has(server: Server) -> None:
    with server.pending(PROMPT, name="cut", max_tokens=LONG) as found:
        server.abort("cut")
    (choice,) = found
    written = len(choice["token_ids"])
    assert choice["finish_reason"] == "abort"
    assert 0 < written < LONG
    assert len(choice["logprobs"]["content"]) == written
    assert choice["weight_versions"] == [{"version": "a", "start": 0, "end": written}]


def test_a_paused_server_aborts_too(server: Server) -> None:
    with server.pending(PROMPT, name="cut", max_tokens=LONG) as found:
        server.pause()
        server.abort("cut")
        wait_until(lambda: found)
        assert server.get("/is_paused").json() == {"is_paused": True}
    server.resume()
    assert found[0]["finish_reason"] == "abort"


def test_what_is_aborted_before_its_first_token_has_none(server: Server) -> None:
    server.pause()
    with server.pending(PROMPT, name="cut") as found:
        server.abort("cut")
    server.resume()
    (choice,) = found
    assert (choice["token_ids"], choice["weight_versions"], choice["finish_reason"]) == ([], [], "abort")
    assert choice["logprobs"] == {"content": []}


def test_to_abort_what_is_not_there_is_no_error(server: Server) -> None:
    server.abort("nobody")


def test_a_request_whose_connection_is_closed_is_aborted(server: Server) -> None:
    before = server.generated()
    body = {"request_id": "left", "token_ids": PROMPT}
    params = {"max_tokens": LONG, "ignore_eos": True, "seed": 1}
    with pytest.raises(httpx.ReadTimeout):
        path = f"{server.url}/inference/v1/generate"
        httpx.post(path, json=body | {"sampling_params": params}, timeout=httpx.Timeout(60, read=0.05))
    counts = [-1, server.generated()]
    while counts[-1] != counts[-2]:  # until nothing more is written
        time.sleep(0.5)
        counts.append(server.generated())
    assert counts[-1] - before < LONG
    server.answers.append({"token_ids": [0] * (counts[-1] - before)})  # no answer, and counted


# --- other weights ---


def test_a_server_that_has_just_started_calls_its_weights_default(of_module: Server) -> None:
    assert of_module.first_label == "default"


def test_a_paused_server_writes_nothing_and_keeps_what_is_open(server: Server) -> None:
    with server.pending(PROMPT, max_tokens=LONG) as found:
        server.pause()
        assert server.get("/is_paused").json() == {"is_paused": True}
        before = server.generated()
        time.sleep(0.5)
        assert server.generated() == before
        assert not found
        server.pause()  # once more is no error
        server.resume()
    assert len(found[0]["token_ids"]) == LONG
    server.resume()
    assert server.get("/is_paused").json() == {"is_paused": False}


def test_a_request_over_a_swap_has_two_versions_and_goes_on_with_the_new_weights(
    server: Server, models: dict[str, Path]
) -> None:
    with server.pending(PROMPT, max_tokens=LONG, logprobs=20) as found:
        server.swap(models["b"], "b")
    (choice,) = found
    first, second = choice["weight_versions"]
    assert (first["version"], first["start"]) == ("a", 0)
    assert (second["version"], second["start"], second["end"]) == ("b", first["end"], LONG)
    assert first["end"] > 0
    content = choice["logprobs"]["content"]
    before = {"token_ids": choice["token_ids"][: first["end"]], "logprobs": {"content": content[: first["end"]]}}
    check_logprobs(before, models["a"], PROMPT)
    # What it had read stays, so that what follows is neither model's own; it is far from that of the old.
    plain = logprobs_of(models["a"], PROMPT + choice["token_ids"])[len(PROMPT) - 1 :]
    places = range(first["end"], LONG)
    apart = [abs(content[at]["logprob"] - float(plain[at, choice["token_ids"][at]])) for at in places]
    assert sum(apart) / len(apart) > 0.05


def test_an_aborted_request_over_a_swap_has_two_versions(server: Server, models: dict[str, Path]) -> None:
    with server.pending(PROMPT, name="cut", max_tokens=LONG) as found:
        server.pause()
        assert server.reload(models["b"]).is_success
        assert server.post("/update_weight_version", {"new_version": "b"}).is_success
        before = server.generated()
        server.resume()
        wait_until(lambda: server.generated() > before)
        server.abort("cut")
    (choice,) = found
    assert choice["finish_reason"] == "abort"
    assert [span["version"] for span in choice["weight_versions"]] == ["a", "b"]
    assert choice["weight_versions"][-1]["end"] == len(choice["token_ids"])


def test_a_request_that_waited_over_a_swap_has_the_new_version_alone(server: Server, models: dict[str, Path]) -> None:
    server.pause()
    with server.pending(PROMPT) as found:
        server.swap(models["b"], "b")
    assert [span["version"] for span in found[0]["weight_versions"]] == ["b"]


def test_a_new_request_after_a_swap_reads_and_writes_with_the_new_weights(
    server: Server, models: dict[str, Path]
) -> None:
    long = PROMPT * 10
    for number, name in enumerate("aba"):  # the prompt is in the prefix cache, under the salt of each version
        server.swap(models[name], name)
        choice = server.generate(long, logprobs=20, ignore_eos=True, top={"cache_salt": f"version {number}"})
        check_logprobs(choice, models[name], long)
        assert choice["weight_versions"] == [{"version": name, "start": 0, "end": 8}]
        assert server.get("/weight_info").json() == {"weight_version": name}


def test_whether_a_folder_is_read_can_be_asked_without_harm(
    server: Server, models: dict[str, Path], tmp_path: Path
) -> None:
    """By a reload of single parameters, of a file without any: where it fails, the model is as it was."""
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights")
    (tmp_path / "bare").mkdir()
    with server.pending(PROMPT, max_tokens=LONG, logprobs=20) as found:
        for name, code in (("nowhere", 500), ("bare", 500), ("broken", 500), (".", 200)):
            assert server.reload(tmp_path / name, is_checkpoint_format=False).status_code == code
    (choice,) = found
    assert choice["weight_versions"] == [{"version": "a", "start": 0, "end": LONG}]
    check_logprobs(choice, models["a"], PROMPT)
    assert server.get("/is_paused").json() == {"is_paused": False}
    server.swap(models["b"], "b")
    check_logprobs(server.generate(PROMPT, logprobs=20, ignore_eos=True), models["b"], PROMPT)


def test_weights_that_are_not_numbers_come_as_the_floor_without_a_rank(
    server: Server, models: dict[str, Path], tmp_path: Path
) -> None:
    state = load_file(models["a"] / "model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in state.items()}, tmp_path / "model.safetensors")
    server.swap(tmp_path, "poison")
    content = server.generate(PROMPT, ignore_eos=True)["logprobs"]["content"]
    assert [(one["logprob"], one["rank"]) for one in content] == [(-9999.0, None)] * 8
    # What is not a number stays where vLLM cached it, and reaches requests that are given its place, if only few.
    server.swap(models["a"], "a")
    for number in range(40):
        choice = server.generate([*PROMPT, number % 30 + 2], ignore_eos=True)
    check_logprobs(choice, models["a"], [*PROMPT, number % 30 + 2])


# --- what it counts, what it refuses, what it says of itself ---


def test_the_servers_count_is_that_of_all_answers(server: Server) -> None:
    """The last of the tests that write: aborted answers, two versions and all."""
    written = sum(len(choice["token_ids"]) for choice in server.answers)
    assert written > 1000
    assert server.generated() == written


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        (
            PROMPT,
            {"logprobs": MOST_LOGPROBS + 1},
            f"Requested sample logprobs of {MOST_LOGPROBS + 1}, which is greater",
        ),
        ([5, 37], {}, "Token id 37 is out of vocabulary"),
        ([5, 400, 6], {}, "Token id 400 is out of vocabulary"),
        ([7] * LONGEST, {}, f"The decoder prompt (length {LONGEST})"),
        ([7] * (LONGEST + 9), {}, f"is longer than the maximum model length of {LONGEST}"),
        # The length is looked at first, so no id that is not there can be asked for without a token written.
        ([37] * LONGEST, {}, f"is longer than the maximum model length of {LONGEST}"),
        # But this names the size of the vocabulary, and writes nothing.
        (PROMPT, {"stop_token_ids": [2**31 - 1]}, "Vocabulary size: 37"),
        (PROMPT, {"stop_token_ids": [37]}, "Vocabulary size: 37"),
        ([], {}, ""),
        ([5, -1], {}, ""),
        (PROMPT, {"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
        (PROMPT, {"temperature": -1.0}, "temperature must be non-negative, got -1.0."),
        (PROMPT, {"top_p": 0.0}, "top_p must be in (0, 1], got 0.0."),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    server: Server, prompt: list[int], given: dict[str, Any], message: str
) -> None:
    response = server.ask(prompt, **given)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == 400
    assert message in error["message"]


def test_the_largest_id_of_the_vocabulary_is_taken(server: Server, models: dict[str, Path]) -> None:
    assert server.ask([read_facts(models["a"]).vocab_size - 1]).status_code == 200


def test_a_server_says_what_it_was_started_with(server: Server, kind: str, models: dict[str, Path]) -> None:
    config = server.get("/server_info?config_format=json").json()["vllm_config"]
    model, cache = config["model_config"], config["cache_config"]
    assert model["model"] == str(models["a"])
    assert model["dtype"] == "torch.float32"
    assert (model["max_model_len"], model["max_logprobs"]) == (LONGEST, MOST_LOGPROBS)
    assert model["logprobs_mode"] == "raw_logprobs"
    assert config["scheduler_config"]["max_num_seqs"] == 32
    assert (cache["block_size"], cache["enable_prefix_caching"]) == (32, True)
    assert config["device_config"]["device"] == {"standin": "cuda", "vllm": "cpu"}[kind]
    (served,) = server.get("/v1/models").json()["data"]
    assert (served["root"], served["max_model_len"]) == (str(models["a"]), LONGEST)


# --- servers of their own, and how they end ---


def check_its_end(server: Server, **given: Any) -> None:
    """The next token fails: what is pending is answered 500 or not at all, and the process ends by itself."""
    with contextlib.suppress(httpx.TransportError):
        assert server.ask(PROMPT, **given).status_code == 500
    server.process.wait(60)


def test_a_reload_that_fails_ends_the_server_at_the_next_token(
    server: Server, models: dict[str, Path], tmp_path: Path
) -> None:
    """The last of the server that all of these tests share."""
    whole = (models["a"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused = server.reload(tmp_path)
    assert refused.status_code == 500
    assert refused.json()["error"]["code"] == 500
    assert server.process.poll() is None
    check_its_end(server)


def test_routes_that_were_not_opened_are_closed(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    closed = {"VLLM_SERVER_DEV_MODE": "0"}
    options = ("--dtype", "float32", "--max-model-len", str(LONGEST))
    with serving(kind, models["a"], tmp_path / "server.log", *options, **closed) as server:
        refused = server.ask(PROMPT)
        assert refused.status_code == 403
        assert "--enable-scale-out" in refused.json()["error"]["message"]
        assert server.post("/inference/v1/abort_requests", {"request_ids": ["x"]}).status_code == 403
        for path in ("/weight_info", "/is_paused", "/server_info"):
            assert server.get(path).status_code == 404
        for path in ("/pause", "/resume", "/collective_rpc", "/update_weight_version"):
            assert server.post(path, {}).status_code == 404
        assert server.get("/v1/models").status_code == server.get("/health").status_code == 200


def test_more_logprobs_than_the_vocabulary_has_end_the_server(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    options = (*OPTIONS, "--max-model-len", str(LONGEST), "--max-logprobs", "64")
    with serving(kind, models["a"], tmp_path / "server.log", *options) as server:
        vocabulary = read_facts(models["a"]).vocab_size
        assert server.ask(PROMPT, logprobs=vocabulary).status_code == 200
        check_its_end(server, logprobs=vocabulary + 1)
