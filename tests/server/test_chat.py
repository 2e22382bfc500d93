"""`/v1/chat/completions`: templates, tools, forms that bind the answer."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from longspan.request import CompletionOutput, FinishReason, RequestOutput, SamplingParams
from longspan.server.async_engine import Job
from longspan.server.chat import ChatBody, ChatReply
from longspan.server.conversation import Message, conversation
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


def tool(name: str, /, **properties: Any) -> dict[str, Any]:
    """A tool whose arguments are all required."""
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOWN = tool("town", name={"$ref": "#/$defs/names"})
TOWN["function"]["parameters"]["$defs"] = {"names": {"enum": ["}, {", '["]']}}  # like the marks of a list of calls
TIME = tool("time", zone={"$ref": "#/$defs/names"})
TIME["function"]["parameters"]["$defs"] = {"names": {"enum": [0, 1]}}


def streamed_calls(client: openai.OpenAI, **fields: Any) -> tuple[list[tuple[str, str]], str]:
    """(name, arguments) of each call as a stream puts them together, and the finish reason."""
    names, arguments, reason = [], [], None
    for chunk in ask(client, **fields, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or ():
            if piece.function.name is not None:
                assert piece.index == len(names)
                names.append(piece.function.name)
                arguments.append("")
            arguments[piece.index] += piece.function.arguments
        reason = chunk.choices[0].finish_reason or reason
    return list(zip(names, arguments, strict=True)), reason


def test_a_named_tool_is_called_with_arguments_of_its_schema_and_ends_with_stop(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    fields = {"tools": [WEATHER, TOWN], "tool_choice": choice, "temperature": 1, "seed": 1}
    whole = ask(client, **fields).choices[0]
    (call,) = whole.message.tool_calls
    assert (call.function.name, whole.finish_reason, whole.message.content) == ("weather", "stop", None)
    assert json.loads(call.function.arguments)["days"] in (1, 2)
    assert streamed_calls(client, **fields) == ([("weather", call.function.arguments)], "stop")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_required_call_is_one_or_more_of_any_of_the_tools_each_with_its_own_schema(client, seed):
    fields = {"tools": [TOWN, TIME], "tool_choice": "required", "temperature": 1, "seed": seed}
    whole = ask(client, **fields).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    for name, arguments in calls:
        (value,) = json.loads(arguments).values()
        assert value in {"town": ["}, {", '["]'], "time": [0, 1]}[name]
    assert len({call.id for call in whole.message.tool_calls}) == len(calls)
    assert streamed_calls(client, **fields) == (calls, "tool_calls")


def test_required_calls_are_several_unless_parallel_calls_are_refused(client):
    comma = {"12": 90}  # calls are followed by a comma, so by another call
    fields = {"tools": [TIME], "tool_choice": "required", "logit_bias": comma, "max_tokens": 200}
    several = ask(client, **fields).choices[0]
    assert (len(several.message.tool_calls) > 1, several.finish_reason) == (True, "length")
    one = ask(client, **fields, parallel_tool_calls=False).choices[0]
    assert (len(one.message.tool_calls), one.finish_reason) == (1, "tool_calls")


def test_allowed_tools_are_the_only_ones_that_are_shown_or_called(client):
    def fields(mode: str) -> dict[str, Any]:
        named = [{"type": "function", "function": {"name": "time"}}]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
        return {"tools": [TOWN, TIME], "tool_choice": choice, "max_tokens": 60}

    free, bound = ask(client, **fields("auto")), ask(client, **fields("required"), temperature=1, seed=4)
    assert free.usage.prompt_tokens == bound.usage.prompt_tokens == len("[time]" + RENDERED)
    assert free.choices[0].message.content == expected("[time]" + RENDERED, 60)
    assert {call.function.name for call in bound.choices[0].message.tool_calls} == {"time"}


def test_the_last_message_is_continued_on_request(server):
    talk = [*TALK, {"role": "assistant", "content": "Well"}]
    body = {"messages": talk, "max_tokens": 6, "temperature": 0, "continue_final_message": True}
    answer = server.post("/v1/chat/completions", body).json()
    continued = f"{RENDERED}Well"
    assert answer["usage"]["prompt_tokens"] == len(continued)
    assert answer["choices"][0]["message"]["content"] == expected(continued, 6)


def test_a_template_may_leave_out_the_beginning_of_an_answer(server):
    body = {"messages": TALK, "max_tokens": 1, "add_generation_prompt": False}
    answer = server.post("/v1/chat/completions", body).json()
    told = server.post("/tokenize", {"messages": TALK, "add_generation_prompt": False}).json()
    assert answer["usage"]["prompt_tokens"] == told["count"] == len(RENDERED.removesuffix("assistant: "))


def test_an_answer_has_the_id_and_the_scores_that_its_request_asks_for(server):
    body = {"messages": TALK, "max_tokens": 1, "request_id": "mine", "prompt_logprobs": 0}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["id"] == "chatcmpl-mine"
    first, *rest = answer["prompt_logprobs"]
    assert (first, len(rest), {len(row) for row in rest}) == (None, len(RENDERED) - 1, {1})


def test_the_end_of_a_conversation_is_kept_on_request(server):
    body = {"messages": TALK, "max_tokens": 6, "temperature": 0, "truncate_prompt_tokens": 11}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["content"] == expected("assistant: ", 6)


def test_a_server_may_have_another_template_and_defaults_of_sampling(strict):
    """Greedy without being asked: the default of the generation config."""
    answer = strict.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 6}).json()
    assert answer["choices"][0]["message"]["content"] == expected("own: Be brief.>", 6)


def test_a_request_may_bring_its_template_where_the_server_trusts_it_and_documents_for_it(strict):
    fields = {
        "messages": TALK, "max_tokens": 6, "documents": [{"title": "Tea", "text": "is hot"}],
        "chat_template": "{{ documents[0].title }}|{{ messages[0].content }}|{{ tone }}|",
        "chat_template_kwargs": {"tone": "dry"},
    }  # fmt: skip
    answer = strict.post("/v1/chat/completions", fields).json()
    assert answer["choices"][0]["message"]["content"] == expected("Tea|Be brief.|dry|", 6)


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
