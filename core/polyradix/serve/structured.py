"""Structured outputs as OpenAI's `response_format` and vLLM's `structured_outputs` ask for them."""

from __future__ import annotations

import json
from typing import Any

from polyradix.grammar.spec import GrammarSpec
from polyradix.serve.errors import field_error

KINDS = ("text", "json_object", "json_schema", "regex", "grammar", "structural_tag")
EXTRAS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def grammar(response_format: object, structured_outputs: object) -> GrammarSpec | None:
    """What the two fields ask for. Raises ApiError 400 that names the field."""
    first, second = _format(response_format), _extras(structured_outputs)
    if first is not None and second is not None:
        raise field_error("structured_outputs", structured_outputs, "nothing beside response_format")
    return first or second


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
        return _schema(_member(value, "json_schema", dict, "response_format"), "schema", "response_format.json_schema")
    if kind == "structural_tag":
        return _tags(value, "response_format")
    source = _member(value, kind, str, "response_format")
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
    name = given[0]
    field = f"{where}.{name}"
    if name == "json":
        return _schema(value, name, where)
    if name == "json_object":
        if value[name] is not True:
            raise field_error(field, value[name], "true")
        return GrammarSpec(kind="json_object", field=field)
    if name == "choice":
        return GrammarSpec(kind="choice", source=json.dumps(_member(value, name, list, where)), field=field)
    if name == "structural_tag":
        return _tags(value[name], field)
    source = _member(value, name, str, where)
    return GrammarSpec(kind="regex" if name == "regex" else "ebnf", source=source, field=field)


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


def _schema(value: dict[str, Any], name: str, where: str) -> GrammarSpec:
    """A schema is an object, or the text of one."""
    schema, field = value.get(name), f"{where}.{name}"
    if not isinstance(schema, dict | str):
        raise field_error(field, schema, "a JSON schema: an object")
    return GrammarSpec(
        kind="json_schema", source=schema if isinstance(schema, str) else json.dumps(schema), field=field
    )


def _member(value: dict[str, Any], name: str, kind: type, where: str) -> Any:
    found = value.get(name)
    if not isinstance(found, kind):
        wanted = "a string" if kind is str else "an object" if kind is dict else "a list of strings"
        raise field_error(f"{where}.{name}", found, wanted)
    return found
