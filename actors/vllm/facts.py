"""What a server must be to write a run; what is wrong is said with the option that mends it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from actors.vllm.answers import BadAnswer
from actors.vllm.chunks import Outcomes
from actors.vllm.client import Client, RequestRefused, ServerDown, ServerFailed
from common.pretrained import ModelError, ModelFacts, weight_files

_DEV = "start it with VLLM_SERVER_DEV_MODE=1 in its environment, and where only the run's machines reach it"

_NO_TOKEN = 2**31 - 1
_SIZE = re.compile(r"[Vv]ocabulary size: ([0-9]+)")
_INFO_S = 60.0  # it looks at its machine first
_SHAPE = (
    *("architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size"),
)


def check_server(
    client: Client, student: ModelFacts, outcomes: Outcomes, max_length: int, *, section: str = "rollout.vllm"
) -> int:
    """How many rollouts the server writes at a time. `student`: whose weights it is to have; `section`: of the config,
    for errors. Raises ModelError for a server that cannot write this run, and ServerDown."""
    try:
        return _check(client, student, outcomes, max_length)
    except ModelError as error:
        raise ModelError(f"{section}: {error}") from error


def _check(client: Client, student: ModelFacts, outcomes: Outcomes, max_length: int) -> int:
    try:
        config = _config(client)
        _check_options(client.url, config, outcomes, max_length)
        _check_model(client.url, config, student)
        _check_head(client.url, config, student)
        _check_vocabulary(client, student, outcomes.head_size)
        return int(config["scheduler_config"]["max_num_seqs"])
    except (ServerFailed, RequestRefused, BadAnswer) as error:
        raise ModelError(f"{error}") from error
    except ModelError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise ModelError(f"{client.url} is not a vLLM server that Katana knows: {error!r}") from error


def _config(client: Client) -> Any:
    try:
        client.label()
        return client.get("/server_info?config_format=json", timeout_s=_INFO_S)["vllm_config"]
    except ServerDown as error:
        if ": 404 " in str(error):
            raise ModelError(f"{error}: it has not the routes that swap weights; {_DEV}") from error
        raise


def _check_options(url: str, config: Any, outcomes: Outcomes, max_length: int) -> None:
    model, cache = config["model_config"], config["cache_config"]
    most = model["max_logprobs"]
    wrong = []
    if 0 <= most < outcomes.asked:
        wrong.append(f"lists at most {most} tokens, {outcomes.asked} are needed: --max-logprobs {outcomes.asked}")
    if model["logprobs_mode"] != "raw_logprobs":
        wrong.append(f"has logprobs_mode {model['logprobs_mode']}: --logprobs-mode raw_logprobs")
    if model["max_model_len"] < max_length:
        wrong.append(
            f"takes {model['max_model_len']} tokens, data.max_prompt_length + rollout.max_completion_length are "
            f"{max_length}: --max-model-len {max_length}"
        )
    if not cache["enable_prefix_caching"]:
        wrong.append("caches no prefixes, so every chunk would read its whole text again: --enable-prefix-caching")
    if wrong:
        raise ModelError(f"the server {url} " + "; it ".join(wrong))


def _check_model(url: str, config: Any, student: ModelFacts) -> None:
    """By what its folder says, where that can be read here: a server elsewhere may have the model in another place."""
    named = Path(str(config["model_config"]["model"]))
    theirs, ours = _model_config(named), _model_config(student.folder)
    for name in _SHAPE if theirs is not None and ours is not None else ():
        if theirs.get(name) != ours.get(name):
            raise ModelError(
                f"the server {url} has the model {named}, whose {name} is {theirs.get(name)}; "
                f"{student.folder} has {ours.get(name)}: start it with --model {student.folder}"
            )


def _check_head(url: str, config: Any, student: ModelFacts) -> None:
    """On a CPU vLLM (0.32) packs the output head when it starts, and a reload leaves a tied one as it was: the server
    would write with the new body and the old head, under the new label (DECISIONS.md, 137)."""
    if config.get("device_config", {}).get("device") == "cpu" and _is_tied(student.folder):
        raise ModelError(
            f"the server {url} computes on a CPU, where vLLM does not swap an output head that is tied "
            f"to the embedding, as that of {student.folder} is; allowed: a model whose head is not tied, or a GPU"
        )


def _is_tied(folder: Path) -> bool:
    """Whether the head has no tensor of its own."""
    names: set[str] = set()
    for path in weight_files(folder):
        with safe_open(path, framework="np") as tensors:
            names.update(tensors.keys())
    return not any(name.endswith("lm_head.weight") for name in names)


def _model_config(folder: Path) -> Any:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _check_vocabulary(client: Client, student: ModelFacts, head_size: int) -> None:
    """By what the server says of a stop id that no model has: it refuses that with its number of ids."""
    body = {
        "request_id": "vocabulary",
        "token_ids": [0],
        "sampling_params": {"max_tokens": 1, "stop_token_ids": [_NO_TOKEN], "detokenize": False},
        "stream": False,
    }
    try:
        client.post("/inference/v1/generate", body, timeout_s=_INFO_S)
    except RequestRefused as error:
        found = _SIZE.search(str(error))
        if found and int(found[1]) != head_size:
            raise ModelError(
                f"the server {client.url} has a vocabulary of {found[1]}, that of {student.folder} is {head_size}: "
                f"it has another model"
            ) from None
    except ServerDown as error:
        if any(code in str(error) for code in (": 403 ", ": 404 ", ": 405 ")):
            raise ModelError(f"{error}: start the server with --enable-scale-out") from error
        raise
