"""What became of the rollouts of each of several teachers."""

from __future__ import annotations

from collections.abc import Sequence

from common.runfiles.records import BookLine, TeacherTotals


def by_teacher(lines: Sequence[BookLine]) -> dict[str, TeacherTotals]:
    """Figures of each teacher's booked rollouts, by its name; empty for a run with one teacher."""
    names = sorted({line.teacher for line in lines} - {""})
    return {name: totals([line for line in lines if line.teacher == name]) for name in names}


def totals(lines: Sequence[BookLine]) -> TeacherTotals:
    """Of rollouts, of which there is at least one."""
    verified = [line.correct for line in lines if line.correct is not None]
    cuttable = [line for line in lines if line.compared and line.arm == "treated"]
    return TeacherTotals(
        rollouts=len(lines),
        trained=sum(line.ending == "trained" for line in lines),
        tokens_generated=sum(line.tokens_generated for line in lines),
        tokens_trained=sum(line.tokens_trained for line in lines),
        mean_generated=sum(line.tokens_generated for line in lines) / len(lines),
        accuracy=sum(verified) / len(verified) if verified else None,
        cut_rate=sum(line.fired for line in cuttable) / len(cuttable) if cuttable else None,
    )
