"""Chat templates as Hugging Face transformers reads them: the same sandbox, filters and functions, so the same text.

Source of the conventions: ``transformers.utils.chat_template_utils`` (the names, not the code).
"""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

from jinja2 import Environment, Template, meta, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["compile_template", "variables_of"]


def compile_template(source: str) -> Template:
    """The template, ready to render with ``messages``, ``add_generation_prompt`` and the special tokens by name.

    Raises:
        jinja2.TemplateError: its syntax is wrong.
    """
    return _environment().from_string(source)


def variables_of(source: str) -> set[str]:
    """Names that a template reads and does not set itself, but for the functions that all templates have.

    Raises:
        jinja2.TemplateError: its syntax is wrong.
    """
    environment = _environment()
    return meta.find_undeclared_variables(environment.parse(source)) - environment.globals.keys()


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """``{% generation %}`` marks an assistant's words for training; here they are ordinary words."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it without ClassVar

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja2's own filter: no HTML escapes.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)  # noqa: DTZ005 - the server's local date, as in transformers
