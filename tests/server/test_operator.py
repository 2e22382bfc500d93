"""What an operator sees and sets: the log, metrics of a request's phases, HTTPS, prefixes of each key's own."""

from __future__ import annotations

import logging
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from longspan.errors import ConfigError
from longspan.server.keys import NamedKey
from longspan.server.options import LogOptions, ServeOptions, TlsOptions
from longspan.server.tls import tls_context
from tests.server.running import Running, running
from tests.server.test_faults import until

OPENSSL = shutil.which("openssl")
KEYS = {"ann": "key-of-ann", "ben": "key-of-ben"}
PROMPT = "nothing of this is for the log"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsOptions:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    if OPENSSL is None:
        pytest.skip("needs the command openssl")
    folder = tmp_path_factory.mktemp("tls")
    found = TlsOptions(certfile=str(folder / "cert.pem"), keyfile=str(folder / "key.pem"))
    command = [
        OPENSSL, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-keyout", found.keyfile, "-out", found.certfile, "-subj", "/CN=127.0.0.1",
        "-addext", "subjectAltName=IP:127.0.0.1",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return found


@pytest.fixture(scope="module")
def watched(files: TlsOptions) -> Iterator[Running]:
    """Speaks HTTPS, has two keys, and lets them share no prefix."""
    keys = tuple(NamedKey(*each) for each in KEYS.items())
    options = ServeOptions(
        port=0, served_model_name="tiny", tls=files, named_keys=keys, cache_salt_by_key=True, disable_log_stats=True
    )  # fmt: skip
    with running(options=options) as server:
        yield server


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "longspan.server")
    return caplog


def lines(log: pytest.LogCaptureFixture, count: int) -> list[str]:
    """So many lines of the log: a request's is written after its answer."""
    until(lambda: len(log.messages) >= count, f"{count} lines in the log")
    return log.messages


def cached(server: Running, name: str, prompt: str, **fields: str) -> int:
    """Prompt tokens that the prefix cache had for the client with this key."""
    headers = {"Authorization": f"Bearer {KEYS[name]}"}
    body = {"prompt": prompt, "max_tokens": 1, **fields}
    usage = server.post("/v1/completions", body, headers=headers).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def metrics(server: Running) -> dict[str, float]:
    """Samples without labels but the model's, by name."""
    samples = re.findall(r'^(longspan:\w+){model_name="tiny"} (\S+)$', server.client.get("/metrics").text, re.MULTILINE)
    return {name: float(value) for name, value in samples}


def test_clients_of_different_keys_share_no_cached_prefix(watched: Running):
    prompt = "a prefix of several pages that ann has sent before"
    assert cached(watched, "ann", prompt) == 0
    assert cached(watched, "ann", prompt) > 0
    assert cached(watched, "ben", prompt) == 0
    assert cached(watched, "ben", prompt) > 0


def test_a_client_cannot_read_the_prefixes_of_another_key_by_a_salt_of_its_name(watched: Running):
    prompt = "salted by ann, this takes several pages too"
    assert cached(watched, "ann", prompt, cache_salt="s") == 0
    assert cached(watched, "ann", prompt) == 0
    for salt in ("s", "ann:s", "ann:", "ann"):
        assert cached(watched, "ben", prompt, cache_salt=salt) == 0
    assert cached(watched, "ann", prompt, cache_salt="s") > 0


def test_prefixes_by_key_need_keys():
    with pytest.raises(ConfigError, match=r"^cache_salt_by_key=.*--api-key-file"):
        ServeOptions(cache_salt_by_key=True).with_secrets({})


def test_a_server_with_a_certificate_speaks_https_only(watched: Running):
    assert watched.url.startswith("https:")
    assert watched.client.get("/health").json() == {"status": "ready"}
    with pytest.raises(httpx.HTTPError):
        httpx.get(watched.url.replace("https", "http") + "/health")
    with pytest.raises(httpx.ConnectError):  # a client that does not know the certificate
        httpx.get(f"{watched.url}/health")


def test_limits_of_connections_hold_under_https(watched: Running):
    assert watched.client.get("/health", headers={"x": "a" * 70_000}).status_code == 431


def test_with_authorities_a_client_needs_a_certificate_of_one(files: TlsOptions):
    context = tls_context(replace(files, ca_certs=files.certfile))
    assert context is not None and context.verify_mode is ssl.CERT_REQUIRED
    plain = tls_context(files)
    assert plain is not None and plain.verify_mode is ssl.CERT_NONE
    assert tls_context(TlsOptions()) is None


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"certfile": "absent"}, "ssl_certfile=.*cannot be read"),
        ({"certfile": "text"}, "ssl_keyfile=.*holds no key"),
        ({"keyfile": "absent"}, "ssl_keyfile=.*cannot be read"),
        ({"keyfile": "text"}, "ssl_keyfile=.*holds no key"),
        ({"keyfile": "locked"}, "ssl_keyfile=.*password"),
        ({"ca_certs": "text"}, "ssl_ca_certs=.*holds no certificate"),
        ({"certfile": None}, "ssl_keyfile=.*--ssl-certfile"),
    ],
)
def test_bad_files_are_named_at_the_start(tmp_path: Path, files: TlsOptions, given, problem):
    (tmp_path / "text").write_text("no PEM")
    if "locked" in given.values():
        lock = [str(OPENSSL), "ec", "-in", str(files.keyfile), "-aes128", "-passout", "pass:word"]
        subprocess.run([*lock, "-out", str(tmp_path / "locked")], check=True, capture_output=True)
    paths = {name: None if file is None else str(tmp_path / file) for name, file in given.items()}
    with pytest.raises(ConfigError, match=f"^{problem}"):
        tls_context(replace(files, **paths))


def test_each_request_has_a_line_with_its_status_and_time(watched: Running, log):
    watched.complete("abc", 2)
    (line,) = lines(log, 1)
    assert re.fullmatch(r"127\.0\.0\.1:\d+ POST /v1/completions 200 \d+ ms", line)


def test_a_refused_request_has_its_reason_in_the_log_and_nothing_that_it_sent(watched: Running, log):
    chat = {"messages": [{"role": "user", "content": "refuse"}, {"role": "user", "content": PROMPT}]}
    refused = [
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": -1}, {}, "max_tokens: must not be negative"),
        ("/v1/completions", {"prompt": {PROMPT: PROMPT}}, {}, "prompt: is refused: string_type"),
        ("/v1/completions", {"max_tokens": 1}, {}, "prompt: is missing"),
        ("/v1/completions", {"prompt": PROMPT, PROMPT: 1}, {}, "body: unknown parameter"),
        ("/v1/completions", {"prompt": PROMPT}, {"Authorization": "Bearer hidden"}, "Authorization: is missing"),
        ("/v1/chat/completions", chat, {}, "messages: the model's chat template refuses them"),
    ]  # fmt: skip
    for path, body, headers, _ in refused:
        assert watched.post(path, body, headers=headers).status_code in (400, 401)
    for line, (*_, reason) in zip(lines(log, len(refused)), refused, strict=True):
        assert re.search(rf" 40[01] \d+ ms: {reason}", line)
        assert not any(secret in line for secret in (PROMPT, "hidden", *KEYS.values()))


def test_a_path_cannot_forge_a_line_of_the_log(watched: Running, log):
    watched.client.get("/v1/none%0d%0aINFO%20all%20is%20well%1b[31m?key=hidden")
    (line,) = lines(log, 1)
    assert "/v1/none%0D%0AINFO%20all%20is%20well%1B%5B31m 404" in line
    assert line.isprintable() and "hidden" not in line


def test_a_client_that_leaves_within_its_answer_is_noted(watched: Running, log):
    body = {"prompt": "abc", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with watched.client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_bytes())
    assert "the client has left" in lines(log, 1)[0]


def test_what_is_polled_is_not_in_the_log_while_all_is_well(watched: Running, log):
    for path in ("/health", "/metrics", "/internal/state", "/internal/peer"):
        assert watched.client.get(path).status_code == 200
    watched.client.get("/version")
    (line,) = lines(log, 1)
    assert "GET /version" in line


def test_an_unknown_level_of_the_log_is_refused():
    with pytest.raises(ConfigError, match=r"^log_level=loud"):
        LogOptions(level="loud")


def test_the_phases_of_a_request_come_from_the_core(watched: Running):
    before = metrics(watched)
    watched.complete("this prompt has 26 letters", 5, ignore_eos=True)
    after = metrics(watched)
    spent = {name: after[name] - before[name] for name in after}
    phases = [spent[f"longspan:request_{name}_time_seconds_sum"] for name in ("queue", "prefill", "decode")]
    assert all(seconds > 0 for seconds in phases)
    assert spent["longspan:request_inference_time_seconds_sum"] == pytest.approx(sum(phases[1:]))
    assert sum(phases) == pytest.approx(spent["longspan:e2e_request_latency_seconds_sum"], abs=0.2)
    assert sum(phases[:2]) == pytest.approx(spent["longspan:time_to_first_token_seconds_sum"])
    assert spent["longspan:iteration_tokens_total_sum"] == 26 + 5 - 1
    assert spent["longspan:request_params_max_tokens_sum"] == 5
    assert spent["longspan:request_params_n_sum"] == 1


def test_the_state_has_what_ended_and_what_was_refused(watched: Running):
    watched.complete("abcd", 3, ignore_eos=True)
    watched.post("/v1/completions", {"prompt": PROMPT, "n": 0})
    state = watched.client.get("/internal/state").json()
    ended, error = state["ended"][0], state["errors"][0]
    assert {name: ended[name] for name in ("reason", "prompt_tokens", "output_tokens", "cached_tokens")} == {
        "reason": "length", "prompt_tokens": 4, "output_tokens": 3, "cached_tokens": 0,
    }  # fmt: skip
    assert 0 < ended["ttft_s"] <= ended["e2e_s"] and ended["ago_s"] < 30
    assert error.pop("ago_s") >= 0
    assert error == {
        "status": 400, "method": "POST", "path": "/v1/completions", "reason": "n: must be at least 1",
    }  # fmt: skip
