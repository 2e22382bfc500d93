"""Asks a model that runs in this process, all prompts in one batch.

It owns the loop over the engine's steps; batching and shared prefixes are the engine's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspan.evaluate.asking import Answer, Batch, OnAnswer
from longspan.request import SamplingParams

if TYPE_CHECKING:
    from longspan.llm import LLM


def ask_model(llm: LLM, batch: Batch, on_answer: OnAnswer) -> list[Answer]:
    """Answers in the order of the prompts. The model should be idle; after an error it is to be shut down.

    Raises `RequestError` if a prompt can never be served, `EngineError` if the engine fails.
    """
    params = SamplingParams(max_tokens=batch.max_tokens, temperature=0.0, stop=batch.stop)
    ids = [f"asked-{number}" for number in range(len(batch.prompts))]
    for request_id, prompt in zip(ids, batch.prompts, strict=True):
        llm.engine.add_request(request_id, llm.encode(prompt), params, prompt)
    answers: dict[str, Answer] = {}
    while len(answers) < len(ids):
        for output in llm.engine.step():
            if output.finished:
                (completion,) = output.outputs
                answers[output.request_id] = Answer(completion.text, len(completion.token_ids))
                on_answer()
    return [answers[request_id] for request_id in ids]
