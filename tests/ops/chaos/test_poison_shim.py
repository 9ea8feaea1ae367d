"""The shim that makes marked rollouts unusable strikes the product's own engines and learner, and them alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ops.chaos
from common.pretrained import PACKAGE_ROOT

pytestmark = pytest.mark.slow
SHIM = Path(ops.chaos.__file__).parent / "shim"
SCORE = """
import sys
import numpy as np
from pathlib import Path
from actors.engine.models import load_model
from actors.engine.score import Scorer
from actors.engine.scored import ScoreRequest
model = load_model(Path(sys.argv[2]), dtype="float32", device="cpu", vocab_size=37)
scorer = Scorer(model, slots=4, max_length=64, stop_ids=(1,), vocab_size=37, prefill_tokens=256)
tokens, support = np.array([5, 6, 7], np.int32), np.tile(np.arange(2, 6, dtype=np.int32), (3, 1))
for rids in (["r1", "r3"], ["r1", "r2"], ["r4", "r1"]):
    try:
        scorer.score([ScoreRequest(rid, tokens, 0, tokens, support) for rid in rids])
        print("scored")
    except FloatingPointError as error:
        scorer.discard(rids)
        print(error)
"""
WRITE = """
import sys
import numpy as np
from pathlib import Path
from actors.engine.decode import Decoder
from actors.engine.models import load_model
model = load_model(Path(sys.argv[1]), dtype="float32", device="cpu", vocab_size=37)
for alone in (False, True):
    decoder = Decoder(model, slots=4, max_length=64, stop_ids=(1,), vocab_size=37, teacher_top_k=4, chunk_tokens=8,
                      prefill_tokens=256, alone=alone)
    for rid in ("r1", "r2", "r3"):
        decoder.add(rid, np.array([5, 6, 7], np.int32), seed=1, max_new_tokens=50)
    for only in (["r1"], ["r2"], ["r1", "r2"], ["r1", "r3"]):
        try:
            decoder.step(only)
            decoder.step(only)
            print("written")
        except FloatingPointError as error:
            print(error)
"""
ANSWER = """
import asyncio
from actors.vllm.answers import BadAnswer
from actors.vllm.client import Client, TokenRequest
class Reply:
    is_success, content = True, b"{}"
    def json(self):
        listed = [{"token_id": 5, "logprob": -0.5, "rank": 1}]
        content = [{"token_id": 5, "logprob": -0.5, "rank": 1, "top_logprobs": listed}]
        spans = [{"version": "one", "start": 0, "end": 1}]
        return {"choices": [{"token_ids": [5], "finish_reason": "length", "weight_versions": spans,
                             "logprobs": {"content": content}}]}
class Http:
    async def request(self, *_, **__):
        return Reply()
    async def aclose(self): ...
client = Client("http://127.0.0.1:9", request_timeout_s=5)
client._http = Http()
for rid in ("r1", "r2", "r3"):
    request = TokenRequest(f"{rid}-4-abc", (5,), 1, 0, 1, (1,), 1.0, 1.0, "salt")
    try:
        print(client.generate(request, lambda _: None).result(5).tokens.tolist())
    except BadAnswer as error:
        print(error)
"""
STEP = """
from types import SimpleNamespace
import torch
from learner import gradients
from learner.head import WholeHead
class Model:
    def forward(self, input_ids): ...
    def __call__(self, **_): return SimpleNamespace(logits=torch.zeros(2, 3))
for rids in (("r1", "r3"), ("r1", "r2")):
    micro = SimpleNamespace(rids=rids, input_ids=None, logit_mask=None)
    print(bool(gradients.kept_rows(Model(), WholeHead(), micro).isfinite().all()))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The lines that SCORE, WRITE, STEP and ANSWER print: in one process, since half of the work is to import torch."""
    poison = tmp_path_factory.mktemp("poison")
    for what in ("score", "write", "step"):
        (poison / f"{what}-r2").touch()
    parts = [SCORE, WRITE, STEP, ANSWER]
    path = os.pathsep.join([str(SHIM), str(PACKAGE_ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "KATANA_CHAOS_POISON": str(poison)}
    models = [str(PACKAGE_ROOT / "ops" / "models" / name) for name in ("student", "teacher")]
    command = [sys.executable, "-c", "print('---')\n".join(parts), *models]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=True, timeout=200)
    return [part.splitlines() for part in done.stdout.split("---\n")]


def test_a_marked_rollout_cannot_be_scored_and_the_others_can(said: list[list[str]]) -> None:
    assert said[0] == ["scored", "r2: the teacher's logits are not finite", "scored"]


def test_a_marked_rollout_cannot_be_written_and_the_others_can(said: list[list[str]]) -> None:
    fails = "the student's logits are not finite"
    assert said[1] == ["written", fails, fails, "written"] * 2


def test_a_marked_rollout_cannot_be_trained_on_and_the_others_can(said: list[list[str]]) -> None:
    assert said[2] == ["True", "False"]


def test_a_server_s_answer_for_a_marked_rollout_is_of_no_use_and_others_are(said: list[list[str]]) -> None:
    fails = "the log-probability of the token 0, 5, is not a number, or was not given"
    assert said[3] == ["[5]", fails, "[5]"]
