"""Structured outputs as OpenAI's `response_format` and vLLM's `structured_outputs` ask for them, and as older fields of
vLLM's and those of SGLang's do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from polyradix.grammar.spec import GrammarSpec
from polyradix.serve.errors import field_error

KINDS = ("text", "json_object", "json_schema", "regex", "grammar", "structural_tag")
EXTRAS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


ALIASES = {  # vLLM's before structured_outputs, then SGLang's
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}
NOTHING: Mapping[str, Any] = {}


def grammar(
    response_format: object, structured_outputs: object, more: Mapping[str, Any] = NOTHING
) -> GrammarSpec | None:
    """What the two fields ask for, or one of `more` that is an alias. Raises ApiError 400 that names the field."""
    found = {"response_format": _format(response_format), "structured_outputs": _extras(structured_outputs)}
    given = [name for name in ALIASES if more.get(name) is not None]
    found |= {name: _extra(ALIASES[name], more[name], name) for name in given}
    asked = {name: spec for name, spec in found.items() if spec is not None}
    if len(asked) > 1:
        first, *_, last = asked
        raise field_error(last, more.get(last, structured_outputs), f"nothing beside {first}")
    return next(iter(asked.values()), None)


def _format(value: Any) -> GrammarSpec | None:
    """`{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}` and its kin."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in KINDS:
        field = "response_format.type" if isinstance(value, dict) else "response_format"
        raise field_error(field, kind if isinstance(value, dict) else value, f"one of {', '.join(KINDS)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSpec(kind="json_object", field="response_format")
    if kind == "json_schema":
        inner = _checked(value.get("json_schema"), dict, "response_format.json_schema")
        return _schema(inner.get("schema"), "response_format.json_schema.schema")
    if kind == "structural_tag":
        return _tags(value, "response_format")
    source = _checked(value.get(kind), str, f"response_format.{kind}")
    return GrammarSpec(kind="regex" if kind == "regex" else "ebnf", source=source, field=f"response_format.{kind}")


def _extras(value: Any) -> GrammarSpec | None:
    if value is None:
        return None
    where = "structured_outputs"
    if not isinstance(value, dict):
        raise field_error(where, value, "an object")
    given = [name for name in EXTRAS if value.get(name) is not None]
    if len(given) != 1:
        raise field_error(where, value, f"exactly one of {', '.join(EXTRAS)}")
    return _extra(given[0], value[given[0]], f"{where}.{given[0]}")


def _extra(name: str, value: Any, field: str) -> GrammarSpec:
    """One of EXTRAS, as `field` has it."""
    if name == "json":
        return _schema(value, field)
    if name == "json_object":
        if value is not True:
            raise field_error(field, value, "true")
        return GrammarSpec(kind="json_object", field=field)
    if name == "choice":
        return GrammarSpec(kind="choice", source=json.dumps(_checked(value, list, field)), field=field)
    if name == "structural_tag":
        return _tags(value, field)
    return GrammarSpec(kind="regex" if name == "regex" else "ebnf", source=_checked(value, str, field), field=field)


def _tags(value: Any, field: str) -> GrammarSpec:
    """An object, or the text of one as vLLM wants it; its `type` says nothing new."""
    try:
        tags = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        tags = None
    if not isinstance(tags, dict):
        raise field_error(field, value, "an object with structures and triggers")
    tags = {name: part for name, part in tags.items() if name != "type"}
    return GrammarSpec(kind="structural_tag", source=json.dumps(tags), field=field)


def _schema(schema: Any, field: str) -> GrammarSpec:
    """A schema is an object, or the text of one."""
    if not isinstance(schema, dict | str):
        raise field_error(field, schema, "a JSON schema: an object")
    return GrammarSpec(
        kind="json_schema", source=schema if isinstance(schema, str) else json.dumps(schema), field=field
    )


def _checked(found: Any, kind: type, field: str) -> Any:
    if not isinstance(found, kind):
        wanted = "a string" if kind is str else "an object" if kind is dict else "a list of strings"
        raise field_error(field, found, wanted)
    return found
