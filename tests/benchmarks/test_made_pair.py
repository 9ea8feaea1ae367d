"""The made pair: it loads, `katana check` passes it, it never ends by itself, and a seed gives the same files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import made_pair
import numpy as np
import pytest
import torch
from made_pair import EOS_ID, IDS, make_pair

from actors.engine.loaded import Engines
from common.config import load
from common.files import sha256_of
from ops.run.check import check
from ops.tasks.source import TaskSource

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield make_pair(tmp_path_factory.mktemp("made"))


def test_the_check_passes_it(pair: Path) -> None:
    found = check(load(pair))
    assert not found.problems and not found.unchecked
    text = "\n".join(found.lines)
    assert "prompts.jsonl" in text


def test_its_sizes(pair: Path) -> None:
    engines = Engines(load(pair))
    assert (engines.pair.vocab_size, engines.pair.stop_ids) == (IDS, (EOS_ID,))
    sizes = [facts.parameters_bytes / 4e6 for facts in (engines.pair.student, engines.pair.teacher)]
    assert sizes == pytest.approx([10.2, 30.8], abs=0.1)  # millions of float32


def test_no_rollout_ends_by_itself(pair: Path) -> None:
    config = load(pair)
    decoder, source = Engines(config).decoder, TaskSource(config)
    for number in range(4):
        decoder.add(f"r{number}", source.prompt(number), seed=number, max_new_tokens=40)
    chunks = [chunk for _ in range(40) for chunk in decoder.step()]
    by_rollout = {key: [chunk for chunk in chunks if chunk.key == key] for key in ("r0", "r1", "r2", "r3")}
    for found in by_rollout.values():
        assert sum(len(chunk.tokens) for chunk in found) == 40
        assert found[-1].finish == "length"
    written = np.concatenate([chunk.tokens for chunk in chunks])
    assert len(np.unique(written)) > 100  # nor is it one word again and again


def test_a_seed_gives_the_same_files_and_another_one_others(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = made_pair.Shape(hidden_size=64, intermediate_size=64, layers=1)
    monkeypatch.setattr(made_pair, "STUDENT", small)
    monkeypatch.setattr(made_pair, "TEACHER", small)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    folders = [make_pair(tmp_path / name, seed=seed).parent for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("student/model.safetensors", "teacher/model.safetensors", "prompts.jsonl"):
        first, same, other = (sha256_of(folder / name) for folder in folders)
        assert first == same != other
    assert sha256_of(folders[0] / "student/model.safetensors") != sha256_of(folders[0] / "teacher/model.safetensors")


def test_bad_arguments_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for words, said in (([], "folder"), ([str(file)], "is a file"), ([str(tmp_path), "--seed", "-1"], "from 0")):
        with pytest.raises(SystemExit) as exit_:
            made_pair.main(words)
        assert exit_.value.code == 2
        assert said in capsys.readouterr().err
