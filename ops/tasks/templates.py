"""A tokenizer's chat templates: the choice among several, and the names of their arguments."""

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

Message = dict[str, Any]  # role, content, and other keys that the template reads
DEFAULT, TOOL_USE = "default", "tool_use"  # names with a meaning in transformers
# Errors that a template may raise itself: for a wrong index, name, sum or type.
_RAISED = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Templates:
    """The templates of a config's prompts: one, or another one for rows with tools.

    As in transformers: `tool_use` for a row with tools, else `default`; data.template names one for all rows.
    Raises ConfigError if there is none, or if the choice is ambiguous.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self._tokenizer, self._options = tokenizer, data.template_options
        self._by_name = _chosen(_named(tokenizer.chat_template), data.template)
        # Names reserved by apply_chat_template: as a switch they would be an error in every row.
        self.reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
        self.reserved |= set(tokenizer.special_tokens_map)
        for name, value in self._options.items():
            where = f"data.template_options.{name}"
            if name in self.reserved:
                raise ConfigError(f"{where}: {name!r} is not a switch of a template; Katana sets it")
            if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in self._by_name.values()):
                raise ConfigError(f"{where}: the student's chat template has no such switch")
            if found := special_text(tokenizer).search(str(value)):
                raise ConfigError(f"{where}: contains {found[0]!r}, which the tokenizer reads as a special token")

    @property
    def names(self) -> tuple[str, ...]:
        """Those in use."""
        return tuple(self._by_name)

    @property
    def digest(self) -> str:
        """Digest of the names and texts of those in use."""
        return hashlib.blake2b(json.dumps(self._by_name).encode(), digest_size=16).hexdigest()

    def name(self, extras: Mapping[str, Any]) -> str:
        """The template for a row."""
        return TOOL_USE if extras.get("tools") and TOOL_USE in self._by_name else next(iter(self._by_name))

    def apply(
        self,
        messages: list[Message],
        extras: Mapping[str, Any],
        place: str,
        *,
        name: str | None = None,
        add_generation_prompt: bool = True,
        **switches: Any,
    ) -> str:
        """The text rendered by a template. `extras`: tools, documents, chat_template_kwargs. Raises ConfigError."""
        template = self._by_name[name or self.name(extras)]
        given = self._options | dict(extras.get("chat_template_kwargs") or {}) | switches
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tools=extras.get("tools"),
                documents=extras.get("documents"),
                **given,
            )
        except _RAISED as error:
            raise ConfigError(f"{place}: the chat template refuses the prompt ({error!s:.200})") from error
        return text


def _named(template: Any) -> dict[str, str]:
    """Templates by name; one without a name is the default, as in transformers."""
    if not template:
        raise ConfigError("data.chat: the student's tokenizer has no chat template (chat_template.jinja)")
    named = template if isinstance(template, dict) else {DEFAULT: template}
    for name, text in named.items():
        if not isinstance(text, str):
            raise ConfigError(f"data.chat: the student's chat template {name!r} is {type(text).__name__}, not text")
    return named


def _chosen(named: dict[str, str], wanted: str | None) -> dict[str, str]:
    """The template named `wanted`; without a name, the default, followed by the one for tools."""
    known = ", ".join(sorted(named))
    if wanted is not None:
        if wanted not in named:
            raise ConfigError(f"data.template: {wanted!r} is not a chat template of the student; there are: {known}")
        return {wanted: named[wanted]}
    if DEFAULT not in named:
        raise ConfigError(
            f"data.template: the student's tokenizer has named chat templates ({known}) and none is called "
            f"{DEFAULT!r}: set data.template to one of them"
        )
    return {name: named[name] for name in (DEFAULT, TOOL_USE) if name in named}


def special_text(tokenizer: Any) -> re.Pattern[str]:
    """A pattern that finds special tokens spelled in a text."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = {text for text in added | set(tokenizer.all_special_tokens) if text}
    return re.compile("|".join(map(re.escape, sorted(texts))) or r"(?!)")


def read_extras(columns: Mapping[str, Any], reserved: set[str], place: str) -> dict[str, Any]:
    """The columns besides the prompt, in the form that a template expects; empty ones are left out.

    Each may be JSON text, as data sets store values whose type differs between rows. Raises ConfigError.
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
                f"{place}: {name} is {_kind(value)}; allowed: a list of mappings, or that as JSON text; if it is not "
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
            f"{place}: {name} is text, but not JSON ({error}); if it is not for the chat template, leave {name} out "
            f"of data.template_columns"
        ) from error


def _switches(value: Any, reserved: set[str], place: str) -> dict[str, Any]:
    """A row's own switches. Null ones are left out: a column of a Parquet file has all switches in every row."""
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: chat_template_kwargs is {_kind(value)}; allowed: a mapping, or that as JSON text")
    for name in value:
        if name in reserved:
            raise ConfigError(
                f"{place}: chat_template_kwargs: {name!r} is not a switch of a template; it is set already"
            )
    return {name: one for name, one in value.items() if one is not None}


def _kind(value: Any) -> str:
    if not isinstance(value, list):
        return type(value).__name__
    odd = next(one for one in value if not (isinstance(one, dict) and one))
    return "a list that contains an empty mapping" if odd == {} else f"a list that contains {type(odd).__name__}"
