"""A tokenizer's chat templates: which of several a prompt goes through, and what may be handed to it by name."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from common.config import ConfigError, Data
from ops.tasks.rows import once

Message = dict[str, Any]  # role, content, and whatever else the template reads
DEFAULT, TOOL_USE = "default", "tool_use"  # names that transformers itself gives a meaning
# What a template may raise of its own: of a wrong index, name, sum or type.
_RAISED = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Templates:
    """The templates that a config's prompts go through: one, or another one for rows with tools.

    As transformers chooses: `tool_use` for a row with tools, else `default`; data.template names one for all rows.
    Raises ConfigError where there is none, or where it is not clear which.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self._tokenizer, self._options = tokenizer, data.template_options
        self._by_name = _chosen(_named(tokenizer.chat_template), data.template)
        # Names that apply_chat_template keeps for itself: as a switch they would be an error in every row.
        self.reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
        self.reserved |= set(tokenizer.special_tokens_map)
        for name, value in self._options.items():
            where = f"data.template_options.{name}"
            if name in self.reserved:
                raise ConfigError(f"{where}: {name!r} is no switch of a template; it is set without you")
            if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in self._by_name.values()):
                raise ConfigError(f"{where}: the student's chat template has no such switch")
            if found := special_text(tokenizer).search(str(value)):
                raise ConfigError(f"{where}: has {found[0]!r} in it, which the tokenizer takes for a special token")

    @property
    def names(self) -> tuple[str, ...]:
        """Those in use."""
        return tuple(self._by_name)

    @property
    def digest(self) -> str:
        """Of the names and texts of those in use."""
        return hashlib.blake2b(json.dumps(self._by_name).encode(), digest_size=16).hexdigest()

    def name(self, beside: Mapping[str, Any]) -> str:
        """Which one a row goes through."""
        return TOOL_USE if beside.get("tools") and TOOL_USE in self._by_name else next(iter(self._by_name))

    def apply(
        self,
        messages: list[Message],
        beside: Mapping[str, Any],
        place: str,
        *,
        name: str | None = None,
        add_generation_prompt: bool = True,
        **switches: Any,
    ) -> str:
        """The text that a template makes. `beside`: tools, documents, chat_template_kwargs. Raises ConfigError."""
        template = self._by_name[name or self.name(beside)]
        given = self._options | dict(beside.get("chat_template_kwargs") or {}) | switches
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tools=beside.get("tools"),
                documents=beside.get("documents"),
                **given,
            )
        except _RAISED as error:
            raise ConfigError(f"{place}: the chat template refuses the prompt ({error!s:.200})") from error
        return text


def _named(template: Any) -> dict[str, str]:
    """Templates by name; one without a name is the default, as transformers has it."""
    if not template:
        raise ConfigError("data.chat: the student's tokenizer has no chat template (chat_template.jinja)")
    named = template if isinstance(template, dict) else {DEFAULT: template}
    for name, text in named.items():
        if not isinstance(text, str):
            raise ConfigError(f"data.chat: the student's chat template {name!r} is {type(text).__name__}, not text")
    return named


def _chosen(named: dict[str, str], wanted: str | None) -> dict[str, str]:
    """The one that is wanted; without a wish, the default, and behind it the one for tools."""
    known = ", ".join(sorted(named))
    if wanted is not None:
        if wanted not in named:
            raise ConfigError(f"data.template: {wanted!r} is no chat template of the student's; there are: {known}")
        return {wanted: named[wanted]}
    if DEFAULT not in named:
        raise ConfigError(
            f"data.template: the student's tokenizer has chat templates by name ({known}) and none of them is "
            f"{DEFAULT!r}: which is meant? Name one"
        )
    return {name: named[name] for name in (DEFAULT, TOOL_USE) if name in named}


def special_text(tokenizer: Any) -> re.Pattern[str]:
    """What finds a special token spelled in a text."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = {text for text in added | set(tokenizer.all_special_tokens) if text}
    return re.compile("|".join(map(re.escape, sorted(texts))) or r"(?!)")


def read_beside(columns: Mapping[str, Any], reserved: set[str], place: str) -> dict[str, Any]:
    """The columns beside the prompt as a template takes them; one with nothing in it is left out.

    Each may be JSON text, as data sets store what differs from row to row. Raises ConfigError.
    """
    found: dict[str, Any] = {}
    for name, stored in columns.items():
        value = _parsed(stored, name, place) if isinstance(stored, str) else stored
        if value is None or value == [] or value == {}:
            continue
        if name == "chat_template_kwargs":
            found[name] = _switches(value, reserved, place)
            continue
        if not (isinstance(value, list) and all(isinstance(one, dict) and one for one in value)):
            raise ConfigError(
                f"{place}: {name} is {_told(value)}; allowed: a list of mappings, or that as JSON text; if it is not "
                f"for the chat template, leave {name} out of data.template_columns"
            )
        found[name] = value
    return {name: value for name, value in found.items() if value}


def _parsed(text: str, name: str, place: str) -> Any:
    if not text.strip():
        return None
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{place}: {name} is text that is no JSON ({error}); if it is not for the chat template, leave {name} out "
            f"of data.template_columns"
        ) from error


def _switches(value: Any, reserved: set[str], place: str) -> dict[str, Any]:
    """A row's own switches. One with nothing in it is not given: a column of a Parquet file has all in every row."""
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: chat_template_kwargs is {_told(value)}; allowed: a mapping, or that as JSON text")
    for name in value:
        if name in reserved:
            raise ConfigError(f"{place}: chat_template_kwargs: {name!r} is no switch of a template; it is set already")
    return {name: one for name, one in value.items() if one is not None}


def _told(value: Any) -> str:
    if not isinstance(value, list):
        return type(value).__name__
    odd = next(one for one in value if not (isinstance(one, dict) and one))
    return "a list with an empty mapping in it" if odd == {} else f"a list with {type(odd).__name__} in it"
