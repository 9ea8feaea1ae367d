"""From a row's prompt to the text that a model is shown: as it stands, or through the tokenizer's chat template."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from common.config import ConfigError, Data

Message = dict[str, Any]  # role, content, and whatever else the template reads
# What a template may raise of its own: of a wrong index, name, sum or type.
_RAISED = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Renderer:
    """Renders prompts as `data` says.

    Raises ConfigError where chat is wanted and the tokenizer has no template, or one that knows not all of
    data.template_options. Templates come with the model; transformers runs them in Jinja's sandbox.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self._tokenizer, self._data = tokenizer, data
        if not data.chat:
            return
        if not tokenizer.chat_template:
            raise ConfigError("data.chat: the student's tokenizer has no chat template (chat_template.jinja)")
        for name in data.template_options:
            if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
                raise ConfigError(f"data.template_options.{name}: the student's chat template has no such switch")
        self._special = re.compile("|".join(map(re.escape, sorted(_special_texts(tokenizer)))) or r"(?!)")

    @property
    def warning(self) -> str:
        """What may be wrong with the chat template; empty where nothing is."""
        if not self._data.chat:
            return ""
        asked: list[Message] = [{"role": "user", "content": "?"}]
        if self._apply(asked, "a trial", True) != self._apply(asked, "a trial", False):
            return ""
        return "the chat template takes no notice of add_generation_prompt: does it end where the answer begins?"

    def __call__(self, value: Any, place: str) -> str:
        """The text of a prompt. Raises ConfigError, with the row's place."""
        if isinstance(value, str):
            text = value + self._data.prompt_suffix
            if not value.strip():
                raise ConfigError(f"{place}: the prompt is empty")
            if not self._data.chat:
                return text
            return self._templated([{"role": "user", "content": text}], place)
        if not isinstance(value, list):
            raise ConfigError(
                f"{place}: the prompt ({self._data.prompt_key!r}) is {type(value).__name__}; "
                f"allowed: text, or a list of messages"
            )
        if not self._data.chat:
            raise ConfigError(f"{place}: the prompt is a list of messages, which needs data.chat: true")
        return self._templated(self._suffixed(_messages(value, place), place), place)

    def _suffixed(self, messages: list[Message], place: str) -> list[Message]:
        last = messages[-1]
        if last["role"] != "user":
            raise ConfigError(f"{place}: the last message is the {last['role']}'s; a prompt ends with one of the user")
        if last["content"] is None:
            raise ConfigError(f"{place}: the last message has no content")
        return [*messages[:-1], {**last, "content": last["content"] + self._data.prompt_suffix}]

    def _templated(self, messages: list[Message], place: str) -> str:
        for message in messages:
            if found := self._special.search(message["content"] or ""):
                raise ConfigError(
                    f"{place}: the prompt has {found[0]!r} in it, which the tokenizer takes for a special token, not "
                    f"for text; leave that row out, or write it otherwise"
                )
        system = self._data.system_prompt
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        text = self._apply(messages, place, True)
        if not text.strip():
            raise ConfigError(f"{place}: the chat template makes nothing of the prompt")
        return text

    def _apply(self, messages: list[Message], place: str, add_generation_prompt: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._data.template_options,
            )
        except _RAISED as error:
            raise ConfigError(f"{place}: the chat template refuses the prompt ({error!s:.200})") from error
        return text


def _special_texts(tokenizer: Any) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {text for text in added | set(tokenizer.all_special_tokens) if text}


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
            raise ConfigError(f"{place}: message {number} is no mapping with a role, a text")
        # Whole, as the template may read any of it (tool_calls, name, reasoning_content …); a column of a Parquet file
        # has every key in every message, with nothing in it where there was none.
        kept = {name: value for name, value in message.items() if value is not None}
        content = _content(message.get("content"), f"{place}: message {number}")
        if content is None and not kept.keys() - {"role"}:
            raise ConfigError(f"{place}: message {number} has no content")
        found.append(kept | {"content": content})
    if not found:
        raise ConfigError(f"{place}: the prompt has no message")
    return found
