"""The plain loop that Katana's losses are held against: its divergence, a step of it, its arguments."""

from __future__ import annotations

from pathlib import Path

import plain_kl
import pytest
import torch

from common.pretrained import find_model


def test_directions() -> None:
    ours, theirs = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    reverse = plain_kl.divergence(ours, theirs, "reverse")
    forward = plain_kl.divergence(ours, theirs, "forward")
    torch.testing.assert_close(reverse, torch.tensor([0.143841, 0.0]))  # 0.5 ln 2 + 0.5 ln 2/3
    torch.testing.assert_close(forward, torch.tensor([0.130812, 0.0]))  # 0.25 ln 1/2 + 0.75 ln 3/2


def test_a_step_writes_a_student_that_loads(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    assert plain_kl.main(["forward", str(folder), "--steps", "1"]) == 0
    assert find_model(str(folder)) == folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sideways", "{}/new"], "invalid choice: 'sideways'"),
        (["forward", "{}"], "is there already; expected a new folder"),
        (["forward", "{}/new", "--learning-rate", "2"], "expected a number above 0 and below 1"),
    ],
)
def test_bad_arguments_exit_with_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        plain_kl.main([word.format(tmp_path) for word in words])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err
