"""`katana audit`: could the cut prefixes have recovered? Each is continued, and the results are judged.

In a trap the student can no longer reach a right answer. From each cut on record, applied or
not, `samples` continuations are drawn, as the run drew its rollouts, and the task's verifier judges prefix and
continuation as one completion:

    keep            by the student, from the first `keep` tokens
    keep_teacher    by the teacher, from the same: whether the prefix itself is lost, or this student in it
    trigger         by the student, from all tokens written when the policy fired: what stopping prevented
    whole           the actual continuation, if nothing stopped it (control arm, mask, shadow)

These chances mean nothing by themselves: prompts are more or less hard, and late prefixes hold more errors than early
ones. So each cut has a reference, the chances from an *uncut* prefix of the same length:

    uncut_keep, uncut_trigger    by the student, from the first `keep` and the first `trigger` tokens of a rollout that
                                 the policy could have cut, that was still going at `trigger` tokens and not cut by then

This rollout may have been cut later: taking only those that never were would compare cuts with rollouts selected
by their future. The nearest is taken: of the same prompt where there is one
(`data.num_generations`), then by policy version; arms are alike until something is stopped, and come last. Each serves
once, as long as there are any. A policy that cuts everything at one length (`fixed`) leaves none. If prompts are not
shared, a difference may also come from the prompts: a policy may fire on the hard ones. In the rows of a class the cuts
are of that class, and their references of any.

Limitation: the weights that wrote a rollout are gone. One student, the run's last, continues all prefixes, cut or not;
`whole` is by the student of its time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from common.config import ConfigError
from common.files import write_text
from common.pretrained import Pair, check_pair
from common.runfiles.names import AUDITS
from common.wire.messages import Ints
from ops.audit.chances import SOURCES, Audited, rows_of
from ops.audit.cuts import Reader, Recorded, answer_tokens, chosen, class_of, matched, read_records, read_tokens
from ops.audit.plot import DOTS_PER_INCH, draw
from ops.audit.sampling import Continuer, Prefix, SamplingProgress, continue_all, find_student, make_decoder
from ops.audit.table import AuditResult, csv_of, markdown_of, text_of, tree_of
from ops.plots import named, save_png
from ops.report.run import ReportRun, read_run
from ops.tasks.source import TaskSource
from ops.words import teachers_text

_BY_TEACHER = "keep_teacher"
_Key = tuple[str, str]  # source, and the rollout that was cut


def audit(folder: Path, *, samples: int = 8, rollouts: int = 200, student: str | None = None, seed: int = 0) -> str:
    """Audit a run's cuts, at most `rollouts` of them, and write RUN/audit/; returns what is to be printed.

    Same folder, models and seed: same files. Nothing is written before all is known. `student`: a folder or hub id.
    Raises ConfigError, ModelError.
    """
    run = read_run(folder)
    records = _records(run)
    fired = [one for one in records if one.fired]
    if not fired:
        raise ConfigError(_without_cuts(run, len(records)))
    pair = check_pair(run.config)
    writer = find_student(folder, pair, student)
    source = TaskSource(run.config)
    source.prepare()
    cuts = chosen(fired, rollouts, seed)
    uncut = matched(cuts, records, seed)
    found = _Auditor(run, source, pair, samples, seed).look(cuts, uncut, writer)
    done = _audit_of(run, writer, samples, seed, len(fired), found)
    _write(folder / AUDITS, done)
    return f"{text_of(done)}\n\n{folder / AUDITS}: audit.md, audit.csv, audit.json, audit.png"


def _records(run: ReportRun) -> list[Recorded]:
    """Raises ConfigError where there is nothing that could be continued, or nobody to judge it."""
    data, folder = run.config.data, run.folder.path
    if data.task == "dataset" and data.verifier == "none":
        raise ConfigError(f"{folder}: data.verifier is none, so nobody can judge continuations; allowed: any other")
    if not run.folder.traces.path.is_file():
        why = "it is on: has anything ended yet?" if run.config.feeder.record_traces else "it was off in this run"
        raise ConfigError(f"{folder}: no traces.jsonl, which feeder.record_traces makes ({why})")
    return read_records(run.folder, run.lines)


def _without_cuts(run: ReportRun, records: int) -> str:
    policy = run.config.termination.policy
    advice = "; with another policy and termination.shadow: true a run has cuts on record and cuts nothing"
    text = f"{run.folder.path}: no cut on record in {records} rollouts (policy {policy}), so there is nothing to audit"
    return text + (advice if policy == "none" else "")


class _Auditor:
    """Continues prefixes of cut and of uncut rollouts."""

    def __init__(self, run: ReportRun, source: TaskSource, pair: Pair, samples: int, seed: int) -> None:
        self._config, self._source, self._pair = run.config, source, pair
        self._folder = run.folder
        self._samples, self._seed = samples, seed

    def look(self, cuts: Sequence[Recorded], uncut: Sequence[Recorded | None], student: Continuer) -> list[Audited]:
        """Every cut with its class, what it is compared with, and its chances."""
        tokens = read_tokens(self._folder, {one.rid for one in [*cuts, *uncut] if one is not None})
        prefixes = _prefixes(cuts, uncut, tokens)
        right = self._continued(prefixes, student)
        return [self._audited(cut, other, tokens[cut.rid], right) for cut, other in zip(cuts, uncut, strict=True)]

    def _audited(
        self, cut: Recorded, uncut: Recorded | None, tokens: Ints, right: Mapping[_Key, float | None]
    ) -> Audited:
        source = self._source
        reader = Reader(source.text, partial(source.judge, cut.problem), partial(source.answer_end, cut.problem))
        answer = answer_tokens(tokens, cut.keep, reader)
        kind = class_of(tokens, cut.keep, cut.trigger, answer)
        shares = {source: right.get((source, cut.rid)) for source in SOURCES}
        shares["whole"] = None if cut.whole is None else float(cut.whole)
        return Audited(cut, kind, answer, uncut, shares)

    def _continued(self, prefixes: Mapping[_Key, Prefix], student: Continuer) -> dict[_Key, float | None]:
        """The share of right continuations of each prefix. One model in memory at a time."""
        config, progress = self._config, SamplingProgress(len(prefixes) * self._samples)
        right: dict[_Key, float | None] = {}
        by_teacher = {key: self._source.teacher(one.problem) for key, one in prefixes.items() if key[0] == _BY_TEACHER}
        jobs = [(student, config.rollout.dtype, config.eval.device, [key for key in prefixes if key not in by_teacher])]
        for name, one in config.all_teachers.items():
            teacher = Continuer(self._pair.teachers[name].folder, None, one.model)
            jobs.append((teacher, one.dtype, one.device, [key for key, whose in by_teacher.items() if whose == name]))
        for weights, dtype, device, keys in jobs:
            if not keys:
                continue
            shares = continue_all(
                make_decoder(config, self._pair, weights, dtype=dtype, device=device),
                self._source,
                [prefixes[key] for key in keys],
                stop_ids=self._pair.stop_ids,
                limit=config.rollout.max_completion_length,
                samples=self._samples,
                seed=self._seed,
                progress=progress,
            )
            right |= dict(zip(keys, shares, strict=True))
        progress.report()
        return right


def _prefixes(
    cuts: Sequence[Recorded], uncut: Sequence[Recorded | None], tokens: Mapping[str, Ints]
) -> dict[_Key, Prefix]:
    """What is to be written on, by source and by the cut rollout that it belongs to."""
    found: dict[_Key, Prefix] = {}
    for cut, other in zip(cuts, uncut, strict=True):
        ends = {"keep": cut.keep, _BY_TEACHER: cut.keep, "trigger": cut.trigger}
        wanted = [(source, cut, end) for source, end in ends.items()]
        if other is not None:
            wanted += [("uncut_keep", other, cut.keep), ("uncut_trigger", other, cut.trigger)]
        for source, one, end in wanted:
            found[source, cut.rid] = Prefix(f"{source}:{one.rid}", one.problem, tokens[one.rid][:end])
    return found


def _audit_of(
    run: ReportRun, student: Continuer, samples: int, seed: int, fired: int, cuts: Sequence[Audited]
) -> AuditResult:
    config = run.config
    rule, rollout = config.termination, config.rollout
    versions = [one.record.version for one in cuts]
    return AuditResult(
        run=run.folder.path.resolve().name,
        policy=rule.policy,
        applied="shadow" if rule.shadow else rule.apply,
        student=student.name,
        teacher=teachers_text(config),
        samples=samples,
        seed=seed,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_completion_length=rollout.max_completion_length,
        fired=fired,
        versions=(min(versions), max(versions)),
        cuts=cuts,
        rows=rows_of(cuts, seed),
    )


def _write(folder: Path, done: AuditResult) -> None:
    """Every file whole; a former audit's files stay until then. Raises ConfigError."""
    texts = {
        "audit.csv": csv_of(done),
        "audit.md": markdown_of(done),
        "audit.json": json.dumps(tree_of(done), indent=2, allow_nan=False) + "\n",
    }
    figure = draw(done)
    with named(folder):
        folder.mkdir(exist_ok=True)
        for name, text in texts.items():
            write_text(folder / name, text)
    save_png(figure, folder / "audit.png", DOTS_PER_INCH)
