"""What drafting is worth: tokens a second with and without it, in turn in one run, and how many drafts prove right.

    python scripts/early_exit.py smollm2 /tmp/early
    python scripts/measure_drafts.py smollm2 --drafts draft:3:/tmp/early,prompt-lookup:8 [--rounds 3] [--tokens 64]

One request at a time decodes greedily: text that the model makes up, and text that copies its prompt. The tokens are
the same with all of them, or the script says so. Prints a table and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from longspan.bench.measure import run_batch
from longspan.engine.engine import Engine
from longspan.llm import LLM
from longspan.request import SamplingParams
from longspan.scheduler.acceptance import DraftCounts

PLAIN = "none"
_FACTS = (
    "Item 4017: copper wire, 12 m, shelf B7, checked by Ines on Monday. Item 4018: steel bolts, 300, shelf C2, checked "
    "by Omar on Tuesday. Item 4019: glass tubes, 24, shelf A1, checked by Lena on Friday. Item 4020: rubber seals, 75, "
    "shelf D9, checked by Ravi on Sunday. "
)
TEXTS = {
    "made up": "The old lighthouse keeper opened the door, looked at the sea and said that",
    "copied": f"The list:\n{_FACTS}\nThe same list once more:\n{_FACTS}\nThe same list once more:\nItem 4017:",
}


@dataclass
class Case:
    """One way to draft, over one text."""

    # tokens a second, of each round
    rates: list[float] = field(default_factory=list)
    # seconds of CPU a token, of each round; with one thread a busy machine does not change them
    cpu_s: list[float] = field(default_factory=list)
    # its drafts of all rounds
    drafts: DraftCounts = field(default_factory=DraftCounts)
    # the tokens of the last round
    token_ids: Sequence[int] = ()


def run(engine: Engine, case: Case, prompt: Sequence[int], tokens: int) -> None:
    """Run a text once."""
    before, marks = engine.stats().scheduler.drafts, list[float]()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    measured = run_batch(engine, [prompt], params, on_output=lambda _: marks.append(time.process_time()))
    case.rates.append(measured.decode_tokens_per_s or 0.0)
    case.cpu_s.append((marks[-1] - marks[0]) / max(1, measured.decode_tokens))
    case.drafts = case.drafts.plus(engine.stats().scheduler.drafts.since(before))
    case.token_ids = measured.outputs[0].outputs[0].token_ids


def compare(
    model: str, drafts: Sequence[str], rounds: int, tokens: int, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """A record for each text and way to draft."""
    engines: dict[str, LLM] = {}
    for name in (PLAIN, *drafts):
        engines[name] = LLM(model, enable_prefix_caching=False, speculative=None if name == PLAIN else name, **options)
    prompts = {text: engines[PLAIN].tokenizer.encode(words) for text, words in TEXTS.items()}
    cases = {(text, name): Case() for text in TEXTS for name in engines}
    for number in range(rounds + 1):
        for text, prompt in prompts.items():
            for name, llm in engines.items():
                warm = Case()
                run(llm.engine, cases[text, name] if number else warm, prompt, tokens if number else 4)
                if number:
                    print(f"round {number}: {text}, {name}: {cases[text, name].rates[-1]:.1f}", file=sys.stderr)
    for llm in engines.values():
        llm.shutdown()
    found = []
    for (text, name), case in cases.items():
        plain = cases[text, PLAIN]
        rate = median(case.rates)
        found.append(
            {
                "text": text, "drafts": name, "cpu_ms_a_token": median(case.cpu_s) * 1e3,
                "cpu_ms_a_token_plain": median(plain.cpu_s) * 1e3, "tokens_per_s": rate,
                "least": min(case.rates), "most": max(case.rates),
                "factor": rate / median(plain.rates), "tokens_a_step": case.drafts.mean_length,
                "drafted": case.drafts.drafted, "acceptance": case.drafts.rates,
                "same_tokens": list(case.token_ids) == list(plain.token_ids),
            }
        )  # fmt: skip
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--drafts", required=True, help="values of --speculative, with commas between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--options", default="{}", help="other keywords of LLM, as JSON")
    given = parser.parse_args()
    found = compare(given.model, given.drafts.split(","), given.rounds, given.tokens, json.loads(given.options))
    for one in found:
        accepted = ", ".join(f"{share:.0%}" for share in one["acceptance"])
        same = "" if one["same_tokens"] else "  OTHER TOKENS"
        print(
            f"{one['text']:9}{one['drafts'][:40]:42}{one['tokens_per_s']:7.1f} tokens/s ({one['least']:.1f} to "
            f"{one['most']:.1f}, {one['factor']:.2f} of plain), {one['cpu_ms_a_token']:.1f} ms of CPU a token; "
            f"{one['tokens_a_step'] or 1:.2f} a step; "
            f"accepted by position: {accepted or 'nothing drafted'}{same}"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
