"""`longspan serve --role` and `longspan route`, started as a user does."""

import os
import sys

import httpx
import openai
import pytest

from longspan.cli.main import main
from longspan.cli.transfer import transfer_config, warnings
from tests.disaggregation.servers import ROUTE, SERVE, ended, serve_arguments, start
from tests.server.running import ascii_folder, expected

PROMPT = "the quick brown fox jumps over the lazy dog, " * 3


def completed(url: str, prompt: str, tokens: int = 12) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@pytest.fixture
def token(tmp_path):
    """The options with the transfer token."""
    file = tmp_path / "transfer-token"
    file.write_text("a secret of some length\n")
    return "--transfer-token-file", str(file)


def test_a_router_answers_like_one_instance_also_after_the_prefill_instance_has_died(token):
    prefill = start(SERVE, serve_arguments(ascii_folder(), "--role", "prefill", "-pcp", "2", *token))
    decode = start(SERVE, serve_arguments(ascii_folder(), "--role", "decode", "-tp", "2", "-dcp", "2", *token))
    with ended(prefill, decode):
        router = start(ROUTE, ["--prefill", prefill.url(), "--decode", decode.url(), "--port", "0", *token])
        with ended(router):
            url = router.url()
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
            assert f'longspan:kv_transfer_total{{model_name="tiny",what="bytes"}} {float(moved["bytes"])}' in metrics
            prefill.process.kill()
            assert completed(url, "y" + PROMPT) == expected("y" + PROMPT, 12)
            states = httpx.get(f"{url}/internal/instances").json()
            assert {state["role"] for state in states.values()} == {"prefill", "decode"}
    assert "Traceback" not in prefill.text + decode.text + router.text


def refused(monkeypatch, capsys, *arguments: str) -> str:
    """The error output of a command that fails at its start."""
    monkeypatch.setattr(sys, "argv", ["longspan", *arguments])
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().err


def test_the_error_names_an_instance_that_does_not_answer(monkeypatch, capsys):
    nobody = "http://127.0.0.1:9"
    output = refused(monkeypatch, capsys, "route", "--prefill", nobody, "--decode", nobody, "--wait", "0")
    assert f"prefill={nobody}: nobody answers there" in output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--role", "decode", "--prefill-peers", "http://a:1"), "prefill_peers=http://a:1: is not a transfer address"),
        (("--prefill-peers", "tcp://a:1"), "prefill_peers=tcp://a:1: has no effect without a role"),
        (("--role", "decode", "--transfer-token-file", "/nowhere"), "transfer_token_file=/nowhere: cannot be read"),
        (("--role", "decode", "--transfer-token-file", os.devnull), "is empty; write a secret to it"),
    ],
)
def test_invalid_peers_and_tokens_are_refused_before_a_model_is_loaded(arguments, problem, monkeypatch, capsys):
    assert problem in refused(monkeypatch, capsys, "serve", "no-such-model", *arguments)


def test_a_token_in_the_environment_is_used_unless_a_file_is_given(monkeypatch, token):
    monkeypatch.setenv("LONGSPAN_TRANSFER_TOKEN", "another secret of that kind")
    assert transfer_config("decode", "127.0.0.1", 0, None, None).token == "another secret of that kind"
    assert transfer_config("decode", "127.0.0.1", 0, None, token[1]).token == "a secret of some length"
    assert transfer_config(None, "127.0.0.1", 0, None, None) is None


def test_a_decode_instance_that_can_use_no_prefill_instance_warns(monkeypatch):
    monkeypatch.delenv("LONGSPAN_TRANSFER_TOKEN", raising=False)
    (warning,) = warnings(transfer_config("decode", "127.0.0.1", 0, None, None))
    assert "compute every prompt itself" in warning
    assert not warnings(transfer_config("decode", "127.0.0.1", 0, "tcp://a:1, tcp://b:1", None))
