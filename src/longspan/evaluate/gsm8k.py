"""GSM8K: its problems, the few-shot prompt, the number in an answer, and the score.

Prompt, stop strings and matching are those of the lm-evaluation-harness task `gsm8k`, so scores can be compared.
It must not know how a model is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import msgspec

from longspan.config import require
from longspan.errors import ConfigError

STOP_STRINGS = ("Question:", "</s>", "<|im_end|>")
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_TARGET = re.compile(r"#### (-?[0-9][0-9.,]*)\s*\Z")
_FORM = 'give lines of {"question": "...", "answer": "... #### number"}'


@dataclass(frozen=True)
class Problem:
    """A question and its worked answer, which ends in `#### number`."""

    question: str
    answer: str

    @property
    def target(self) -> str | None:
        """The number to find; None if the answer does not end in one."""
        found = _TARGET.search(self.answer)
        return _normalised(found[1]) if found else None


@dataclass(frozen=True)
class Scored:
    """What a model said to a problem, the numbers found in it, and which of them are the target."""

    question: str
    prompt: str
    text: str
    strict: str | None
    flexible: str | None
    target: str | None
    correct: dict[str, bool]


@dataclass(frozen=True)
class ExactMatch:
    """The share of correct answers; its standard error is None for a single one."""

    exact_match: float
    standard_error: float | None


def select(data: str, shots: int, shots_data: str | None, limit: int | None) -> tuple[list[Problem], list[Problem]]:
    """(few-shot examples, problems to score).

    The examples are the last `shots` of `shots_data`, or of `data` itself; a problem shown as one is never scored.
    Raises `ConfigError`.
    """
    require(shots >= 0, "shots", shots, "must not be negative", "0 is none")
    require(limit is None or limit >= 1, "limit", limit, "must be at least 1", "leave it out to score all")
    problems = read_problems("data", data)
    pool = problems if shots_data is None else read_problems("shots_data", shots_data)
    where = f"the {len(pool)} problems of {shots_data or data}"
    require(shots <= len(pool), "shots", shots, f"exceeds {where}", "give fewer shots, or more in --shots-data")
    examples = pool[len(pool) - shots :]
    shown = {example.question for example in examples}
    items = [problem for problem in problems if problem.question not in shown][:limit]
    require(len(items) > 0, "shots", shots, f"leaves no problem of {data} to score", "give fewer, or --shots-data")
    return examples, items


def read_problems(option: str, path: str) -> list[Problem]:
    """The problems of a JSONL file. Raises `ConfigError` that names option, file, line and field."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(option, path, f"cannot be read ({error.strerror})", _FORM) from error
    return [_problem(option, path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _problem(option: str, path: str, number: int, line: bytes) -> Problem:
    try:
        problem = msgspec.json.decode(line, type=Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(option, path, f"line {number}: {error}", _FORM) from error
    if problem.target is None:
        end = problem.answer[-20:]
        raise ConfigError(option, path, f"line {number}: `answer` ends in {end!r}, not in `#### number`", _FORM)
    return problem


def prompt_of(examples: Sequence[Problem], problem: Problem) -> str:
    """The examples with their answers, then the problem's question."""
    shown = "".join(f"Question: {example.question}\nAnswer: {example.answer}\n\n" for example in examples)
    return f"{shown}Question: {problem.question}\nAnswer:"


def strict_answer(text: str) -> str | None:
    """The first number that follows `#### `."""
    found = _STRICT.search(text)
    return _normalised(found[1]) if found else None


def flexible_answer(text: str) -> str | None:
    """The last number. As in the harness, two or more of `$.,` alone pass for one."""
    found = _FLEXIBLE.findall(text)
    return _normalised(found[-1]) if found else None


def _normalised(number: str) -> str:
    return number.replace(",", "").replace("$", "").removesuffix(".")


def score(problem: Problem, prompt: str, text: str) -> Scored:
    """Compare what was said with the target. Numbers are compared as text: `18.00` is not `18`."""
    strict, flexible, target = strict_answer(text), flexible_answer(text), problem.target
    correct = {"strict": strict == target, "flexible": flexible == target}
    return Scored(problem.question, prompt, text, strict, flexible, target, correct)


def exact_match(correct: Sequence[bool]) -> ExactMatch:
    """The share of correct answers with its standard error √(p(1-p)/(n-1)); there must be at least one."""
    n = len(correct)
    p = sum(correct) / n
    return ExactMatch(p, sqrt(p * (1 - p) / (n - 1)) if n > 1 else None)
