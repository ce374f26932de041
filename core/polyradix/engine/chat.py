"""Chat templates: a model's own Jinja program that turns messages into a prompt, run in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """There is no template, or it does not accept these messages."""


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def compile_template(source: str) -> jinja2.Template:
    """With the globals and the whitespace rules that Hugging Face templates are written for."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return env.from_string(source)
    except jinja2.TemplateError as e:
        raise ChatTemplateError(f"the model's chat template is broken: {e}") from e


def render(template: jinja2.Template, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """Raises ChatTemplateError: whatever goes wrong inside is about the messages, for the template is the model's."""
    try:
        return template.render(messages=messages, **variables)
    except Exception as e:
        raise ChatTemplateError(f"the model's chat template rejects the messages: {e}") from e
