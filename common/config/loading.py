"""Reads a config: once, from YAML, with `--set a.b=c` on top, fully validated. Checks what `--resume` may change."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common import policy_names
from common.config.sections import Benchmark, Config, ConfigError, Redis, Section, Teacher

MAX_CONFIG_BYTES = 1 << 20
# PyYAML passes on what its constructors raise: "!!int ''" is an IndexError, "!!bool x" a KeyError, the date
# 2001-99-99 a ValueError, a character beyond Unicode an OverflowError.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)
_MAX_NUMBER_LENGTH = 400
_MAX_PROBLEMS = 20  # shown at once
S = TypeVar("S", bound=Section)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `a.b=c` overrides. Imports no policy; commands that judge do (`common.policies`).

    A policy that is named by its file gets the file's absolute path: it is looked for beside the config, then in the
    working directory.

    Raises:
        ConfigError: unreadable file, broken YAML, unknown key (names the nearest), wrong type or value.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    return _with_policy_located(parse(raw, overrides, source=str(path)), path.parent)


def _with_policy_located(config: Config, folder: Path) -> Config:
    rule = config.termination
    policy = policy_names.located(rule.policy, folder)
    if policy == rule.policy:
        return config
    return config.model_copy(update={"termination": rule.model_copy(update={"policy": policy})})


def parse(raw: bytes | str, overrides: Sequence[str] = (), *, source: str = "config") -> Config:
    """`load` for a text (a run's `config.yaml`, the config key of a run in Redis)."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{source}: {len(raw)} bytes; a config has at most {MAX_CONFIG_BYTES}")
    try:
        tree = _read_yaml(raw)
    except _YAML_ERRORS as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: a config is a mapping of sections, found {type(tree).__name__}")
    for item in overrides:
        _override(tree, item)
    return _validated(Config, tree, source)


class _Loader(yaml.SafeLoader):
    """YAML without the features by which a few bytes cost minutes or gigabytes: merge keys multiply what they name, and
    the time for numbers of base 60 (1:1:1…) grows with the square of their length."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "'<<' is not allowed: write the section out")
        super().flatten_mapping(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key occurs twice", node.start_mark)
        return mapping

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > _MAX_NUMBER_LENGTH:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of more than {_MAX_NUMBER_LENGTH} characters", node.start_mark
            )
        return super().construct_scalar(node)


def _read_yaml(text: bytes | str) -> Any:
    """Raises one of _YAML_ERRORS."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def redis_settings(values: dict[str, Any], *, source: str) -> Redis:
    """The section `redis` by itself, as a worker's environment gives it. Raises ConfigError."""
    return _validated(Redis, values, source)


def _validated(model: type[S], tree: dict[str, Any], source: str) -> S:
    try:
        return model.model_validate(_widen(tree, model))
    except ValidationError as error:
        problems = error.errors()
        lines = [_explain(problem) for problem in problems[:_MAX_PROBLEMS]]
        if len(problems) > _MAX_PROBLEMS:
            lines.append(f"and {len(problems) - _MAX_PROBLEMS} more")
        raise ConfigError(f"{source}: " + "\n".join(lines)) from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deep") from error


def _widen(value: Any, model: Any) -> Any:
    """YAML reads `1e-6` as text and `1` as an integer: both are converted where a float is expected."""
    if not isinstance(value, dict):
        return value
    result: dict[Any, Any] = {}
    for name, item in value.items():
        field = model.model_fields.get(name) if isinstance(name, str) else None
        if field is None:
            result[name] = item
        elif (section := _section_of(field)) is not None:
            result[name] = _widen(item, section)
        elif field.annotation in (float, float | None) and isinstance(item, int | str) and not isinstance(item, bool):
            result[name] = _as_float(item)
        else:
            result[name] = item
    return result


def _as_float(item: int | str) -> float | int | str:
    try:
        return float(item)
    except (ValueError, OverflowError):
        return item


def _override(tree: dict[str, Any], item: str) -> None:
    path, equals, text = item.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {item!r}: expected section.key=value, for example learner.max_steps=20")
    try:
        value = _read_yaml(text)
    except _YAML_ERRORS as error:
        raise ConfigError(f"--set {item!r}: the value is not valid YAML") from error
    *sections, last = path.strip().split(".")
    node = tree
    for section in sections:
        found = node.get(section)
        found = {} if found is None else found  # null: an optional section that is not there
        if not isinstance(found, dict):
            raise ConfigError(f"--set {item!r}: {section!r} is not a section")
        # A copy: YAML's aliases make one dict of several sections.
        node[section] = node = dict(found)
    node[last] = value


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "config"
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"unknown key {where!r}{_nearest(where)}"
    if kind == "missing":
        return f"{where}: missing; this key has no default"
    if kind == "value_error":
        return (
            f"{where}: {str(problem['msg']).removeprefix('Value error, ')}"
            if problem["loc"]
            else str(problem["msg"]).removeprefix("Value error, ")
        )
    return f"{where}: {problem['msg']}, found {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    """The beginning of a value, however large it is: aliases can make a short YAML an endless tree."""
    try:
        return reprlib.repr(value)[:80]
    except ValueError:
        return "a number with thousands of digits"


@cache
def _names() -> list[str]:
    return [name for name, _, _ in keys()]


def _nearest(where: str) -> str:
    if where.startswith("eval.data."):  # a benchmark: the user chooses its name
        return f"; a benchmark has the keys {', '.join(Benchmark.model_fields)}"
    if where.startswith("teachers."):
        return f"; a teacher has the keys {', '.join(Teacher.model_fields)}"
    known = [name for name in _names() if not where.startswith(f"{name}.")]  # not the section that it is in
    sections = sorted({name.rpartition(".")[0] for name in known} - {""})
    last = where.rpartition(".")[2]
    for name in known:
        if "." in where and name.rpartition(".")[2] == last:
            return f"; the nearest known one is {name!r}"
    same_depth = known if "." in where else sections + [name for name in known if "." not in name]
    found = difflib.get_close_matches(where, same_depth, n=1, cutoff=0.6)
    if found:
        return f"; the nearest known one is {found[0]!r}"
    found = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.6)
    if found:
        match = next(name for name in known if name.rpartition(".")[2] == found[0])
        return f"; the nearest known one is {match!r}"
    return f"; known sections: {', '.join(sections)}"


def keys() -> Iterator[tuple[str, str, str]]:
    """Every key as (dotted name, default as YAML text, meaning), in the order of the tree."""
    for name, field in _fields(Config, ""):
        default = field.get_default(call_default_factory=True)
        text = "required" if field.is_required() else yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
        yield name, text, field.description or ""


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        section = _section_of(field)
        if section is None or (not field.is_required() and field.default is None):
            yield f"{prefix}{name}", field  # also an optional section: null is a value of it
        if section is not None:
            yield from _fields(section, f"{prefix}{name}.")


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key is, or may be if it is not null; None for a key with a plain value."""
    given = field.annotation
    for kind in get_args(given) if isinstance(given, UnionType) else (given,):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def resumable(*, deterministic: bool) -> frozenset[str]:
    """Keys that `--resume` may change, as marked in `sections.py`."""
    allowed = {"always"} if deterministic else {"always", "unless deterministic"}
    return frozenset(name for name, field in _fields(Config, "") if _mark(field) in allowed)


def _mark(field: FieldInfo) -> Any:
    return field.json_schema_extra.get("resumable") if isinstance(field.json_schema_extra, dict) else None


def check_resume(before: Config, after: Config) -> None:
    """Raises ConfigError when a resumed run would change a key that its record depends on."""
    old, new = flatten(before), flatten(after)
    allowed = resumable(deterministic=before.deterministic)
    if policy_names.same(before.termination.policy, after.termination.policy):
        old["termination.policy"] = new["termination.policy"]
    changed = [key for key in old | new if old.get(key) != new.get(key) and _as_of_one(key) not in allowed]
    servers, now = (max(1, len(config.redis.servers)) for config in (before, after))
    if servers != now:
        raise ConfigError(
            f"redis.data: the run was begun on {servers} data server{'s' * (servers > 1)} and cannot go on with {now}: "
            f"each has a part of its rollouts"
        )
    if changed:
        raise ConfigError(
            "; ".join(f"{key}: {old.get(key)!r} cannot become {new.get(key)!r} on --resume" for key in changed)
            + f". Keys that may change: {', '.join(sorted(allowed))}"
        )


def _as_of_one(key: str) -> str:
    """The key of `teacher` that one of several teachers' is like: "teacher.device" for "teachers.math.device"."""
    several, _, rest = key.partition(".")
    return f"teacher.{rest.partition('.')[2]}" if several == "teachers" else key


def flatten(config: Config) -> dict[str, Any]:
    """`section.key` and its value, for every key; of several teachers `teachers.name.key`."""
    flat: dict[str, Any] = {}
    for name, value in config.model_dump().items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    for teacher in config.teachers:
        flat |= {f"teachers.{teacher}.{key}": one for key, one in flat.pop(f"teachers.{teacher}").items()}
    return flat
