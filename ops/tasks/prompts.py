"""From a row's prompt to the text that a model is shown: as it stands, or through the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from common.config import ConfigError, Data

Message = dict[str, str]


class Renderer:
    """Renders prompts as `data` says. Raises ConfigError where chat is wanted and the tokenizer has no template.

    Templates come with the model; transformers runs them in Jinja's sandbox.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        if data.chat and not tokenizer.chat_template:
            raise ConfigError("data.chat: the student's tokenizer has no chat template (chat_template.jinja)")
        self._tokenizer, self._data = tokenizer, data

    def __call__(self, value: Any, place: str) -> str:
        """The text of a prompt. Raises ConfigError, with the row's place."""
        if isinstance(value, str):
            text = value + self._data.prompt_suffix
            if not value.strip():
                raise ConfigError(f"{place}: the prompt is empty")
            return self._templated([{"role": "user", "content": text}], place) if self._data.chat else text
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
        return [*messages[:-1], {**last, "content": last["content"] + self._data.prompt_suffix}]

    def _templated(self, messages: list[Message], place: str) -> str:
        system = self._data.system_prompt
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._data.template_options
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ConfigError(f"{place}: the chat template refuses the prompt ({error!s:.200})") from error
        return text


def _messages(value: list[Any], place: str) -> list[Message]:
    found = []
    for number, message in enumerate(value, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not (isinstance(role, str) and isinstance(content, str)):
            raise ConfigError(f"{place}: message {number} is no pair of texts, role and content")
        found.append({"role": role, "content": content})
    if not found:
        raise ConfigError(f"{place}: the prompt has no message")
    return found
