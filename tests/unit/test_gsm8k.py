"""GSM8K as a user runs it: which problems are asked and how, what counts as right, and that a failure is no answer."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import string
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from longspan.cli.eval import gsm8k
from longspan.cli.options import takes_engine_options
from longspan.errors import ConfigError, ContextOverflow
from longspan.evaluate.asking import Answer, Batch
from longspan.evaluate.gsm8k import (
    Problem,
    exact_match,
    flexible_answer,
    prompt_of,
    read_problems,
    score,
    select,
    strict_answer,
)
from longspan.evaluate.in_process import ask_model
from longspan.llm import LLM
from tests.oracle import greedy, oracle, tiny_folder

PROBLEMS = [(f"What is {n} + {n}?", f"{n}+{n}={2 * n}\n#### {2 * n}") for n in range(1, 9)]
Reply = Callable[[dict[str, Any]], tuple[int, Any]]


def as_lines(problems: list[tuple[str, str]]) -> str:
    return "".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in problems)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text(as_lines(PROBLEMS))
    return path


@pytest.fixture
def evaluate(data: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], str]]:
    """`evaluate(MODEL, ...)` on the problems above gives (the JSON report, stderr)."""

    def call(*arguments: str) -> tuple[dict[str, Any], str]:
        app = typer.Typer()
        app.command()(takes_engine_options(gsm8k))
        typer.main.get_command(app).main([*arguments, "--data", str(data), "--json"], standalone_mode=False)
        out, err = capsys.readouterr()
        return json.loads(out), err

    return call


# --- the number in an answer ------------------------------------------------------------------------

TEXTS = {
    " 9 * 2 = 18\n#### 18": ("18", "18"),
    "#### 1,450,000": ("1450000", "1450000"),
    "It costs $1,234.50": (None, "1234.50"),
    "#### $18": (None, "18"),
    "#### -10": ("-10", "-10"),
    "a loss of -$5": (None, "-5"),
    "#### 2.5": ("2.5", "2.5"),
    "#### 18.": ("18", "18"),
    "The answer is 7.": (None, "7"),
    "#### 18\n\nQuestion: 3 eggs and 4 more?": ("18", "4"),
    "#### 18\n#### 20": ("18", "20"),
    "####18": (None, "18"),
    "I do not know": (None, None),
    "": (None, None),
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_strict_answer_follows_four_hashes_and_the_flexible_one_is_the_last(text: str) -> None:
    assert (strict_answer(text), flexible_answer(text)) == TEXTS[text]


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 1,200", True, True),
        ("so $1200.", False, True),
        ("#### 1200 and 5 more", True, False),
        ("#### 12", False, False),
        ("#### 1200.00", False, False),
        ("", False, False),
    ],
)
def test_strict_and_flexible_are_judged_apart(text: str, strict: bool, flexible: bool) -> None:
    problem = Problem("How many?", "1,000+200\n#### 1,200")
    assert score(problem, "", text).correct == {"strict": strict, "flexible": flexible}


def test_the_standard_error_is_that_of_a_mean() -> None:
    result = exact_match([True, False, False, True, True])
    assert result.exact_match == 0.6
    assert result.standard_error == pytest.approx((0.6 * 0.4 / 4) ** 0.5)


def test_one_problem_has_no_standard_error() -> None:
    assert exact_match([True]).standard_error is None


# --- problems and prompt ----------------------------------------------------------------------------


def test_the_prompt_is_that_of_the_harness() -> None:
    examples = [Problem("1+1?", "2\n#### 2"), Problem("2+2?", "4\n#### 4")]
    assert prompt_of(examples, Problem("3+3?", "6\n#### 6")) == (
        "Question: 1+1?\nAnswer: 2\n#### 2\n\nQuestion: 2+2?\nAnswer: 4\n#### 4\n\nQuestion: 3+3?\nAnswer:"
    )


def questions(problems: list[Problem]) -> list[str]:
    return [problem.question for problem in problems]


def test_examples_are_the_last_problems_and_are_not_scored(data: Path) -> None:
    examples, items = select(str(data), 3, None, None)
    assert questions(examples + items) == [q for q, _ in PROBLEMS[5:] + PROBLEMS[:5]]


def test_no_shots_leave_every_problem_to_score(data: Path) -> None:
    examples, items = select(str(data), 0, None, None)
    assert (examples, len(items)) == ([], len(PROBLEMS))


def test_the_limit_takes_the_first_problems(data: Path) -> None:
    _, items = select(str(data), 2, None, 3)
    assert questions(items) == [q for q, _ in PROBLEMS[:3]]


def test_a_problem_that_is_also_among_the_shots_of_another_file_is_not_scored(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "train.jsonl"
    other.write_text(as_lines([("Not shown?", "#### 1"), PROBLEMS[0], ("Another?", "#### 3")]))
    examples, items = select(str(data), 2, str(other), None)
    assert questions(examples) == [PROBLEMS[0][0], "Another?"]
    assert questions(items) == [q for q, _ in PROBLEMS[1:]]


def test_empty_lines_are_no_problems_and_odd_line_breaks_stay_in_them(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"question": "a\u2028b", "answer": "#### 1"}, ensure_ascii=False) + "\n\n")
    assert questions(read_problems("data", str(path))) == ["a\u2028b"]


MALFORMED = {
    "no JSON": (b"{question", "JSON is malformed"),
    "no object": (b"[1]", "Expected `object`, got `array`"),
    "a field missing": (b'{"question": "a"}', "missing required field `answer`"),
    "a field of another type": (b'{"question": 3, "answer": "#### 3"}', r"Expected `str`, got `int` - at `\$.quest"),
    "no number": (b'{"question": "a", "answer": "it is 3"}', "`answer` ends in 'it is 3', not in `#### number`"),
    "a number that is not the end": (b'{"question": "a", "answer": "#### 3 eggs"}', "not in `#### number`"),
    "no UTF-8": (b'{"question": "\xff", "answer": "#### 3"}', "can't decode byte 0xff"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_line_is_named_with_what_was_expected(kind: str, tmp_path: Path) -> None:
    line, problem = MALFORMED[kind]
    path = tmp_path / "problems.jsonl"
    path.write_bytes(as_lines(PROBLEMS[:1]).encode() + line + b"\n")
    with pytest.raises(ConfigError, match=rf"data={path}: line 2: .*{problem}.*; give lines of"):
        read_problems("data", str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shots", "9"], r"shots=9: exceeds the 8 problems of .*problems.jsonl; give fewer"),
        (["--shots", "8"], r"shots=8: leaves no problem of .*problems.jsonl to score"),
        (["--shots", "-1"], r"shots=-1: must not be negative"),
        (["--limit", "0"], r"limit=0: must be at least 1"),
        (["--max-tokens", "0"], r"max_tokens=0: must be at least 1"),
        (["--shots-data", "/nowhere"], r"shots_data=/nowhere: cannot be read \(No such file"),
        (["--output", "/nowhere/out"], r"output=/nowhere/out: cannot be written"),
        (["--base-url", "localhost:8000"], r"base_url=localhost:8000: is not a web address"),
        (["--base-url", "http://x", "--concurrency", "0"], r"concurrency=0: must be at least 1"),
        (["--base-url", "http://x", "-pcp", "2"], r"base_url=http://x: is a server with options of its own; leave"),
    ],
)
def test_a_mistaken_option_is_refused_before_a_model_is_loaded(evaluate: Any, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate("./no-such-model", *options)


# --- through a server -------------------------------------------------------------------------------


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app on a free port, as a base URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(1000):
        if server.started:
            break
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def completing(reply: Reply, seen: list[Any]) -> FastAPI:
    """An endpoint that answers with `reply(body)`; `seen` collects (body, headers)."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def complete(request: Request) -> JSONResponse:
        body = await request.json()
        seen.append((body, request.headers))
        status, content = reply(body)
        return JSONResponse(content, status)

    return app


def completion(text: str, tokens: int | None = 4, finish_reason: str = "stop") -> dict[str, Any]:
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 1, "completion_tokens": tokens}}
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], **usage}


def number_asked(body: dict[str, Any]) -> int:
    return int(re.findall(r"What is (\d+)", body["prompt"])[-1])


def knows_small_sums(body: dict[str, Any]) -> tuple[int, Any]:
    """Right in the asked form up to 2, right in another form for 3, wrong beyond."""
    n = number_asked(body)
    return 200, completion(f" {n}+{n}\n#### {2 * n}" if n <= 2 else f" It is {2 * n if n == 3 else 99}.")


def test_a_server_is_scored_by_its_answers(evaluate: Any) -> None:
    with served(completing(knows_small_sums, [])) as url:
        report, err = evaluate("some/model", "--base-url", url, "--shots", "2")
    assert report["model"] == "some/model"
    assert (report["problems"], report["shots"], report["output_tokens"]) == (6, 2, 24)
    assert report["strict_match"]["exact_match"] == pytest.approx(2 / 6)
    assert report["flexible_extract"]["exact_match"] == pytest.approx(3 / 6)
    assert report["flexible_extract"]["standard_error"] == pytest.approx((0.25 / 5) ** 0.5)
    assert report["output_tokens_per_s"] == pytest.approx(24 / report["seconds"])
    assert "strict match" in err
    assert "0.5000" in err


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_server_is_asked_greedily_with_the_harness_stop_strings_and_the_key(evaluate: Any, suffix: str) -> None:
    seen: list[Any] = []
    with served(completing(knows_small_sums, seen)) as url:
        evaluate("m", "--base-url", url + suffix, "--api-key", "secret", "--limit", "1", "--max-tokens", "77")
    ((body, headers),) = seen
    asked, *_ = prompt = body.pop("prompt").rsplit("\n\n", 1)
    assert prompt[-1] == f"Question: {PROBLEMS[0][0]}\nAnswer:"
    assert asked.count("Question: ") == 5
    assert body == {
        "model": "m", "max_tokens": 77, "temperature": 0, "stop": ["Question:", "</s>", "<|im_end|>"],
    }  # fmt: skip
    assert headers["authorization"] == "Bearer secret"


def test_the_output_has_a_line_for_every_problem_in_order(evaluate: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with served(completing(knows_small_sums, [])) as url:
        evaluate("m", "--base-url", url, "--shots", "2", "--output", str(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question"] for row in rows] == [q for q, _ in PROBLEMS[:6]]
    assert set(rows[0]) == {"question", "prompt", "text", "strict", "flexible", "target", "correct"}
    assert rows[0]["prompt"].endswith("Question: What is 1 + 1?\nAnswer:")
    assert rows[2] | {"prompt": ""} == {
        "question": "What is 3 + 3?", "prompt": "", "text": " It is 6.", "strict": None, "flexible": "6",
        "target": "6", "correct": {"strict": False, "flexible": True},
    }  # fmt: skip


def test_as_many_requests_are_in_flight_as_asked_for_and_no_more(evaluate: Any) -> None:
    app, together, now = FastAPI(), asyncio.Barrier(3), [0]
    most = [0]

    @app.post("/v1/completions")
    async def complete() -> Any:
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.wait_for(together.wait(), 20)  # passes only when three wait at once
        now[0] -= 1
        return completion("#### 2")

    with served(app) as url:
        report, _ = evaluate("m", "--base-url", url, "--shots", "2", "--concurrency", "3")
    assert (report["problems"], most) == (6, [3])


def test_a_server_that_does_not_count_tokens_is_scored_all_the_same(evaluate: Any) -> None:
    with served(completing(lambda _: (200, completion("#### 2", tokens=None)), [])) as url:
        report, err = evaluate("m", "--base-url", url, "--shots", "2")
    assert (report["output_tokens"], report["output_tokens_per_s"]) == (None, None)
    assert report["strict_match"]["exact_match"] == pytest.approx(1 / 6)
    assert "tokens not counted" in err


FAILURES = {
    "an error of the server": (500, {"error": "out of memory"}, r"answered HTTP 500 to a prompt: .*out of memory"),
    "an unknown model": (404, {"error": "no model m"}, r"answered HTTP 404 .*no model m.*check MODEL"),
    "no completion": (200, {"hello": 1}, r"answered what is no completion \(.*`choices`\)"),
    "no choices": (200, {"choices": []}, r"answered what is no completion"),
    "an aborted completion": (200, completion("#### 6", finish_reason="abort"), r"ended a completion with 'abort'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_of_the_server_is_an_error_and_never_a_wrong_answer(evaluate: Any, kind: str, tmp_path: Path) -> None:
    status, content, message = FAILURES[kind]
    output = tmp_path / "out.jsonl"

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        return (status, content) if number_asked(body) == 3 else knows_small_sums(body)

    with served(completing(reply, [])) as url, pytest.raises(ConfigError, match=message) as failed:
        evaluate("m", "--base-url", url, "--shots", "2", "--output", str(output))
    assert "base_url=http://127.0.0.1" in str(failed.value)
    assert "nothing was scored" in str(failed.value)
    assert output.read_text() == ""


def test_the_first_failure_ends_the_asking(evaluate: Any) -> None:
    seen: list[Any] = []
    with served(completing(lambda _: (500, {}), seen)) as url, pytest.raises(ConfigError):
        evaluate("m", "--base-url", url, "--shots", "2", "--concurrency", "1")
    assert len(seen) == 1


def test_a_server_that_is_not_there_is_named(evaluate: Any) -> None:
    with served(FastAPI()) as url:
        pass
    with pytest.raises(ConfigError, match=rf"base_url={url}: gives no answer .*Cannot connect.*check that the server"):
        evaluate("m", "--base-url", url)


def test_a_key_that_no_header_can_hold_is_an_error_that_does_not_show_it(evaluate: Any) -> None:
    with served(completing(knows_small_sums, [])) as url, pytest.raises(ConfigError, match="gives no answer") as failed:
        evaluate("m", "--base-url", url, "--api-key", "sesame\n")
    assert "sesame" not in str(failed.value)


# --- in this process --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token for every printable character."""
    letters = string.digits + string.ascii_letters + string.punctuation + " \n"
    built = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    built.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=built)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model that reads and writes characters."""
    path = tmp_path_factory.mktemp("gsm8k") / "model"
    shutil.copytree(tiny_folder("llama"), path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_model_in_this_process_answers_as_transformers_does(
    evaluate: Any, folder: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    report, _ = evaluate(folder, "--shots", "2", "--limit", "3", "--max-tokens", "12", "--output", str(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        tokens, _ = greedy(oracle("llama"), tokenizer.encode(row["prompt"]), 12)
        assert row["text"] == tokenizer.decode(tokens)
    assert (report["problems"], report["output_tokens"], len({row["text"] for row in rows})) == (3, 36, 3)


def test_an_answer_ends_before_a_stop_string_and_all_of_its_tokens_are_counted(folder: str) -> None:
    answered: list[None] = []
    with LLM(folder) as llm:
        (whole,) = ask_model(llm, Batch(("1 + 1",), 12, ()), lambda: answered.append(None))
        stop = whole.text[5:7]
        cut, other = ask_model(llm, Batch(("1 + 1", "2 + 2"), 12, (stop,)), lambda: answered.append(None))
    before = whole.text[: whole.text.index(stop)]
    assert cut == Answer(before, len(before) + len(stop))
    assert stop not in other.text
    assert len(answered) == 3


def test_layouts_and_other_engine_options_are_taken(evaluate: Any, folder: str) -> None:
    asked = [folder, "--shots", "1", "--limit", "2", "--max-tokens", "4"]
    report, _ = evaluate(*asked, "-pcp", "2", "--local-context", "8", "--page-size", "4")
    assert report["output_tokens"] == 8


def test_a_prompt_the_model_cannot_hold_is_refused(evaluate: Any, folder: str) -> None:
    with pytest.raises(ContextOverflow):
        evaluate(folder, "--shots", "7", "--max-model-len", "100")
