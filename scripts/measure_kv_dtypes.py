"""What a quantised KV cache costs and gives: perplexity of a text, agreement of greedy tokens, and tokens that fit.

    python scripts/measure_kv_dtypes.py MODEL TEXT_FILE [--tokens 4000] [--device auto] [--dtypes auto,int8,fp8_e4m3]

Prints one JSON object for each cache dtype, the first being what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from longspan import LLM, SamplingParams

OUTPUT = 64  # greedy tokens behind each prompt
CUTS = 8  # prompts: the text up to as many evenly spaced places


def measure(model: str, text: str, tokens: int, device: str, dtype: str) -> dict[str, Any]:
    """One cache dtype: perplexity over the first `tokens` of the text, greedy continuations, capacity of 1 GiB."""
    with LLM(model, kv_cache_dtype=dtype, device=device, kv_cache_memory_bytes=1 << 30) as llm:
        ids = llm.tokenizer.encode(text)[:tokens]
        scored = llm.generate([ids], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))[0]
        logprobs = [entry.sampled for entry in scored.prompt_logprobs if entry is not None]
        prompts = [ids[: (len(ids) - OUTPUT) * cut // CUTS] for cut in range(1, CUTS + 1)]
        greedy = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
        outputs = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy)]
        capacity = llm.engine.setup.capacity_tokens
    return {
        "dtype": dtype,
        "tokens_in_1_gib": capacity,
        "perplexity": math.exp(-sum(logprobs) / len(logprobs)),
        "scored_tokens": len(logprobs),
        "outputs": outputs,
    }


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> tuple[float, float]:
    """(part of first tokens that are the same, mean part of an output before it first differs)."""
    same = [
        next((n for n, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(ours, theirs, strict=True)
    ]
    return sum(n > 0 for n in same) / len(same), sum(same) / sum(map(len, theirs))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", default="auto,int8,fp8_e4m3")
    options = parser.parse_args()
    text = options.text.read_text()
    found = [measure(options.model, text, options.tokens, options.device, dtype) for dtype in options.dtypes.split(",")]
    for row in found:
        first, before = agreement(row["outputs"], found[0]["outputs"])
        shown = {name: value for name, value in row.items() if name != "outputs"}
        shown["times_the_tokens"] = round(row["tokens_in_1_gib"] / found[0]["tokens_in_1_gib"], 3)
        print(json.dumps({**shown, "first_token_agrees": first, "agrees_before_it_differs": round(before, 3)}))


if __name__ == "__main__":
    main()
