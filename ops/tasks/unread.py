"""Finds data that a chat template ignores, by rendering rows again without it.

This is decided for each key of a role's messages and each column separately, on the first LOOKED_AT rows that have it:
rendering every row again for every key would take many times as long as reading them. A row is refused if the template
ignores part of the conversation (tool calls, tools, documents, a content); the rest is counted and reported once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from common.config import ConfigError
from ops.tasks.templates import Message, Templates

LOOKED_AT = 3


@dataclass(frozen=True, slots=True)
class _Key:
    """A key of a role's messages, or a column; per template, since each reads different ones."""

    template: str
    name: str


@dataclass(frozen=True, slots=True)
class _Trial:
    """A row without the key, or, for a content, with another one."""

    key: _Key
    messages: list[Message]
    extras: Mapping[str, Any]
    refused: str = ""  # place and remedy, for keys that must not be lost


class Unread:
    """Checks rows as they are rendered, and reports at the end what the template ignored."""

    def __init__(self, templates: Templates) -> None:
        self._templates = templates
        self._rows: Counter[_Key] = Counter()
        self._read: set[_Key] = set()

    def look(self, messages: list[Message], extras: Mapping[str, Any], place: str, text: str, own: int = 0) -> None:
        """Look at a row that was rendered as `text`; the first `own` messages are the config's.

        Raises ConfigError if the template ignores part of the conversation.
        """
        template = self._templates.name(extras)
        keys = list(dict.fromkeys(_Key(template, name) for name in _kinds(messages[own:], extras)))
        self._rows.update(keys)
        if all(self._rows[key] > LOOKED_AT for key in keys):
            return
        for trial in _trials(template, messages, extras, own):
            if self._rows[trial.key] > LOOKED_AT:
                continue
            if self._rendered(trial) != text:
                self._read.add(trial.key)
            elif trial.refused:
                raise ConfigError(f"{place}: the chat template ignores {trial.refused}")

    @property
    def notes(self) -> list[str]:
        """Warnings about data that the template never read."""
        several = len(self._templates.names) > 1
        return [
            f"the chat template{f' {key.template!r}' if several else ''} ignores {key.name}: "
            f"{_count(rows)} it, checked in the first {min(rows, LOOKED_AT)}"
            for key, rows in self._rows.items()
            if key not in self._read
        ]

    def _rendered(self, trial: _Trial) -> str | None:
        """None if the template fails: it reads what is missing."""
        try:
            return self._templates.apply(trial.messages, trial.extras, "", name=trial.key.template)
        except ConfigError:
            return None


def _count(rows: int) -> str:
    return "1 row has" if rows == 1 else f"{rows:,} rows have"


def _says(value: Any) -> bool:
    """Whether there is a value to lose: many data sets write "" and [] for missing values."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != [] and value != {}


def _kind(message: Message, name: str) -> str:
    """A content beside tool calls is a separate kind: some templates write only the calls."""
    suffix = " beside tool_calls" if name == "content" and message.get("tool_calls") else ""
    return f"{name}{suffix} in messages of the {message['role']}"


def _kinds(messages: list[Message], extras: Mapping[str, Any]) -> Iterator[str]:
    for message in messages:
        yield from (_kind(message, name) for name, value in message.items() if name != "role" and _says(value))
    for name, value in extras.items():
        yield from (f"{name}.{switch}" for switch in value) if name == "chat_template_kwargs" else (f"column {name}",)


def _trials(template: str, messages: list[Message], extras: Mapping[str, Any], own: int) -> Iterator[_Trial]:
    others: dict[tuple[str, str], str] = {}  # keys that may be lost, by role: from all its messages at once
    for place, message in enumerate(messages):
        for name, value in message.items():
            if place < own or name == "role" or not _says(value):
                continue
            if name not in ("content", "tool_calls"):
                others[message["role"], name] = _kind(message, name)
                continue
            changed = {**message, "content": f"x{value}x"} if name == "content" else _without(message, name)
            yield _Trial(
                _Key(template, _kind(message, name)),
                [*messages[:place], changed, *messages[place + 1 :]],
                extras,
                f"{_kind(message, name)} (message {place - own + 1}), so the conversation would be broken; another "
                f"template may (data.template), or leave it out of the data",
            )
    for (role, name), kind in others.items():
        left = [_without(message, name) if message["role"] == role else message for message in messages]
        yield _Trial(_Key(template, kind), left, extras)
    yield from _trials_of_columns(template, messages, extras)


def _trials_of_columns(template: str, messages: list[Message], extras: Mapping[str, Any]) -> Iterator[_Trial]:
    for name, value in extras.items():
        if name == "chat_template_kwargs":
            for switch in value:
                left = {**extras, name: _without(value, switch)}
                yield _Trial(_Key(template, f"{name}.{switch}"), messages, left)
            continue
        yield _Trial(
            _Key(template, f"column {name}"),
            messages,
            _without(extras, name),
            f"the column {name}; another template may (data.template), or leave {name} out of data.template_columns",
        )


def _without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}
