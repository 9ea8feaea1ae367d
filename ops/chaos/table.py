"""The result of faults as a table, in Markdown.

A fault that was injected alone counts as survived if the run recovered from it. The effects of overlapping faults
cannot be separated: all are survived if the run reached its end and the checker found nothing, else none is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from ops.chaos.schedule import ChaosResult, Fault


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed (nearest rank). Raises IndexError on none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def describe(results: Sequence[ChaosResult]) -> str:
    """Kind, injected, survived, recovery; then what the runs came to."""
    kinds: dict[str, list[Fault]] = defaultdict(list)
    for result in results:
        for fault in result.faults:
            kinds[fault.kind].append(fault)
    lines = [
        "| kind | injected | survived | alone | recovery p50, s | recovery p95, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(_row(kind, kinds[kind]) for kind in sorted(kinds)),
    ]
    faults = [fault for result in results for fault in result.faults if fault.injected]
    violations = sum(len(result.violations) for result in results)
    lines += [
        "",
        f"{len(faults)} faults of {len({fault.kind for fault in faults})} kinds, "
        f"seeds {', '.join(str(result.seed) for result in results)}, "
        f"{sum(result.wall_s for result in results) / 60:.0f} minutes: {violations} violations.",
    ]
    for result in results:
        counts = result.counts
        if counts:
            dropped = ", ".join(f"{reason} {count}" for reason, count in counts["dropped"].items()) or "none"
            lines.append(
                f"Seed {result.seed}: {counts['rollouts']} rollouts in {counts['steps']} steps: {counts['trained']} "
                f"trained, dropped {dropped}, {counts['dead']} dead."
            )
        if "chunks_compared" in counts:
            lines.append(
                f"Seed {result.seed}: {counts['chunks_compared']} chunks compared with the weights of their version: "
                f"at most {counts['worst_nats']:.1g} nats a token apart."
            )
    return "\n".join(lines)


def _row(kind: str, faults: Sequence[Fault]) -> str:
    injected = sum(fault.injected for fault in faults)
    survived = sum(fault.injected and fault.survived for fault in faults)
    times = [fault.recovery_s for fault in faults if fault.recovery_s is not None]
    middle, high = (f"{percentile(times, share):.1f}" for share in (0.5, 0.95)) if times else ("", "")
    return f"| {kind} | {injected} | {survived} | {len(times)} | {middle} | {high} |"
