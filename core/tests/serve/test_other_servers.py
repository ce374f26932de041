"""Fields and answers that clients of vLLM and SGLang rely on; the fake engine's output is the prompt."""

from __future__ import annotations

import itertools
import json
from typing import Any

import openai
import pytest

from polyradix.serve.fake import ByteTokenizer, FakeEngine

TEXT, CHAT, NATIVE = "/v1/completions", "/v1/chat/completions", "/generate"


def text(live: Any, prompt: Any, **fields: Any) -> tuple[str, str]:
    (choice,) = live.post(TEXT, {"prompt": prompt, "max_tokens": 100, **fields}).json()["choices"]
    return choice["text"], choice["finish_reason"]


def events(live: Any, path: str, body: dict[str, Any]) -> list[Any]:
    lines = live.post(path, body | {"stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.parametrize(
    ("field", "value", "kind", "source"),
    [
        ("guided_json", {"type": "null"}, "json_schema", '{"type": "null"}'),
        ("guided_regex", "a+", "regex", "a+"),
        ("guided_choice", ["a", "b"], "choice", '["a", "b"]'),
        ("guided_grammar", 'root ::= "a"', "ebnf", 'root ::= "a"'),
        ("json_schema", '{"type": "null"}', "json_schema", '{"type": "null"}'),
        ("regex", "a+", "regex", "a+"),
        ("ebnf", 'root ::= "a"', "ebnf", 'root ::= "a"'),
    ],
)
def test_grammars_by_other_names(live: Any, field: str, value: Any, kind: str, source: str) -> None:
    live.post(TEXT, {"prompt": "x", field: value})
    live.post(CHAT, {"messages": [{"role": "user", "content": "x"}], field: value})
    live.post(NATIVE, {"text": "x", "sampling_params": {field: value}})
    found = [submit.params.grammar for submit in live.engine.submits]
    assert [(g.kind, g.source, g.field) for g in found] == [(kind, source, field)] * 3


def test_stop_strings_may_be_kept(live: Any) -> None:
    assert text(live, "one two three", stop=["two"]) == ("one ", "stop")
    assert text(live, "one two three", stop=["two"], include_stop_str_in_output=True) == ("one two", "stop")
    many = {"stop": [chr(65 + i) for i in range(26)]}
    assert text(live, "one Q", **many) == ("one ", "stop")
    body = {"prompt": "one two three", "max_tokens": 50, "stop": ["two"], "include_stop_str_in_output": True}
    chunks = events(live, TEXT, body | {"logprobs": 1})
    assert "".join(c["choices"][0]["text"] for c in chunks) == "one two"
    tokens = [t for c in chunks if c["choices"][0]["logprobs"] for t in c["choices"][0]["logprobs"]["tokens"]]
    assert "".join(tokens) == "one two"


def test_special_tokens_may_be_shown(make_live: Any) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.special_ids = frozenset({256, ord("x")})
    with make_live(FakeEngine(), tokenizer) as live:
        assert text(live, "axb")[0] == "ab"
        assert text(live, "axb", skip_special_tokens=True)[0] == "ab"
        assert text(live, "axb", skip_special_tokens=False)[0] == "axb"


def test_prompts_may_be_cut_from_the_left(live: Any) -> None:
    assert text(live, "abcdef", truncate_prompt_tokens=2)[0] == "ef"
    assert text(live, list(b"abcdef"), truncate_prompt_tokens=2)[0] == "ef"
    assert text(live, "abcdef", truncate_prompt_tokens=2, echo=True)[0] == "efef"
    assert text(live, "a" * 300 + "z", truncate_prompt_tokens=-1) == ("a", "length")
    live.post(CHAT, {"messages": [{"role": "user", "content": "x" * 10_000}], "truncate_prompt_tokens": 8})
    assert bytes(live.engine.submits[-1].tokens[::4]) == b"x" * 7 + b"\n"
    assert (
        live.error(TEXT, {"prompt": "a" * 300, "truncate_prompt_tokens": 280})[1]["code"] == "context_length_exceeded"
    )


def test_usage_in_every_chunk(live: Any) -> None:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="x") as client:
        options: Any = {"include_usage": True, "continuous_usage_stats": True}
        stream = client.completions.create(
            model="fake", prompt="abcd", max_tokens=9, stream=True, stream_options=options
        )
        chunks = list(stream)
    said = itertools.accumulate("".join(choice.text for choice in chunk.choices) for chunk in chunks)
    for chunk, before in zip(chunks, said, strict=True):
        assert chunk.usage is not None
        assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) == (4, len(before))
    assert chunks[-1].choices == []


def prompt_text(live: Any, **fields: Any) -> str:
    """What the engine was asked, which /tokenize counts as well."""
    live.post(CHAT, {"max_tokens": 1, **fields}).raise_for_status()
    ids = list(live.engine.submits[-1].tokens[::4])
    assert live.post("/tokenize", fields).json()["tokens"] == ids
    return bytes(ids).decode()


def test_a_final_message_goes_on(live: Any) -> None:
    asked = {"role": "user", "content": "Sea"}
    begun = {"role": "assistant", "content": [{"type": "text", "text": "The s"}, {"type": "text", "text": "ea "}]}
    both = [asked, begun]
    assert prompt_text(live, messages=both) == "user: Sea\nassistant: The sea \n"
    assert prompt_text(live, messages=both, add_generation_prompt=False).endswith("\nadd_generation_prompt=False")
    for more in ({}, {"add_generation_prompt": False}):
        found = prompt_text(live, messages=both, continue_final_message=True, **more)
        assert found == "user: Sea\nassistant: The sea "
    body = {"messages": both, "continue_final_message": True, "add_generation_prompt": True}
    assert live.error(CHAT, body)[1]["param"] == "continue_final_message"


def test_reasoning_of_earlier_turns_by_either_name() -> None:
    from polyradix.serve.openai import ChatRequest, chat_messages

    for name in ("reasoning", "reasoning_content"):
        turn = {"role": "assistant", "content": "a", name: "because"}
        assert chat_messages(ChatRequest.model_validate({"messages": [turn]}))[0]["reasoning_content"] == "because"


def test_add_special_tokens(make_live: Any) -> None:
    class WithBos(ByteTokenizer):
        def encode(self, text: str, add_special: bool = True) -> list[int]:
            return [ord("^")] * add_special + list(text.encode())

    with make_live(FakeEngine(), WithBos()) as live:
        assert text(live, "a")[0] == "^a"
        assert text(live, "a", add_special_tokens=False)[0] == "a"


def test_sglang_generate(live: Any) -> None:
    params = {"temperature": 0, "max_new_tokens": 3, "sampling_seed": 5, "min_new_tokens": 1, "top_k": None}
    answer = live.post(NATIVE, {"text": "abcdef", "sampling_params": params}).json()
    assert answer["text"] == "abc"
    assert answer["output_ids"] == [97, 98, 99]
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 3}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (6, 3, 0)
    submit = live.engine.submits[-1]
    assert (submit.params.seed, submit.params.temperature, submit.params.min_tokens) == (5, 0, 1)
    assert meta["id"] == submit.rid
    live.post(NATIVE, {"text": "abcdef"})
    assert live.engine.submits[-1].params.max_tokens == 128


def test_sglang_logprobs_stop_and_stream(live: Any, make_live: Any, paced: Any) -> None:
    body = {"input_ids": list(b"one two three"), "sampling_params": {"stop": ["two"], "no_stop_trim": True}}
    whole = live.post(NATIVE, body | {"return_logprob": True, "top_logprobs_num": 1}).json()
    assert whole["text"] == "one two"
    assert whole["meta_info"]["finish_reason"] == {"type": "stop", "matched": "two"}
    assert whole["meta_info"]["output_token_logprobs"] == [[-0.5, token, None] for token in b"one two"]
    assert whole["meta_info"]["output_top_logprobs"] == [[[-1.0, 97, None]]] * 7
    with make_live(paced()) as slow:
        parts = events(slow, NATIVE, body)
    texts = [part["text"] for part in parts]
    assert texts[-1] == "one two"
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert parts[0]["meta_info"]["finish_reason"] is None
    ended = live.post(NATIVE, {"input_ids": [97, 256], "return_logprob": False, "sampling_params": {}}).json()
    assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": 256}


def test_the_native_answer_stays(live: Any) -> None:
    answer = live.post(NATIVE, {"input_ids": [97, 98], "stop": ["b"]}).json()
    assert set(answer) == {"id", "output_ids", "logprobs", "finish_reason", "usage"}
    assert answer["finish_reason"] == "stop"
