"""What a form of the weights costs and gives on a CPU: perplexity of a text, agreement of likeliest tokens, speed.

    python scripts/measure_weight_forms.py MODEL TEXT_FILE [--tokens 2000] [--forms none,fp16,int8,auto-fast]

Prints one JSON object for each form, the first being what the others are compared with. MODEL needs a tokenizer. The
weights of a .gguf file are dequantised as they load, and then stored in the form. Every form has a process of its own
for the speed, and they run in turn; a ratio is the median of those of neighbouring runs. `--no-speed` and
`--no-quality` leave a half out.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from longspan import LLM, SamplingParams
from longspan.bench.contestants import LongspanContestant
from longspan.bench.latency import BatchLoad, run_latency
from longspan.config import EngineConfig

PROMPT, OUTPUT = 256, 33  # tokens of the request that is timed
VOCABULARY = 20000  # its random tokens are below this


def score(model: str, text: str, tokens: int, form: str) -> dict[str, Any]:
    """One form: perplexity over the first `tokens` of the text, the likeliest token after each, what was chosen."""
    with LLM(model, quantization=form, dtype="float32", device="cpu") as llm:
        ids = llm.tokenizer.encode(text)[:tokens]
        scored = llm.generate([ids], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))[0]
        entries = [entry for entry in scored.prompt_logprobs if entry is not None]
        notes = [note for note in llm.engine.setup.notes if "product" in note or "weights in" in note]
    return {
        "perplexity": math.exp(-sum(entry.sampled for entry in entries) / len(entries)),
        "likeliest": [entry.top_ids[0] for entry in entries],
        "notes": notes,
    }


def speeds(model: str, forms: list[str], rounds: int) -> dict[str, Any]:
    """Rates of all forms with one request, and their ratios to the first."""
    load = BatchLoad(PROMPT, OUTPUT, 1, iterations=rounds, warmup=1, seed=0, vocab_size=VOCABULARY)
    configs = {form: EngineConfig(model, quantization=form, dtype="float32", device="cpu") for form in forms}
    contestants = {form: LongspanContestant(config) for form, config in configs.items()}
    return run_latency(load, contestants, lambda message: None)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--forms", default="none,fp16,int8,auto-fast")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quality", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    forms = options.forms.split(",")
    rows: dict[str, dict[str, Any]] = {form: {} for form in forms}
    if options.quality:
        text = options.text.read_text()
        found = {form: score(options.model, text, options.tokens, form) for form in forms}
        reference = found[forms[0]]["likeliest"]
        for form, one in found.items():
            same = [a == b for a, b in zip(one.pop("likeliest"), reference, strict=True)]
            rows[form] |= {**one, "likeliest_agrees": sum(same) / len(same), "scored_tokens": len(same)}
    if options.speed:
        report = speeds(options.model, forms, options.rounds)
        for form in forms:
            rows[form] |= {
                "decode_tokens_per_s": report[form]["decode_tokens_per_s"]["max"],
                "prefill_tokens_per_s": report[form]["prefill_tokens_per_s"]["max"],
            }
            if form != forms[0]:
                first_over_it = report["ratio"][form]
                rows[form] |= {f"{name}_ratio": 1 / first_over_it[name] for name in ("decode", "prefill")}
    for form, row in rows.items():
        print(json.dumps({"form": form, **row}), flush=True)


if __name__ == "__main__":
    main()
