"""From what a model writes to text, reasoning and tool calls. One file for each format; a new one is a line in TOOLS.

The format is taken from the model's chat template, unless the server was told.
"""

from __future__ import annotations

from collections.abc import Callable

from polyradix.serve.parsers.base import Format
from polyradix.serve.parsers.deepseek import BAR, BEGIN, DeepSeek
from polyradix.serve.parsers.harmony import CHANNEL, Harmony
from polyradix.serve.parsers.hermes import Hermes
from polyradix.serve.parsers.llama3 import Llama3
from polyradix.serve.parsers.mistral import ARGS, Mistral
from polyradix.serve.parsers.qwen_coder import PARAMETER, QwenCoder

# By name: what a chat template of such a model has in it, and how to make the parser for the template.
TOOLS: dict[str, tuple[str, Callable[[str], Format]]] = {
    "gpt-oss": (CHANNEL, lambda template: Harmony()),
    "deepseek": (BEGIN, lambda template: DeepSeek(fenced="```json" in template or not template)),
    "mistral": ("[TOOL_CALLS]", lambda template: Mistral(named=ARGS in template)),
    "qwen3-coder": (PARAMETER, lambda template: QwenCoder()),
    "hermes": ("<tool_call>", lambda template: Hermes()),
    "llama3": ("<|python_tag|>", lambda template: Llama3()),
}
ALIASES = {"qwen": "hermes"}
REASONING = {"gpt-oss": (CHANNEL,), "deepseek-r1": ("think>", f"{BAR}Assistant{BAR}"), "qwen3": ("<think>",)}
TOOL_NAMES = ("auto", "none", *TOOLS, *ALIASES)
REASONING_NAMES = ("auto", "none", *REASONING)


def tool_format(name: str, template: str) -> Format | None:
    """By the name of a parser, or for `auto` as the template has it. Raises KeyError for an unknown name."""
    if name == "auto":
        name = next((n for n, (mark, _) in TOOLS.items() if mark in template), "none")
    return None if name == "none" else TOOLS[ALIASES.get(name, name)][1](template)


def reasoning_format(name: str, template: str) -> str:
    """The name of a reasoning parser; "" for none."""
    if name == "auto":
        name = next((n for n, marks in REASONING.items() if all(m in template for m in marks)), "none")
    return "" if name == "none" else name
