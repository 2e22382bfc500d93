"""`longspan serve --role` and `longspan route` as a user starts them."""

import httpx
import openai
import pytest

from tests.disaggregation.servers import ROUTE, SERVE, ended, serve_arguments, start
from tests.server.running import ascii_folder, expected

PROMPT = "the quick brown fox jumps over the lazy dog, " * 3


def completed(url: str, prompt: str, tokens: int = 12) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_a_front_of_two_instances_answers_like_one_and_outlives_the_prefill_instance():
    prefill = start(SERVE, serve_arguments(ascii_folder(), "--role", "prefill", "-pcp", "2"))
    decode = start(SERVE, serve_arguments(ascii_folder(), "--role", "decode", "-tp", "2", "-dcp", "2"))
    with ended(prefill, decode):
        front = start(ROUTE, ["--prefill", prefill.url(), "--decode", decode.url(), "--port", "0"])
        with ended(front):
            url = front.url()
            assert completed(url, PROMPT) == expected(PROMPT, 12)
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
            assert [model.id for model in client.models.list()] == ["tiny"]
            stream = client.completions.create(
                model="tiny", prompt="x" + PROMPT, max_tokens=12, temperature=0, stream=True
            )
            assert "".join(chunk.choices[0].text for chunk in stream) == expected("x" + PROMPT, 12)
            with pytest.raises(openai.BadRequestError, match="max_tokens"):
                client.completions.create(model="tiny", prompt=PROMPT, max_tokens=-1)
            moved = httpx.get(f"{decode.url()}/internal/peer").json()["transfer"]
            assert moved["fetched"] == 2
            metrics = httpx.get(f"{decode.url()}/metrics").text
            assert f'longspan:kv_transfer{{model_name="tiny",what="bytes"}} {float(moved["bytes"])}' in metrics
            prefill.process.kill()
            assert completed(url, "y" + PROMPT) == expected("y" + PROMPT, 12)
            states = httpx.get(f"{url}/internal/instances").json()
            assert {state["role"] for state in states.values()} == {"prefill", "decode"}
    assert "Traceback" not in prefill.text + decode.text + front.text


def test_an_instance_that_does_not_answer_is_named():
    front = start(ROUTE, ["--prefill", "http://127.0.0.1:9", "--decode", "http://127.0.0.1:9", "--wait", "0"])
    with ended(front):
        front.process.wait(60)
    assert "prefill=http://127.0.0.1:9: nobody answers there" in front.text
