"""Bodies nobody thought of: every one is answered, none with a 5xx, and nothing is left behind."""

from __future__ import annotations

import json
import random
from typing import Any

from longspan.server.chat import ChatBody
from longspan.server.completions import CompletionBody
from longspan.server.tokens import DetokenizeBody, TokenizeBody
from tests.server.running import Running, expected

BODIES = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 5, 1000, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.0, 0.5, 1.0, -0.5, 1e-300, 1e300,
    "", "a", "tiny", "\x00", "é😀", "a" * 600, "auto", "required", "none", "json_object", "json_schema", "<eos>",
    [], [1], [96], [97], [-1], ["a"], ["", "b"], [[1], [2]], [[]], [None], {}, {"a": 1}, {"5": 1.0}, {"type": "text"},
    {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"a": {"pattern": "(a+)+$"}}}}},
    {"include_usage": True}, [{"role": "user", "content": "hi"}], [{"role": "user"}], [{"role": "assistant"}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], [{"role": "tool", "content": 5}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    {"type": "function", "function": {"name": "f"}}, {"tokenize": False}, {"return_dict": True}, {"messages": []},
]  # fmt: skip
COUNT = 250


def body_of(source: random.Random, fields: list[str]) -> dict[str, Any]:
    """Valid at heart, with some fields replaced by whatever there is."""
    body: dict[str, Any] = {"max_tokens": source.choice([1, 3, 8])}
    body["prompt"], body["messages"], body["tokens"] = "abc", [{"role": "user", "content": "hi"}], [1, 2]
    body = {name: value for name, value in body.items() if name in fields}
    for name in source.sample(fields, min(len(fields), source.randint(0, 4))):
        body[name] = source.choice(VALUES)
    return body


def test_whatever_is_sent_is_answered_and_nothing_is_left_behind(server: Running):
    source = random.Random(8)
    statuses: dict[int, int] = {}
    for _ in range(COUNT):
        path = source.choice([*BODIES, "/v1/completions", "/v1/chat/completions"])
        body = body_of(source, list(BODIES[path].model_fields))
        answer = server.post(path, body)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404), f"{path} {json.dumps(body)}: {answer.text}"
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert min(statuses[200], statuses[400]) > COUNT // 10
    assert len(server.engine.output_processor) == 0
    assert server.used_pages() == 0
    assert server.engine.restarts == 0
    assert server.complete("abc", 5)["choices"][0]["text"] == expected("abc", 5)
