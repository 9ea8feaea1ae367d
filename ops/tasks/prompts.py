"""From a row's prompt to the model's text: unchanged, or through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from common.config import ConfigError, Data
from ops.tasks import SpecialToken
from ops.tasks.templates import Message, Templates, read_extras, special_text
from ops.tasks.unread import Unread

_ASKED: list[Message] = [{"role": "user", "content": "?"}]


class Renderer:
    """Renders prompts as configured in `data`.

    Raises ConfigError if chat is configured and the tokenizer has no template, or one that does not support the config.
    Templates come with the model; transformers runs them in Jinja's sandbox.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self._data = data
        if not data.chat:
            return
        self._templates = Templates(tokenizer, data)
        self._unread = Unread(self._templates)
        self._special = special_text(tokenizer)
        self._check_config()

    @property
    def notes(self) -> list[str]:
        """Possible problems of the chat template, and what it ignored in the rows rendered so far."""
        if not self._data.chat:
            return []
        notes = [*self._unread.notes]
        for name in self._templates.names:
            text = self._trial(name)
            if text is None:
                continue
            if text == self._trial(name, add_generation_prompt=False):
                notes.append("the chat template ignores add_generation_prompt: does it end where the answer begins?")
            # Replaced by something that cannot be called: a template that calls it fails, or its text changes.
            if text != self._trial(name, strftime_now=""):
                notes.append(
                    "the chat template writes today's date: on another day the prompts differ, and a run cannot be "
                    "resumed; set a date in data.template_options (date_string, if the template has it)"
                )
        return list(dict.fromkeys(notes))

    @property
    def template(self) -> str | None:
        """A digest of the chat templates in use; None without chat."""
        return self._templates.digest if self._data.chat else None

    def __call__(self, value: Any, place: str, columns: Mapping[str, Any] | None = None) -> str:
        """The text of a prompt; `columns`: those of data.template_columns that the row has.

        Raises ConfigError, with the row's place; SpecialToken if the row spells one.
        """
        if isinstance(value, str):
            text = value + self._data.prompt_suffix
            if not value.strip():
                raise ConfigError(f"{place}: the prompt is empty")
            if not self._data.chat:
                return text
            return self._templated([{"role": "user", "content": text}], place, columns or {})
        if not isinstance(value, list):
            raise ConfigError(
                f"{place}: the prompt ({self._data.prompt_key!r}) is {type(value).__name__}; "
                f"allowed: text, or a list of messages"
            )
        if not self._data.chat:
            raise ConfigError(f"{place}: the prompt is a list of messages, which needs data.chat: true")
        return self._templated(self._suffixed(_messages(value, place), place), place, columns or {})

    def _suffixed(self, messages: list[Message], place: str) -> list[Message]:
        last = messages[-1]
        if last["role"] != "user":
            raise ConfigError(f"{place}: the last message is the {last['role']}'s; a prompt must end with the user's")
        if last["content"] is None:
            raise ConfigError(f"{place}: the last message has no content")
        return [*messages[:-1], {**last, "content": last["content"] + self._data.prompt_suffix}]

    def _templated(self, messages: list[Message], place: str, columns: Mapping[str, Any]) -> str:
        extras = read_extras(columns, self._templates.reserved, place)
        for where, text in _texts(messages, extras):
            if found := self._special.search(text):
                raise SpecialToken(
                    f"{place}: {where} contains {found[0]!r}, which the tokenizer reads as a special token, not as "
                    f"text; change it, or leave such rows out by data.special_tokens: skip"
                )
        system = self._data.system_prompt
        own = int(system is not None and messages[0]["role"] != "system")
        if own:
            messages = [{"role": "system", "content": system}, *messages]
        text = self._templates.apply(messages, extras, place)
        if not text.strip():
            raise ConfigError(f"{place}: the chat template renders the prompt as empty text")
        self._unread.look(messages, extras, place, text, own)
        return text

    def _check_config(self) -> None:
        """Check the texts that the config itself puts into every prompt."""
        for key in ("system_prompt", "prompt_suffix"):
            if found := self._special.search(getattr(self._data, key) or ""):
                raise ConfigError(
                    f"data.{key}: contains {found[0]!r}, which the tokenizer reads as a special token, not as text; "
                    f"change it"
                )
        system = self._data.system_prompt
        for name in self._templates.names if system is not None else ():
            given, other = ([{"role": "system", "content": text}, *_ASKED] for text in (system, f"x{system}x"))
            text = self._trial(name, given)
            if text is not None and text == self._trial(name, other):
                raise ConfigError("data.system_prompt: the chat template ignores system messages")

    def _trial(self, name: str, messages: list[Message] = _ASKED, **changed: Any) -> str | None:
        """None if the template refuses it; errors about rows are reported with the row."""
        try:
            return self._templates.apply(messages, {}, "a trial", name=name, **changed)
        except ConfigError:
            return None


def _texts(messages: list[Message], extras: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text of a row that a template gets, and what it is part of."""
    for number, message in enumerate(messages, start=1):
        for name, value in message.items():
            where = "the prompt" if name == "content" else f"{name} of message {number}"
            yield from ((where, text) for text in (name, *_strings(value)))
    for name, value in extras.items():
        yield from ((name, text) for text in _strings(value))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield str(name)
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


def _content(value: Any, place: str) -> str | None:
    """Text, a list of text parts as one text, or nothing (an answer that only calls tools). Raises ConfigError."""
    if value is None or isinstance(value, str):
        return value
    texts = (
        [part.get("text") if isinstance(part, dict) else None for part in value] if isinstance(value, list) else [None]
    )
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{place}: content is {type(value).__name__}; allowed: text, a list of text parts, or null")
    return "".join(str(text) for text in texts)


def _messages(value: list[Any], place: str) -> list[Message]:
    found = []
    for number, message in enumerate(value, start=1):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise ConfigError(f"{place}: message {number} is not a mapping with a role that is text")
        # All keys, since the template may read any of them (tool_calls, name, reasoning_content …); a column of a
        # Parquet file has every key in every message, with null for missing ones.
        kept = {name: value for name, value in message.items() if value is not None}
        content = _content(message.get("content"), f"{place}: message {number}")
        if content is None and not kept.keys() - {"role"}:
            raise ConfigError(f"{place}: message {number} has no content")
        found.append(kept | {"content": content})
    if not found:
        raise ConfigError(f"{place}: the prompt has no message")
    return found
