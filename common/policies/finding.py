"""The policies by their name in `termination.policy`: built in, or a class of the user's own, by file or module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import os
import re
import sys
import traceback
from types import ModuleType

from common import own_packages, policy_names
from common.config import Config, ConfigError, Termination
from common.policies.base import Calibrated, Policy, Situation
from common.policies.changes import AdaptivePolicy, MarginChangePolicy
from common.policies.positions import (
    FixedPolicy,
    NonePolicy,
    RandomMatchedPolicy,
    RandomPolicy,
    RepetitionPolicy,
    ScheduledPolicy,
)
from common.policies.windows import EntropyPolicy, KatAbsolutePolicy, KatInversePolicy, KatPolicy, windows
from common.policy_names import PolicyError
from common.termination import Kat
from common.wire.messages import VIEW

# A user's code may raise anything; it is reported as an error of that code. `sys.exit()` would otherwise end Katana
# without a message.
_MISTAKES = (Exception, SystemExit)


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
    "entropy": EntropyPolicy,
    "margin_change": MarginChangePolicy,
    "adaptive": AdaptivePolicy,
}


def unwatched(settings: Termination, *, arm: str, seed: int, max_tokens: int) -> int:
    """The fewest tokens with which a rollout can be stopped (1 … max_tokens): before, nobody waits for its chunks.

    1 for a custom policy: the hosts of rollout workers need not have its code.
    """
    if not settings.stops(arm):
        return max_tokens
    policy = POLICIES.get(settings.policy)
    return min(policy.earliest(settings, seed, max_tokens), max_tokens) if policy else 1


def extremes(settings: Termination) -> Kat:
    """A detector for the least (or greatest: `looks_high`) window mean of a whole rollout, of what the policy's
    `windows_of` names; it cuts nothing."""
    return Kat(**windows(settings), threshold=None, inverse=find(settings.policy).looks_high)


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
    _check_reads(name, found)
    return found


def _check_reads(name: str, found: type[Policy]) -> None:
    if isinstance(found.reads, str) or not set(found.reads) <= set(VIEW):
        raise PolicyError(f"{name!r}: reads is {found.reads!r:.80}; allowed: a set of {', '.join(VIEW)}")
    if found.windows_of not in ("divergence", *found.reads):
        raise PolicyError(f"{name!r}: windows_of is {found.windows_of!r:.40}; allowed: divergence, or one of its reads")


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
