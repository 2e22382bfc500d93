"""Requests nobody should send: every one is answered, none with a 5xx, and nothing is left behind.

`scripts/fuzz_server.py` sends ten thousand of them; what it finds is put into the corpus.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.hostile import BODIES, SHAPES, Hostile, Shape, corpus, exchange, fault_of, mutated
from tests.server.running import Running, expected

RANDOM = 150


@pytest.fixture(autouse=True)
def nothing_is_left(server: Running) -> Iterator[None]:
    """After each test no page is held, the core is the same, and a completion is what it was."""
    yield
    assert len(server.engine.output_processor) == 0
    assert server.used_pages() == 0
    assert server.engine.restarts == 0
    assert server.complete("abc", 5)["choices"][0]["text"] == expected("abc", 5)


def answer_to(server: Running, request: Hostile) -> httpx.Response:
    headers = {"Content-Type": "application/json", **dict(request.headers)}
    answer = server.client.request(request.method, request.path, content=request.body, headers=headers)
    fault = fault_of(answer.status_code, answer.headers.get("content-type", ""), answer.content)
    assert fault is None, f"{fault}\n{request}"
    return answer


def test_the_corpus_of_hostile_bodies_is_answered(server: Running):
    statuses = Counter(answer_to(server, request).status_code for _, request in corpus())
    assert statuses[400] > 100
    assert statuses[200] > 20


def test_whatever_a_field_holds_is_answered(server: Running):
    source = random.Random(8)
    statuses = Counter(answer_to(server, mutated(source)).status_code for _ in range(RANDOM))
    assert min(statuses[200], statuses[400]) > RANDOM // 10


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.answers], ids=lambda shape: shape.what)
def test_http_of_an_unusual_shape_is_answered(server: Running, shape: Shape):
    assert exchange(server.server.port, shape) is None


def test_what_is_no_whole_request_does_no_harm(server: Running):
    broken = [shape for shape in SHAPES if not shape.answers]
    with ThreadPoolExecutor(len(broken)) as pool:
        faults = pool.map(lambda shape: exchange(server.server.port, shape, patience=0.3), broken)
        assert [fault for fault in faults if fault] == []


def test_the_openapi_document_describes_every_field_and_every_error(server: Running):
    document = server.client.get("/openapi.json").json()
    for path, body in BODIES.items():
        operation = document["paths"][path]["post"]
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        schema = document["components"]["schemas"][name]
        assert set(schema["properties"]) == set(body.model_fields)
        assert schema["additionalProperties"] is False
        assert "422" not in operation["responses"]
        for status, answer in operation["responses"].items():
            if status != "200":
                error = answer["content"]["application/json"]["schema"]["properties"]["error"]
                assert set(error["required"]) == {"message", "type", "param", "code"}
