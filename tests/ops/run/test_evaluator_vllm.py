"""The evaluator in front of a vLLM server of its own (the stand-in): the same scores as by the slots, and by no other
weights than those that are evaluated."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from samples import make_config
from vllm_servers import OPTIONS, Server, free_port, serving

from actors.engine.adapters import Adapter, header_of, weights_digest
from common.config import Config
from common.files import sha256_of
from common.pretrained import PACKAGE_ROOT, ModelError
from ops.cli.main import main
from ops.run import evaluator
from ops.run.evaluator import Evaluator, NotWritten, follow
from ops.tasks.source import TaskSource

STUDENT, TEACHER = (PACKAGE_ROOT / "ops" / "models" / name for name in ("student", "teacher"))
EVAL = {"every_steps": 1, "problems": 4, "k": 1, "temperature": 0.05, "top_p": 0.01}  # the likeliest token, always
LONGEST = 24 + 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = (*OPTIONS, "--max-model-len", str(LONGEST), "--max-logprobs", "16", "--max-num-seqs", "8")
    with serving("standin", STUDENT, tmp_path_factory.mktemp("eval") / "server.log", *options) as server:
        yield server


def config_of(folder: Path, url: str = "", *, patience_s: float = 60.0, **changes: Any) -> Config:
    by_server: dict[str, Any] = {"engine": "vllm", "vllm": {"urls": [url], "patience_s": patience_s}}
    return make_config(
        folder,
        student={"model": str(STUDENT)},
        teacher={"model": str(TEACHER)},
        data={"max_prompt_length": 24},
        rollout={"max_completion_length": 16},
        eval={**EVAL, **(by_server if url else {}), **changes},
    )


Judged = list[tuple[str, list[int]]]


@contextlib.contextmanager
def noted() -> Iterator[Judged]:
    """Everything that is judged inside."""
    judged: Judged = []
    judge = evaluator._judged

    def note(source: TaskSource, key: str, tokens: Any, ended: bool) -> Any:
        judged.append((key, tokens.tolist()))
        return judge(source, key, tokens, ended)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "_judged", note)
        yield judged


def texts_of(evaluator: Evaluator, weights: Path | None = None) -> Judged:
    """What an evaluation judges, in an order of its own."""
    if weights is not None:
        evaluator.swap((weights / "model.safetensors").read_bytes())
    with noted() as judged:
        assert evaluator.measure() is not None
    assert len(judged) == 4
    return sorted(judged)


def other_weights(folder: Path) -> Path:
    """Of a student that writes other texts."""
    tensors = load_file(STUDENT / "model.safetensors")
    folder.mkdir()
    save_file({name: one * 0.5 for name, one in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_a_server_and_the_slots_measure_the_same_of_a_model_and_of_published_weights(
    server: Server, tmp_path: Path
) -> None:
    slots, by_server = Evaluator(config_of(tmp_path)), Evaluator(config_of(tmp_path, server.url))
    own = texts_of(slots)
    assert texts_of(by_server) == own
    others = other_weights(tmp_path / "others")
    assert texts_of(by_server, others) == texts_of(slots, others) != own


@pytest.mark.slow
def test_a_server_and_the_slots_measure_the_same_of_an_adapter(server: Server, tmp_path: Path) -> None:
    torch.manual_seed(1)
    name = "model.layers.0.mlp.down_proj.weight"
    rows, columns = load_file(STUDENT / "model.safetensors")[name].shape
    adapter = Adapter(weights_digest(STUDENT), 2.0, {name: (torch.randn(rows, 4), torch.randn(4, columns))})
    data = save(adapter.tensors(), header_of(adapter.base, adapter.scaling))
    found = []
    for url in ("", server.url):
        config = make_config(tmp_path, **config_of(tmp_path, url).model_dump() | {"learner": {"lora": {"rank": 4}}})
        evaluator = Evaluator(config)
        own = texts_of(evaluator)
        evaluator.swap(data)
        found.append((own, texts_of(evaluator)))
    assert found[0] == found[1] and found[0][0] != found[0][1]


@pytest.mark.slow
def test_what_other_weights_wrote_is_not_judged(server: Server, tmp_path: Path) -> None:
    by_server, others = Evaluator(config_of(tmp_path, server.url)), other_weights(tmp_path / "others")
    server.swap(others, "default")  # as one that has been started again
    before = server.generated()
    found = texts_of(by_server)
    assert found == texts_of(Evaluator(config_of(tmp_path)))
    written = server.generated() - before
    assert written > sum(len(tokens) for _, tokens in found)  # and what was thrown away
    assert server.get("/weight_info").json()["weight_version"].startswith("katana:eval-test-")


@pytest.mark.slow
def test_every_version_is_evaluated_by_its_weights_also_one_that_comes_again(server: Server, tmp_path: Path) -> None:
    """After a crash of the learner, version 1 may be published once more, and be another one."""
    config, others = config_of(tmp_path, server.url), other_weights(tmp_path / "others")
    slots = Evaluator(config_of(tmp_path))
    expected = [texts_of(slots), texts_of(slots, others)]
    folder = config.run_dir / "eval"
    folder.mkdir(parents=True)

    def publish(step: int, weights: Path) -> None:
        file = folder / "v00000001.safetensors"
        file.write_bytes((weights / "model.safetensors").read_bytes())
        note = {"version": 1, "step": step, "tokens_trained": 5, "sha256": sha256_of(file)}
        (folder / "v00000001.json").write_text(json.dumps(note))

    publish(1, STUDENT)
    published = iter([others])

    def finished() -> bool:
        if not list(folder.glob("*.json")):
            for weights in published:
                publish(2, weights)
                return False
        return True

    with noted() as judged:
        follow(config, threading.Event(), finished)
    assert [sorted(judged[:4]), sorted(judged[4:])] == expected
    lines = [json.loads(line) for line in (config.run_dir / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert list(folder.iterdir()) == []  # no copy of weights stays


@pytest.mark.slow
def test_katana_eval_measures_a_model_by_a_server_that_serves_another(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(config_of(tmp_path).to_yaml())
    model = shutil.copytree(STUDENT, tmp_path / "finished")
    shutil.copy(other_weights(tmp_path / "others") / "model.safetensors", model)
    call = ["eval", str(config), "--model", str(model), "--k", "1"]
    found = []
    for engine in ([], ["--engine", "vllm", "--vllm-url", server.url]):
        assert main([*call, *engine]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and found[0]["model"] == str(model)


@pytest.mark.slow
def test_a_model_that_the_server_cannot_load_ends_katana_eval_with_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(config_of(tmp_path).to_yaml())
    model = shutil.copytree(STUDENT, tmp_path / "finished")
    (model / "model.safetensors").write_bytes(b"not weights")
    options = (*OPTIONS, "--max-model-len", str(LONGEST), "--max-logprobs", "16")
    with serving("standin", STUDENT, tmp_path / "server.log", *options) as server:
        call = ["eval", str(config), "--model", str(model), "--engine", "vllm", "--vllm-url", server.url]
        assert main(call) == 2
    told = capsys.readouterr().err
    assert f"eval.vllm: the server {server.url} did not load {model}, and ends itself for that" in told
    assert "read-only, under the same path" in told


@pytest.mark.slow
def test_a_server_that_does_not_come_back_ends_the_evaluation(tmp_path: Path) -> None:
    options = (*OPTIONS, "--max-model-len", str(LONGEST), "--max-logprobs", "16")
    with serving("standin", STUDENT, tmp_path / "server.log", *options) as server:
        by_server = Evaluator(config_of(tmp_path, server.url, patience_s=1.0))
        server.stop()
        with pytest.raises(NotWritten, match=r"^eval\.vllm: .*cannot be used"):
            by_server.measure()


@pytest.mark.slow
def test_a_server_that_cannot_write_is_refused_with_the_key(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^eval\.vllm.*--max-model-len {LONGEST + 1}"):
        Evaluator(
            make_config(tmp_path, **config_of(tmp_path, server.url).model_dump() | {"data": {"max_prompt_length": 25}})
        )
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ModelError, match=r"^eval\.vllm\.urls: no usable answer in 0\.5 s \(http.*ConnectError"):
        Evaluator(config_of(tmp_path, nobody, vllm={"urls": [nobody], "start_timeout_s": 0.5}))


def test_an_evaluator_has_one_server_and_not_that_of_the_rollouts(tmp_path: Path) -> None:
    urls = ["http://a:8000", "http://b:8000"]
    with pytest.raises(ValueError, match="names 2 servers; the evaluator uses one"):
        config_of(tmp_path, "http://a:8000", vllm={"urls": urls})
    with pytest.raises(ValueError, match=r"engine vllm needs vllm\.urls"):
        config_of(tmp_path, engine="vllm")
    rollout = {"rollout": {"engine": "vllm", "vllm": {"urls": urls}, "max_completion_length": 16}}
    tree = config_of(tmp_path, "http://b:8000").model_dump() | rollout
    with pytest.raises(ValueError, match=r"http://b:8000 is in rollout\.vllm\.urls too; the evaluator needs"):
        make_config(tmp_path, **tree)
    assert make_config(tmp_path, **tree | {"eval": {**tree["eval"], "every_steps": 0}}).eval.engine == "vllm"


def test_katana_eval_refuses_a_url_without_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(config_of(tmp_path).to_yaml())
    assert main(["eval", str(config), "--model", str(STUDENT), "--vllm-url", "http://a:8000"]) == 2
    assert "--vllm-url is the server of --engine vllm: give both" in capsys.readouterr().err
    assert main(["eval", str(config), "--model", str(STUDENT), "--engine", "vllm", "--vllm-url", "a:8000"]) == 2
    assert "'a:8000' is not the address of a server" in capsys.readouterr().err
    assert main(["eval", str(config), "--model", str(STUDENT), "--engine", "vllm"]) == 2
    told = capsys.readouterr().err
    assert f"eval.vllm of {config} names none: give --vllm-url http://host:port, or eval.vllm.urls" in told


def test_to_end_while_a_server_is_waited_for_is_no_failure(tmp_path: Path) -> None:
    from common.wire.plane import Stopping

    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopping):
        Evaluator(config_of(tmp_path, f"http://127.0.0.1:{free_port()}"), stop=stop)
