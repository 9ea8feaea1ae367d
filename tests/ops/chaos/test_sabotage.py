"""The sabotage that the checker must notice (tests/negative): it breaks what it should, only where it is asked to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ops.reach.embedded import EmbeddedRedis

ROOT = Path(__file__).parents[3]
PLAYED = """
import sys
from pathlib import Path
from samples import make_config, remove_run, script, start_run
from common.wire.connect import connect
run = start_run(connect(sys.argv[1]), make_config(Path(sys.argv[2]), redis={"shards": 1}))
rids = [f"r{number}" for number in range(1, 31)]
for rid in rids:
    run.admit(rid)
run.take(count=30)
for rid in rids:
    run.chunk(rid)
words = [run.chunk("r1", "stranger", seq=1, start=3)[0], run.beat("r1", "stranger")]
words += [run.plane.call(script("count", "r1", "stranger", 6))[0]]
run.plane.call(script("release", "w2", "r1", run.field("r1", "entry"), "stranger"))
print(*(word.decode() for word in words), run.field("r1", "owner"), run.client.xlen(run.key("chunks:0")))
remove_run(run)
"""
TRAINED = """
import sys, threading
from pathlib import Path
from samples import fenced, make_config, make_verdict, remove_run, start_run
from common.pretrained import PACKAGE_ROOT, Pair, read_facts
from common.wire.connect import connect
from learner.train import Learner
student = PACKAGE_ROOT / "ops" / "models" / "student"
run = start_run(connect(sys.argv[1]), make_config(
    Path(sys.argv[2]), student={"model": str(student)}, learner={"batch_size": 1, "max_steps": 4, "max_staleness": 8},
    checkpoints={"every_steps": 2}, eval={"every_steps": 0}))
for rid in ("r1", "r2", "r3"):
    run.admit(rid)
    run.take()
    run.chunk(rid, finish="eos", tokens=(2, 3, 4))
    run.score(rid)
    verdict = (rid, make_verdict(rid).encode(), 2, 0, "", 4, "inactive", "", *run.score_entries())
    run.lease("arbiter").call(fenced("verdict", *verdict))
def new():
    run.client.delete(run.key("lease:learner"))
    facts = read_facts(student)
    pair = Pair(facts, {"": facts}, facts.stop_ids, facts.vocab_size)
    learner = Learner(run.config, run.plane, pair, threading.Event())
    learner.open()
    learner.start()
    return learner
def show(learner):
    ended = [line["rid"] for line in run.entries("finished") if line["kind"] == "ending"]
    print(learner.step_count, *ended, flush=True)
first = new()
for _ in range(3):
    first.step(first.next_batch(block_s=0.01))
    show(first)
second = new()
show(second)
print(second.next_batch(block_s=0.01))
remove_run(run)
"""


def python(code: str, *arguments: str, sabotage: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter that tests/negative is on the path of."""
    environment = {name: value for name, value in os.environ.items() if name != "KATANA_SABOTAGE"}
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in (ROOT / "tests" / "negative", ROOT / "tests"))
    if sabotage is not None:
        environment["KATANA_SABOTAGE"] = sabotage
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)


@pytest.mark.parametrize(
    ("sabotage", "words"),
    [
        (None, "lost lost lost b'n1' 30"),
        ("trim", "lost lost lost b'n1' 20"),
        ("owner", "ok 0 ok None 31"),
        ("early_ack", "lost lost lost b'n1' 30"),
    ],
)
def test_sabotaged_scripts_do_what_they_should_not(
    embedded_redis: EmbeddedRedis, tmp_path: Path, sabotage: str | None, words: str
) -> None:
    """A stranger's chunk, heartbeat and count, who owns the rollout after his release, notices in the stream."""
    done = python(PLAYED, embedded_redis.url, str(tmp_path), sabotage=sabotage)
    assert done.stdout.strip() == words, done.stderr


@pytest.mark.slow
def test_a_sabotaged_learner_acknowledges_before_its_checkpoint(embedded_redis: EmbeddedRedis, tmp_path: Path) -> None:
    """Step, and what was acknowledged by then; the next learner goes on from the checkpoint and finds nothing left."""
    done = python(TRAINED, embedded_redis.url, str(tmp_path), sabotage="early_ack")
    assert done.stdout.splitlines() == ["1 r1", "2 r1 r2", "3 r1 r2 r3", "2 r1 r2 r3", "None"], done.stderr


@pytest.mark.parametrize(("sabotage", "words"), [(None, "None 7"), ("label", "7 7")])
def test_sabotaged_labels_are_everybody_s(sabotage: str | None, words: str) -> None:
    code = """
from actors.vllm.weights import version_in
from actors.vllm import writer
assert writer.version_in is version_in
print(version_in("katana:another:7:0123456789ab", "mine"), version_in("katana:mine:7:0123456789ab", "mine"))
"""
    done = python(code, sabotage=sabotage)
    assert done.stdout.strip() == words, done.stderr


def test_sabotage_that_no_longer_fits_is_refused() -> None:
    """An unknown name ends the interpreter, a script that was changed ends the import of whoever loads it."""
    done = python("print('started')", sabotage="owners")
    assert (done.returncode, done.stdout) == (1, "")
    assert "owner, early_ack, trim, label" in done.stderr
    changed = "import common.wire.plane as s, sitecustomize as c\nc._TRIM['chunk'] = ('XADD2', '')\ns._source('chunk')"
    done = python(changed, sabotage="trim")
    assert "'XADD2' is there 0 times" in done.stderr


def test_sabotage_imports_nothing_by_itself() -> None:
    done = python("import sys; print({'common', 'learner', 'torch', 'numpy'} & set(sys.modules))", sabotage="early_ack")
    assert done.stdout.strip() == "set()", done.stderr
