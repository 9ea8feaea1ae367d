"""The policies that may end a rollout early, by their name in `termination.policy`. No Redis, no clock, no torch.

A policy is one class. Each instance judges one rollout: it is made from the settings and a `Situation`, and fed the
rollout's tokens in order. A custom one is named by its file or its module; docs/policies.md shows how.

Invariant: a verdict is a function of the settings, the situation and the scored tokens, in any chunking. All of these
are recorded, so a replay of the record gives the same verdict.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import os
import re
import sys
import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, TypedDict

import numpy as np
import numpy.typing as npt

from common import own_packages, policy_names
from common.config import Config, ConfigError, Termination
from common.draws import fraction
from common.policy_names import PolicyError
from common.termination import Cut, CutAt, FirstRepeat, FixedLength, Kat, MinimaBuffer, NeverCut
from common.wire.messages import Floats, Ints

# A user's code may raise anything; it is reported as an error of that code. `sys.exit()` would otherwise end Katana
# without a message.
_MISTAKES = (Exception, SystemExit)


@dataclass(frozen=True, slots=True)
class Situation:
    """What a policy knows of a rollout before its first divergence.

    number: the policy's `number` when the rollout's first score was stored (deterministic runs: when it was
        admitted); None if there was none yet. Recorded as the rollout's threshold.
    seed: the rollout's own, 0 … 2^63 - 1; the same in every run of the same `seed`.
    max_tokens: the most tokens the rollout can have.
    """

    number: float | None
    seed: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of the run: the newest policy version, optimizer steps done, and the window extremes kept."""

    version: int
    step: int
    minima: MinimaBuffer


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTokens:
    """Consecutive tokens of one rollout, as a policy reads them.

    ids: integers [n]. divergence: float32 [n], nats, at least 0.
    """

    ids: Ints
    divergence: Floats


class Policy(ABC):
    """One rollout's policy. Write `__init__(self, settings, situation)` and either `feed` or `feed_tokens`."""

    unit: ClassVar[str] = ""
    """Of `number`: "nats", "tokens" or nothing."""
    looks_high: ClassVar[bool] = False
    """True: the buffer is filled with the rollouts' greatest window means, not with their least."""

    @abstractmethod
    def __init__(self, settings: Termination, situation: Situation) -> None: ...

    def feed(self, divergence: npt.NDArray[np.floating]) -> Cut | None:
        """Take the next divergences (float, [n], nats); return a Cut once, where it fires; the rest is ignored.

        A Cut's trigger is the number of tokens after which it fired: at most those fed, and the same in any chunking.
        """
        raise NotImplementedError("a policy has `feed` or `feed_tokens`")

    def feed_tokens(self, tokens: ScoredTokens) -> Cut | None:
        """Take the next tokens, as `feed` takes divergences; for a policy that reads more than the divergence.

        Whoever judges calls this one: a policy that defines it has no `feed`.
        """
        return self.feed(tokens.divergence)

    @classmethod
    def number(cls, settings: Termination, progress: Progress) -> float | None:
        """The finite number by which rollouts that begin now are judged; None for none."""
        return None

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        """The fewest tokens with which a rollout can be cut, whatever they are: its writer sends no chunk before.

        `seed`, `max_tokens`: as in `Situation`.
        """
        return 1

    @classmethod
    def active(cls, number: float | None) -> bool:
        """Whether a rollout judged by this number could be cut: only those count in the comparison of the arms."""
        return True

    @classmethod
    def possible(cls, settings: Termination, number: float | None) -> bool:
        """Whether `number` can have returned this; for the checker."""
        return True


class Calibrated(Policy):
    """Base of policies that judge by s, the quantile of window minima; None, and not active, until there are enough."""

    unit = "nats"

    @classmethod
    def number(cls, settings: Termination, progress: Progress) -> float | None:
        if progress.version < settings.warmup_steps or len(progress.minima) < settings.min_calibration:
            return None
        return progress.minima.quantile(settings.eta if cls.looks_high else 1 - settings.eta)

    @classmethod
    def active(cls, number: float | None) -> bool:
        return number is not None


class NonePolicy(NeverCut, Policy):
    """`none`: nothing is cut."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        pass

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return max_tokens

    @classmethod
    def active(cls, number: float | None) -> bool:
        return False


class FixedPolicy(FixedLength, Policy):
    """`fixed`: the first `fixed_tokens` tokens are kept."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        super().__init__(settings.fixed_tokens, "fixed")

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return settings.fixed_tokens + 1  # by then it is known that there are more


class ScheduledPolicy(FixedLength, Policy):
    """`scheduled`: the first N tokens are kept; N grows from `fixed_tokens` to `scheduled_tokens` in
    `scheduled_steps`."""

    unit = "tokens"

    def __init__(self, settings: Termination, situation: Situation) -> None:
        # There is no number before the first verdict of a run, when no step is done.
        tokens = settings.fixed_tokens if situation.number is None else int(situation.number)
        super().__init__(tokens, "scheduled")

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return settings.fixed_tokens + 1  # a schedule grows

    @classmethod
    def number(cls, settings: Termination, progress: Progress) -> float | None:
        first, last, steps = settings.fixed_tokens, settings.scheduled_tokens, settings.scheduled_steps
        return float(first + (last - first) * min(progress.step, steps) // steps)

    @classmethod
    def possible(cls, settings: Termination, number: float | None) -> bool:
        return number is None or (number.is_integer() and settings.fixed_tokens <= number <= settings.scheduled_tokens)


class RandomPolicy(FixedLength, Policy):
    """`random`: the first N tokens are kept, N uniform over 1 … `max_completion_length`, drawn for each rollout."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        super().__init__(_random_length(situation.seed, situation.max_tokens), "random")

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return _random_length(seed, max_tokens) + 1


def _random_length(seed: int, max_tokens: int) -> int:
    return 1 + int(fraction(seed, "cut") * max_tokens)


class RandomMatchedPolicy(CutAt, Policy):
    """`random_matched`: random cuts with KAT's realised hazard at each position, scaled; it ignores divergences.

    With probability min(1, hazard_scale · hazard[t]) it fires at token t, if it has not before; the last
    `detection_tokens` tokens up to there are cut. The position is drawn before the first token: a rollout that ends
    before it is not cut.
    """

    def __init__(self, settings: Termination, situation: Situation) -> None:
        trigger = None
        if situation.number is not None:
            trigger = drawn_position(settings.hazard, situation.number, fraction(situation.seed, "cut"))
        super().__init__(trigger, 0 if trigger is None else max(0, trigger - settings.detection_tokens), "random")

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return drawn_position(settings.hazard, settings.hazard_scale, fraction(seed, "cut")) or max_tokens

    @classmethod
    def number(cls, settings: Termination, progress: Progress) -> float | None:
        return settings.hazard_scale if progress.version >= settings.warmup_steps else None

    @classmethod
    def active(cls, number: float | None) -> bool:
        return number is not None

    @classmethod
    def possible(cls, settings: Termination, number: float | None) -> bool:
        return number in (None, settings.hazard_scale)


def drawn_position(hazard: dict[int, float], scale: float, share: float) -> int | None:
    """The first position by which the probability of a cut exceeds `share` (0 … 1); None if there is none."""
    survival = 1.0
    for position in sorted(hazard):
        survival *= 1 - min(1.0, scale * hazard[position])
        if 1 - survival > share:
            return position
    return None


class RepetitionPolicy(FirstRepeat, Policy):
    """`repetition`: cut at the first n-gram of token ids, n = `ngram`, that the rollout has twice."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        super().__init__(settings.ngram)

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return settings.ngram + 1  # the two may overlap

    def feed_tokens(self, tokens: ScoredTokens) -> Cut | None:
        return self.feed_ids(tokens.ids)


class _OfWindows(Kat, Policy):
    """What the policies that look at window means have in common."""

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return settings.grace_tokens + settings.window + (settings.patience - 1) * settings.stride


class KatPolicy(_OfWindows, Calibrated):
    """`kat`: cut where window means stay below s, the quantile of other rollouts' least window means."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        super().__init__(**_windows(settings), threshold=situation.number)


class KatAbsolutePolicy(_OfWindows):
    """`kat_absolute`: the rule of `kat` with a floor from the config, `floor_nats`, in place of the quantile."""

    unit = "nats"

    def __init__(self, settings: Termination, situation: Situation) -> None:
        super().__init__(**_windows(settings), threshold=situation.number)

    @classmethod
    def number(cls, settings: Termination, progress: Progress) -> float | None:
        return settings.floor_nats if progress.version >= settings.warmup_steps else None

    @classmethod
    def active(cls, number: float | None) -> bool:
        return number is not None

    @classmethod
    def possible(cls, settings: Termination, number: float | None) -> bool:
        return number in (None, settings.floor_nats)


class KatInversePolicy(_OfWindows, Calibrated):
    """`kat_inverse`: cut where window means stay above s, the quantile of other rollouts' greatest window means."""

    looks_high = True

    def __init__(self, settings: Termination, situation: Situation) -> None:
        super().__init__(**_windows(settings), threshold=situation.number, inverse=True)


POLICIES: dict[str, type[Policy]] = {
    "none": NonePolicy,
    "fixed": FixedPolicy,
    "scheduled": ScheduledPolicy,
    "random": RandomPolicy,
    "random_matched": RandomMatchedPolicy,
    "repetition": RepetitionPolicy,
    "kat": KatPolicy,
    "kat_absolute": KatAbsolutePolicy,
    "kat_inverse": KatInversePolicy,
}


def unwatched(settings: Termination, *, arm: str, seed: int, max_tokens: int) -> int:
    """The fewest tokens with which a rollout can be stopped (1 … max_tokens): before, nobody waits for its chunks.

    1 for a custom policy: the hosts of rollout workers need not have its code.
    """
    if not settings.stops(arm):
        return max_tokens
    policy = POLICIES.get(settings.policy)
    return min(policy.earliest(settings, seed, max_tokens), max_tokens) if policy else 1


class _Windows(TypedDict):
    window: int
    patience: int
    stride: int
    grace_tokens: int


def _windows(settings: Termination) -> _Windows:
    return {
        "window": settings.window,
        "patience": settings.patience,
        "stride": settings.stride,
        "grace_tokens": settings.grace_tokens,
    }


def extremes(settings: Termination) -> Kat:
    """A detector for the least (or greatest: `looks_high`) window mean of a whole rollout; it cuts nothing."""
    return Kat(**_windows(settings), threshold=None, inverse=find(settings.policy).looks_high)


def extremes_beside(policy: Policy, settings: Termination) -> Kat:
    """A detector whose `min_window_of_all` is the extreme of a whole rollout that `policy` judges: the policy itself,
    if it computes the same windows."""
    return policy if isinstance(policy, Kat) and type(policy) in POLICIES.values() else extremes(settings)


def find(name: str) -> type[Policy]:
    """The class by its name; a custom one is imported. Raises PolicyError."""
    policy_names.check(name)
    if name in POLICIES:
        return POLICIES[name]
    where, class_name = policy_names.split(name)
    file = policy_names.in_file(name)
    module = _from_file(name, where) if file else _imported(name, where)
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, Policy):
        what = "has no such class" if found is None else "holds something else under that name"
        kind = "file" if file else "module"
        raise PolicyError(f"{name!r}: the {kind} {what}; allowed: a subclass of common.policies.Policy")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if found.feed is Policy.feed and found.feed_tokens is Policy.feed_tokens:
        missing.append("feed (or feed_tokens)")
    if missing:
        raise PolicyError(f"{name!r}: the class lacks {', '.join(missing)}")
    return found


def _imported(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise PolicyError(
            f"{name!r}: the module cannot be imported ({error}); it must be on the Python path of every host that "
            f"runs a feeder or an arbiter (PYTHONPATH, or an installed package), or be named by its file, "
            f"path/to/file.py:{policy_names.split(name)[1]}{_hint(error)}"
        ) from error
    except _MISTAKES as error:
        raise _refused(name, "module", error) from error


def _from_file(name: str, path: str) -> ModuleType:
    """A module under a unique name. It can import modules beside its file; those on the Python path come first."""
    module_name = _module_name(path)
    if module_name in sys.modules:
        return sys.modules[module_name]
    if not os.path.isfile(path):
        raise PolicyError(
            f"{name!r}: there is no such file; a path that is not absolute is looked for beside the config, then in "
            f"the working directory, and every host that runs a feeder or an arbiter needs the file at the same place"
        )
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # its name ends with .py
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except _MISTAKES as error:
        del sys.modules[module_name]
        raise _refused(name, "file", error) from error
    return module


def _module_name(path: str) -> str:
    whole = os.path.abspath(path)
    stem = re.sub(r"\W", "_", os.path.basename(whole).removesuffix(".py"))
    return f"katana_policy_{stem}_{hashlib.sha256(os.fsencode(whole)).hexdigest()[:12]}"


def _refused(name: str, kind: str, error: BaseException) -> PolicyError:
    if isinstance(error, SyntaxError):
        where = f"line {error.lineno} of the {kind}" if error.lineno else f"the {kind}"
        return PolicyError(f"{name!r}: {where} is not valid Python ({error.msg})")
    return PolicyError(f"{name!r}: the {kind} fails when it is imported ({_described(error, name)}){_hint(error)}")


def _hint(error: BaseException) -> str:
    """A hint if the import looked in a package of Katana, because the user's package has the same name."""
    if not isinstance(error, ImportError) or not own_packages.is_ours(error.name):
        return ""
    taken = str(error.name).partition(".")[0]
    return f"; {taken!r} is a package of Katana: give yours another name"


def _described(error: BaseException, name: str) -> str:
    """The error, and the line of the policy's file; of another file if that one is not in the traceback."""
    places = traceback.extract_tb(error.__traceback__)
    where, _ = policy_names.split(name)
    own = where.removesuffix(".py") if policy_names.in_file(name) else where.replace(".", "/")
    place = ([one for one in places if one.filename.removesuffix(".py").endswith(own)] or places)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{what[:200]}, {os.path.basename(place.filename)} line {place.lineno}"


def check_policy(config: Config, *, source: str) -> None:
    """Import the policy, a custom one too, and make an instance: for commands that judge or start roles that do.

    Raises ConfigError, with `source` before it.
    """
    try:
        check(config.termination, config.rollout.max_completion_length)
    except PolicyError as error:
        raise ConfigError(f"{source}: termination.policy: {error}") from error


def check(settings: Termination, max_tokens: int) -> None:
    """Make an instance of the policy. Raises PolicyError if that fails, or if the policy could cut nothing."""
    policy = find(settings.policy)
    if issubclass(policy, Calibrated) and settings.calibrate_on == "control" and settings.control_fraction == 0:
        raise PolicyError(f"{settings.policy!r} is calibrated on the control arm, but control_fraction is 0")
    usable = any(chance > 0 and position <= max_tokens for position, chance in settings.hazard.items())
    if settings.policy == "random_matched" and not usable:
        raise PolicyError(
            f"'random_matched' would cut nothing: no chance in hazard is above 0 at a position up to "
            f"max_completion_length, {max_tokens}"
        )
    try:
        policy(settings, Situation(number=None, seed=0, max_tokens=max_tokens))
    except _MISTAKES as error:
        raise PolicyError(
            f"{settings.policy!r} refuses these settings ({_described(error, settings.policy)})"
        ) from error


def unit_of(name: str) -> str:
    """The unit of a policy's number. Imports nothing: for a custom policy it is "" unless this process has imported the
    policy already."""
    if name in POLICIES:
        return POLICIES[name].unit
    where, class_name = policy_names.split(name)
    module = _module_name(where) if policy_names.in_file(name) else where
    found = getattr(sys.modules.get(module), class_name, None)
    return found.unit if isinstance(found, type) and issubclass(found, Policy) else ""


def written(number: float, name: str, digits: str = ".3g") -> str:
    """A number with its unit, as text."""
    unit = unit_of(name)
    value = f"{number:.0f}" if unit == "tokens" and math.isfinite(number) else format(number, digits)
    return f"{value} {unit}".rstrip()
