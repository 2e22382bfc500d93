"""`/v1/chat/completions`: templates, tools, forms that bind the answer."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from longspan.request import CompletionOutput, FinishReason, RequestOutput, SamplingParams
from longspan.server.async_engine import Job
from longspan.server.chat import ChatBody, ChatReply, Message, conversation
from longspan.server.text import Text
from tests.server.running import Running, ascii_tokenizer, expected

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
RENDERED = "system: Be brief.\nuser: Hello\nassistant: "
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"days": {"enum": [1, 2]}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": TALK, "temperature": 0, **fields})


def test_the_answer_follows_the_rendered_template(client):
    answer = ask(client, max_completion_tokens=12)
    assert answer.choices[0].message.content == expected(RENDERED, 12)
    assert answer.usage.prompt_tokens == len(RENDERED)


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(client):
    chunks = list(ask(client, max_tokens=8, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(RENDERED, 8)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_parts_of_text_are_joined_and_developers_are_systems(client):
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    messages = [{"role": "developer", "content": parts}, TALK[1]]
    assert ask(client, messages=messages, max_tokens=6).choices[0].message.content == expected(RENDERED, 6)


def test_without_a_limit_the_answer_ends_with_the_context(client):
    answer = ask(client)
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (512, "length")


def test_log_probabilities_come_with_alternatives_and_bytes(client):
    rows = ask(client, max_tokens=3, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(rows) == 3
    assert rows[0].logprob == rows[0].top_logprobs[0].logprob >= rows[0].top_logprobs[1].logprob
    assert bytes(rows[0].bytes).decode() == rows[0].token


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_in_json_follows_its_schema(client, temperature):
    schema = {
        "type": "object", "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema, "strict": True}}
    answer = ask(client, response_format=form, temperature=temperature, n=3, seed=3)
    for choice in answer.choices:
        if choice.finish_reason == "stop":  # a random model may write spaces to the end
            found = json.loads(choice.message.content)
            assert isinstance(found["a"], int)
            assert found["b"] in ("x", "y")
        else:
            assert choice.message.content.startswith("{")
    if temperature:
        assert {choice.finish_reason for choice in answer.choices} >= {"stop"}


def test_a_tool_that_must_be_called_is_with_arguments_of_its_schema(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    fields = {"tools": [WEATHER], "tool_choice": choice, "temperature": 1, "seed": 1}
    whole = ask(client, **fields).choices[0]
    (call,) = whole.message.tool_calls
    assert (call.function.name, whole.finish_reason, whole.message.content) == ("weather", "tool_calls", None)
    assert json.loads(call.function.arguments)["days"] in (1, 2)
    deltas = [
        chunk.choices[0].delta.tool_calls[0]
        for chunk in ask(client, **fields, stream=True)
        if chunk.choices[0].delta.tool_calls
    ]
    assert deltas[0].function.name == "weather"
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments


def reply_to(text: str, **fields: Any) -> tuple[ChatReply, RequestOutput]:
    """A reply whose model has said `text`."""
    body = ChatBody(messages=TALK, tools=[WEATHER], **fields)
    reply = ChatReply(body, Job([1], SamplingParams()), Text(ascii_tokenizer(), 512), "tiny", "hermes", None)
    said = CompletionOutput(0, text, [1, 2], None, FinishReason.STOP)
    return reply, RequestOutput("r0", None, [1], [said], True)


def test_calls_in_the_text_become_tool_calls():
    reply, output = reply_to('Well. <tool_call>{"name": "weather", "arguments": {"days": 1}}</tool_call>')
    choice = reply.whole([output])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well. "
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"days": 1}


def test_streamed_calls_carry_their_number():
    call = '<tool_call>{"name": "weather", "arguments": {"days": 1}}</tool_call>'
    reply, output = reply_to(call + call)
    reply.open([output])
    (chunk,) = reply.chunks([output])
    assert [made["index"] for made in chunk["choices"][0]["delta"]["tool_calls"]] == [0, 1]
    assert chunk["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_reach_the_template_unless_none_may_be_called(server):
    body = {"messages": TALK, "max_tokens": 4, "tools": [WEATHER], "temperature": 0}
    said = [
        server.post("/v1/chat/completions", {**body, "tool_choice": choice}).json()["usage"]["prompt_tokens"]
        for choice in ("auto", "none")
    ]
    assert said == [len("[weather]" + RENDERED), len(RENDERED)]


def test_arguments_of_earlier_calls_reach_the_template_as_objects():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    odd = {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{"}}
    message = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call, odd]})
    (rendered,), _ = conversation([message], None)
    arguments = [made["function"]["arguments"] for made in rendered["tool_calls"]]
    assert arguments == [{"a": 1}, "{"]


def test_token_ids_are_streamed_even_while_text_is_held_back():
    reply, output = reply_to('<tool_call>{"name": "wea', return_token_ids=True)
    output.outputs[0].finish_reason = None
    reply.open([output])
    output.outputs[0].text += "ther"
    output.outputs[0].token_ids = [1, 2, 3]
    (chunk,) = reply.chunks([output])
    assert chunk["choices"][0]["token_ids"] == [1, 2, 3]
    assert not chunk["choices"][0]["delta"]


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_tensors", "max_length", "tools"])
def test_template_options_cannot_replace_the_template_or_what_it_returns(server, name):
    body = {"messages": TALK, "max_tokens": 1, "chat_template_kwargs": {name: "x"}}
    answer = server.post("/v1/chat/completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"chat_template_kwargs.{name}")


def test_a_grammar_that_fails_on_the_way_ends_its_own_request_only(server):
    schema = {"type": "string", "pattern": "(.{0,300}a.{0,300}){1,30}"}  # fine at first, too large after some tokens
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": TALK, "logit_bias": {"65": 60.0}, "temperature": 0, "response_format": form}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 400, answer.text
    assert "cannot be followed" in answer.json()["error"]["message"]
    assert server.engine.restarts == 0
