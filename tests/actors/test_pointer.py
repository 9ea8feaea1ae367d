"""The policy pointer in Redis: it is read completely or refused with a reason, and ends no process."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from samples import Run, fenced

from actors.arbiter import Arbiter
from common.pretrained import PACKAGE_ROOT, Pair, read_facts
from common.wire.weights import BadWeights, WeightsRef, read_pointer
from ops.reach.embedded import EmbeddedRedis

GOOD = {"version": "3", "step": "30", "file": "v00000003.safetensors", "sha256": "aa"}


def test_a_pointer_names_weights_and_their_step() -> None:
    assert read_pointer(GOOD | {"covered": "28"}) == (WeightsRef(3, "v00000003.safetensors", "aa"), 30)


@pytest.mark.parametrize("pointer", [{}, {"step": "12"}, {"step": "12", "covered": "10"}])
def test_before_the_first_weights_nothing_is_announced(pointer: dict[str, str]) -> None:
    assert read_pointer(pointer) is None


@pytest.mark.parametrize("name", ["version", "step"])
@pytest.mark.parametrize("value", ["", "new", "-1", "1.0", " 1", "1_0", "\u0663", "9" * 16, "9" * 5000, "1\n"])
def test_a_value_that_is_not_a_number_is_refused(name: str, value: str) -> None:
    with pytest.raises(BadWeights, match=f"policy pointer: {name} .* is not a number"):
        read_pointer(GOOD | {name: value})


@pytest.mark.parametrize("name", ["step", "file", "sha256"])
def test_an_incomplete_pointer_is_refused(name: str) -> None:
    with pytest.raises(BadWeights, match=f"policy pointer: .*{name}"):
        read_pointer({key: value for key, value in GOOD.items() if key != name})


def test_the_arbiter_continues_with_the_last_version_that_it_could_read_and_warns_once(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run = start(embedded_redis)
    arbiter = Arbiter(run.config, run.plane, threading.Event())
    run.lease("learner").call(fenced("publish", 3, 30, "v00000003.safetensors", "aa"))
    arbiter.run(until_idle=True)
    run.client.hset(run.key("policy"), "version", "new")
    run.admit()
    run.take()
    run.chunk(finish="eos")
    run.score()
    arbiter.run(until_idle=True)
    assert arbiter.version == 3
    assert run.field("r1", "verdict") is not None
    assert [one.getMessage() for one in caplog.records if one.name == "katana.arbiter"] == [
        "ignored, continuing with version 3: policy pointer: version 'new' is not a number"
    ]


def test_the_learner_ignores_a_version_that_is_not_a_number(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    from learner.train import Learner

    student = PACKAGE_ROOT / "ops" / "models" / "student"
    run = start(embedded_redis, student={"model": str(student)})
    facts = read_facts(student)
    learner = Learner(
        run.config, run.plane, Pair(facts, {"": facts}, facts.stop_ids, facts.vocab_size), threading.Event()
    )
    assert learner.announced() == -1
    run.lease("learner").call(fenced("publish", 3, 30, "v00000003.safetensors", "aa"))
    assert learner.announced() == 3
    run.client.hset(run.key("policy"), "version", "new")
    assert learner.announced() == -1
    assert "policy pointer: version 'new' is not a number" in caplog.text
