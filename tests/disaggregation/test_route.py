"""`longspan serve --role` and `longspan route`, started as a user does."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from longspan.cli.main import main
from longspan.cli.transfer import transfer_config, warnings
from tests.disaggregation.servers import ROUTE, SERVE, Started, ended, serve_arguments, start
from tests.listening import ADDRESSES, listens, promised_addresses
from tests.server.running import ascii_folder, expected

PROMPT = "the quick brown fox jumps over the lazy dog, " * 3


def completed(url: str, prompt: str, tokens: int = 12) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    """The options that give a process the secret which all share."""
    file = tmp_path_factory.mktemp("secret") / "transfer-token"
    file.write_text("a secret of some length\n")
    return "--transfer-token-file", str(file)


@dataclass(frozen=True)
class Front:
    prefill: Started
    decode: Started
    router: Started

    @property
    def url(self) -> str:
        return self.router.url()


@pytest.fixture(scope="module")
def front(token):
    """A prefill instance of two ranks, a decode instance of two others, and a router."""
    host = ("--host", ADDRESSES["`--host`"])
    more = (*host, "--transfer-host", ADDRESSES["`--transfer-host`"], *token)
    prefill = start(SERVE, serve_arguments(ascii_folder(), "--role", "prefill", "-pcp", "2", *more))
    decode = start(SERVE, serve_arguments(ascii_folder(), "--role", "decode", "-tp", "2", "-dcp", "2", *more))
    with ended(prefill, decode):
        router = start(ROUTE, ["--prefill", prefill.url(), "--decode", decode.url(), "--port", "0", *host, *token])
        with ended(router):
            router.url()
            yield Front(prefill, decode, router)
    assert "Traceback" not in prefill.text + decode.text + router.text


@contextmanager
def stopped(server: Started) -> Iterator[None]:
    """Its processes exist and do nothing: the server, which would replace its core, and the core."""
    http = server.process.pid
    processes = [http, *map(int, Path(f"/proc/{http}/task/{http}/children").read_text().split())]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def moved(instance: Started) -> dict[str, int]:
    return httpx.get(f"{instance.url()}/internal/peer").json()["transfer"]


@pytest.mark.parametrize("command", ["serve --role prefill", "serve --role decode", "route"])
def test_a_command_listens_where_the_page_says_and_nowhere_else(front, command):
    started = {"serve --role prefill": front.prefill, "serve --role decode": front.decode, "route": front.router}
    assert listens(started[command].process.pid) == promised_addresses(command, ADDRESSES)


def test_a_front_of_two_instances_answers_like_one(front):
    assert completed(front.url, PROMPT) == expected(PROMPT, 12)
    client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    stream = client.completions.create(model="tiny", prompt="x" + PROMPT, max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected("x" + PROMPT, 12)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=-1)
    counted = moved(front.decode)
    assert counted["fetched"] == 2
    metrics = httpx.get(f"{front.decode.url()}/metrics").text
    assert f'longspan:kv_transfer_total{{model_name="tiny",what="bytes"}} {float(counted["bytes"])}' in metrics
    states = httpx.get(f"{front.url}/internal/instances").json()
    assert {state["role"] for state in states.values()} == {"prefill", "decode"}


def test_a_prefill_instance_that_is_stopped_under_load_is_noticed_and_no_answer_is_lost(front):
    prompts = [f"{number} {PROMPT}" for number in range(6)]
    completed(front.url, "warm " + PROMPT)
    before = moved(front.decode)["retried"]
    with ThreadPoolExecutor(len(prompts)) as pool, ExitStack() as stop:
        texts = [pool.submit(completed, front.url, prompt) for prompt in prompts[:3]]
        stop.enter_context(stopped(front.prefill))
        texts += [pool.submit(completed, front.decode.url(), prompt) for prompt in prompts[3:]]
        texts.append(pool.submit(completed, front.url, "last " + PROMPT))
        while not all(text.done() for text in texts):
            for url in (front.decode.url(), front.url):  # both can go on without it, and say so
                assert httpx.get(f"{url}/health").status_code == 200
            time.sleep(0.2)
        assert [text.result() for text in texts] == [expected(prompt, 12) for prompt in (*prompts, "last " + PROMPT)]
        while httpx.get(f"{front.url}/internal/instances").json()[front.prefill.url()]["alive"]:
            time.sleep(0.2)
    assert moved(front.decode)["retried"] > before
    assert "its prompt is computed elsewhere" in front.decode.text


def test_a_front_outlives_its_prefill_instance(front):
    front.prefill.process.kill()
    assert completed(front.url, "y" + PROMPT) == expected("y" + PROMPT, 12)


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
