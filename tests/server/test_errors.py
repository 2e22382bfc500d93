"""Bad input, as edge-cases lists it: OpenAI's shape, with the field, the value and the remedy; the server stays up."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from longspan.errors import ConfigError
from longspan.server.keys import KEY_VARIABLE, read_keys
from longspan.server.options import ServeOptions, parse_origins
from tests.server.running import Running, running

TALK = [{"role": "user", "content": "Hello"}]
COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"foo": 1}, "foo", "foo=1: unknown parameter"),
    ({"max_token": 1}, "max_token", "did you mean max_tokens?"),
    ({"temperature": "hot"}, "temperature", "temperature='hot': "),
    ({"temperature": -1}, "temperature", "temperature=-1.0: must be in 0..100"),
    ({"top_p": 0}, "top_p", "top_p=0.0: must be in (0, 1]"),
    ({"n": 0}, "n", "n=0: must be at least 1"),
    ({"n": 1000}, "n", "n=1000: must be at most 128"),
    ({"max_tokens": 600}, "max_tokens", "max_tokens=600: 3 prompt tokens and max_tokens=600 exceed the 512 tokens"),
    ({"max_completion_tokens": 600}, "max_completion_tokens", "max_completion_tokens=600: 3 prompt tokens and"),
    ({"prompt": "a" * 500}, "prompt", "500 prompt tokens and max_tokens=16 exceed the 512 tokens"),
    ({"prompt": "a" * 600}, "prompt", "prompt=[600 tokens]: 600 prompt tokens and max_tokens=16 exceed"),
    ({"prompt": [1] * 600, "max_tokens": 2}, "prompt", "prompt=[600 tokens]: 600 prompt tokens and"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens=-1: must not be negative"),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens=1.5: "),
    ({"prompt": ""}, "prompt", "is empty"),
    ({"prompt": []}, "prompt", "is empty"),
    ({"prompt": [97]}, "prompt", "prompt=97: is not in 0..96"),
    ({"prompt": [10**30]}, "prompt", "is not in 0..96"),
    ({"prompt": {"a": 1}}, "prompt", "prompt={'a': 1}: "),
    ({"prompt": None}, "prompt", "prompt=None: "),
    ({"logprobs": 21}, "logprobs", "must be at most 20"),
    ({"stop": ""}, "stop", "must not hold an empty string"),
    ({"stop": 5}, "stop", "stop=5: "),
    ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias='x': is no token id"),
    ({"logit_bias": {"500": 1}}, "logit_bias", "logit_bias=500: is not in 0..96"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "must be in [-100, 100]"),
    ({"stop_token_ids": [10**25]}, "stop_token_ids", "is not in 0..96"),
    ({"top_k": 10**25}, "top_k", "top_k="),
    ({"seed": -1}, "seed", "seed=-1: must be in 0..2^63-1"),
    ({"foo": 1, "temperature": "hot"}, "foo", "foo=1: unknown parameter"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "min_tokens=5: exceeds max_tokens=4"),
    ({"allowed_token_ids": [97]}, "allowed_token_ids", "allowed_token_ids=97: is not in 0..96"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "allows no token"),
    ({"bad_words": [""]}, "bad_words.0", "bad_words.0='': "),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "truncate_prompt_tokens=0: keeps nothing"),
    ({"priority": 3}, "priority", "use scheduling_policy=priority (--scheduling-policy priority)"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs=21: must be at most 20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "is not part of streams"),
    ({"guided_json": {}}, "guided_json", "unknown parameter; give a JSON schema in response_format in its place"),
    ({"suffix": "end"}, "suffix", "is not supported"),
    ({"best_of": 3}, "best_of", "is supported only if equal to n"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "'yaml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        "response_format.json_schema", "cannot be followed",
    ),
]  # fmt: skip
CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "messages=[]: "),
    ({"messages": None}, "messages", "messages=None: "),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "'king'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "is not text"),
    ({"messages": [{"role": "user", "content": "refuse"}]}, "messages", "no such talk"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens=0: leaves no room"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0: leaves no room"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens=-1: must not be negative"),
    ({"max_tokens": 600}, "max_tokens", "23 prompt tokens and max_tokens=600 exceed"),
    ({"max_completion_tokens": 600}, "max_completion_tokens", "max_completion_tokens=600: 23 prompt tokens and"),
    ({"messages": [{"role": "user", "content": "a" * 600}]}, "messages", "messages=[618 tokens]: "),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"tool_choice": "required"}, "tool_choice", "there are 0"),
    ({"tool_choice": "sometimes"}, "tool_choice", "tool_choice='sometimes': "),
    ({"tool_choice": 5}, "tool_choice", "tool_choice=5: "),
    (
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "always", "tools": []}}},
        "tool_choice.allowed_tools.mode", "'always'",
    ),
    (
        {"tool_choice": {"type": "allowed_tools",
                         "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": "f"}}]}}},
        "tool_choice.allowed_tools.tools", "tool_choice.allowed_tools.tools='f': is not among the tools",
    ),
    (
        {"tools": [{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "nonsense"}}}}}],
         "tool_choice": "required"}, "tools.function.parameters", "cannot be followed",
    ),
    ({"chat_template": "x"}, "chat_template", "start the server with --trust-request-chat-template"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt", "give one of the two"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name",
        "is not among the tools",
    ),
]  # fmt: skip


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object, once its shape is checked."""
    assert answer.status_code == status, answer.text
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(("fields", "param", "message"), COMPLETIONS)
def test_a_completion_names_what_is_wrong_with_it(server: Running, fields, param, message):
    error = refused(server.post("/v1/completions", {"prompt": "abc", **fields}))
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "message"), CHATS)
def test_a_chat_names_what_is_wrong_with_it_before_a_stream_begins(server: Running, fields, param, message, stream):
    error = refused(server.post("/v1/chat/completions", {"messages": TALK, "stream": stream, **fields}))
    assert error["param"] == param
    assert message in error["message"]


def test_a_field_that_changes_nothing_here_is_taken_with_one_line_in_the_log(server: Running, caplog):
    caplog.set_level("WARNING", "longspan.server")
    for _ in range(2):
        server.complete("abc", 1, spaces_between_special_tokens=False)
    (line,) = [record.getMessage() for record in caplog.records if "spaces_between" in record.getMessage()]
    assert (
        line == "requests give spaces_between_special_tokens, which changes nothing here: the tokenizer decides on them"
    )
    refused(server.post("/tokenize", {"prompt": "a", "spaces_between_special_tokens": True}))


def test_a_long_prompt_with_one_wrong_id_is_one_error(server: Running):
    error = refused(server.post("/v1/completions", {"prompt": [*[1] * 200_000, "a"]}))
    assert error["param"].startswith("prompt")
    assert len(error["message"]) < 400


BODIES = {
    "empty": b"",
    "no JSON": b"{",
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": 1e999}',
    "a list": b"[1]",
    "text": b'"prompt"',
    "null": b"null",
    "a thousand brackets": b"[" * 100_000,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_object_is_refused(server: Running, body):
    refused(server.client.post("/v1/completions", content=body, headers={"content-type": "application/json"}))


def test_a_missing_field_is_named(server: Running):
    error = refused(server.post("/v1/chat/completions", {}))
    assert (error["param"], error["code"]) == ("messages", "missing_parameter")


def test_an_unknown_model_is_not_found(server: Running):
    error = refused(server.post("/v1/completions", {"model": "gpt", "prompt": "a"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "use 'tiny'" in error["message"]
    refused(server.client.get("/v1/models/gpt"), 404)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)])
def test_a_wrong_path_or_method_has_the_same_shape(server: Running, method, path, status):
    refused(server.client.request(method, path), status)


def test_no_answer_leads_where_the_clients_host_header_says(server: Running):
    for path in ("/health/", "/v1/models/", "/internal/state/"):
        answer = server.client.get(path, headers={"host": "elsewhere.example"})
        refused(answer, 404)
        assert "elsewhere" not in f"{answer.headers}{answer.text}"


def test_a_path_that_is_not_served_names_those_that_are(server: Running):
    message = refused(server.client.get("/v1/complete"), 404)["message"]
    assert message.startswith("GET '/v1/complete': is not served; there are POST /v1/completions,")
    assert "GET /v1/models/{name}, GET /health" in message
    message = refused(server.post("/v1/embeddings", {"input": "a"}), 404)["message"]
    assert (
        message
        == "path='/v1/embeddings': this server generates text and does nothing else; ask a server of another kind"
    )


def test_a_page_of_an_allowed_origin_may_call_the_server_and_no_other(strict: Running, server: Running):
    def preflight(at: Running, origin: str) -> httpx.Response:
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
        return httpx.options(f"{at.url}/v1/completions", headers=asked)

    allowed = preflight(strict, "https://a.example")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-origin" not in preflight(strict, "https://b.example").headers
    assert "access-control-allow-origin" not in preflight(server, "https://a.example").headers


@pytest.mark.parametrize("text", ["a.example", "https://a.example/page", "https://a.example, b"])
def test_an_origin_is_a_scheme_and_a_host(text):
    with pytest.raises(ConfigError, match=r"allowed_origins=.*: is no origin; write it as https://HOST"):
        parse_origins("allowed_origins", text)


def test_token_ids_that_are_none_are_refused(server: Running):
    assert "is not in 0..96" in refused(server.post("/detokenize", {"tokens": [97]}))["message"]
    assert refused(server.post("/tokenize", {}))["param"] == "prompt"


def test_nothing_is_left_behind_by_refusals(server: Running):
    refused(server.post("/v1/completions", {"prompt": ["fine", ""]}))
    assert server.used_pages() == 0
    assert len(server.engine.output_processor) == 0


def test_every_key_of_a_file_opens_a_server_and_no_other_does(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the two of us\nalice: open-a\n\nbob:open:b\n")
    with running(options=ServeOptions(port=0, api_key_file=str(file)).with_secrets({})) as server:
        assert [key.name for key in server.service.options.keys] == ["alice", "bob"]

        def status(key):
            return httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        assert [status(key) for key in ("open-a", "open:b")] == [200, 200]
        assert [status(key) for key in ("open-c", "alice", "bob", "alice: open-a")] == [401] * 4


def test_a_key_comes_from_the_environment_if_no_option_names_any(tmp_path):
    file = tmp_path / "key"
    file.write_text("of-the-file\n")
    around = {KEY_VARIABLE: "of-the-environment\n"}
    found = lambda **options: [one.key for one in ServeOptions(**options).with_secrets(around).keys]  # noqa: E731
    assert found() == ["of-the-environment"]
    assert found(api_key="given") == ["given"]
    assert found(api_key_file=str(file)) == ["of-the-file"]
    assert found(api_key="given", api_key_file=str(file)) == ["given", "of-the-file"]
    assert ServeOptions().with_secrets({}).keys == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no key"), ("# nothing\n", "has no key"), ("alice:\n", "line 1: holds a key that is empty"),
        ("alice: x9 9x\n", "line 1: holds a key"), ("a:x9\na:9x\n", "line 2: a second key is called a"),
        (None, "cannot be read"),
    ],
)  # fmt: skip
def test_a_file_of_keys_that_cannot_be_is_named_and_no_key_is_shown(tmp_path, text, problem):
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=f"^api_key_file={file}.*{problem}") as error:
        ServeOptions(api_key_file=str(file)).with_secrets({})
    assert "x9" not in str(error.value) and "9x" not in str(error.value)


def test_an_empty_key_in_the_environment_opens_no_server():
    with pytest.raises(ConfigError, match=f"^{KEY_VARIABLE}="):
        ServeOptions().with_secrets({KEY_VARIABLE: " "})


def test_keys_are_shown_to_nobody():
    options = ServeOptions(api_key="sesame").with_secrets({})
    assert "sesame" not in repr(options) and "secret" not in repr(read_keys(None, {KEY_VARIABLE: "secret"}))


def test_a_server_with_a_key_is_open_to_nobody_else(strict: Running):
    for key in (None, "Bearer wrong", "Bearer sesame2", "sesame", "Bearer \xff"):
        headers = {} if key is None else {"Authorization": key.encode("latin-1")}
        answer = httpx.get(f"{strict.url}/v1/models", headers=headers)
        error = refused(answer, 401)
        assert error["code"] == "invalid_api_key"
        assert httpx.get(f"{strict.url}/internal/state", headers=headers).status_code == 401
    assert httpx.get(f"{strict.url}/health").status_code == 200
    assert strict.client.get("/v1/models").status_code == 200


def test_a_body_over_the_limit_is_refused_whether_it_says_its_length_or_not(strict: Running):
    body = b'{"prompt": "' + b"a" * 2000 + b'"}'
    headers = {"content-type": "application/json"}
    for content in (body, iter([body[:900], body[900:]])):
        error = refused(strict.client.post("/v1/completions", content=content, headers=headers), 413)
        assert "--max-body-bytes" in error["message"]
    strict.complete("abc", 2)


def test_a_request_that_takes_too_long_is_ended_and_its_pages_are_free():
    with running(options=ServeOptions(port=0, request_timeout=0.05)) as server:
        body = {"prompt": "abc", "max_tokens": 400}
        assert "--request-timeout" in refused(server.post("/v1/completions", body), 408)["message"]
        assert '"request_timeout"' in server.post("/v1/completions", {**body, "stream": True}).text
        assert server.used_pages() == 0
        assert 'status="408"} 2.0' in server.client.get("/metrics").text


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"port": 70000}, "port"), ({"api_key": ""}, "api_key"), ({"max_queued_requests": -1}, "max_queued_requests"),
        ({"max_body_bytes": 0}, "max_body_bytes"), ({"request_timeout": 0.0}, "request_timeout"),
    ],
)  # fmt: skip
def test_an_impossible_option_is_refused_at_start(options, field):
    with pytest.raises(ConfigError, match=f"^{field}="):
        ServeOptions(**options)


def test_an_open_server_on_every_address_is_warned_of():
    assert "--api-key" in ServeOptions(host="0.0.0.0").warnings[0]
    assert not ServeOptions(host="0.0.0.0", api_key="k").warnings
    assert not ServeOptions().warnings
