"""What is sent to verify drafts and to draft is what the shapes say, to the byte."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest

from longspan import LLM, SamplingParams
from tests.drafting import folder_with_module
from tests.engine.conftest import SHORT, THREADS
from tests.engine.test_recorded_drafts import record
from tests.oracle import prompt_of

record_of_latents = partial(record, prompt_sizes=())
PROMPT = prompt_of(50)
FLOAT, ID = 4, 8  # bytes


def step_of(options, rows, begin=lambda llm: None):
    """Bytes by label of the first decode step with so many rows, and how many drafts it gives."""
    named = {SHORT.get(name, name): value for name, value in options.items()}
    with LLM(folder_with_module("deepseek-v3", "right"), **{**THREADS, "debug": False, **named}) as llm:
        begin(llm)
        engine, plans, submit = llm.engine, [], llm.engine.executor.submit
        engine.executor.submit = lambda plan: (plans.append(plan), submit(plan))
        engine.add_request("a", PROMPT, SamplingParams(temperature=0, max_tokens=60))
        while True:
            before = llm.stats().traffic.bytes_by_label
            engine.step()
            (*_, plan) = plans
            if sum(segment.length for segment in plan.segments if not segment.prefill) == rows:
                (sequence,) = engine.scheduler.running
                sent = Counter(llm.stats().traffic.bytes_by_label)
                sent.subtract(before)
                return {label: count for label, count in sent.items() if count}, len(sequence.expected)


@pytest.mark.parametrize("k", [1, 3])
def test_dcp_4_sends_the_bytes_of_the_formula_to_verify_and_to_draft(k):
    """Four ranks are one context group, so n = 4. A request decodes with k drafts, so a step has r = k + 1 rows of it.

    With gather_q each of the n ranks sends its Hq / n heads' absorbed queries of a row, of L + R elements, to n - 1
    others, and gets from each a state of L + 1 fp32 for each head. So all ranks send for a row and layer

        a = (n - 1) · Hq · ((L + R) + (L + 1)) · 4 bytes.

    - Verification: r rows in all layers, `layers · r · a`.
    - Drafting: the module is one layer. Its first run has the r rows of the step, each of the k - 1 others one row:
      `(r + k - 1) · a`. The rank that has sampled sends the r ids, of 8 bytes, to the n - 1 others.
    - Hidden rows: none. They stay where they were computed.

    The TP group is the same four ranks. An all-reduce of a row of H elements sends t = n · (n - 1) · H · 4 bytes: two
    in a layer, and one for the embedding. The logits of a row, of V elements, are gathered: v = (n - 1) · V · 4 bytes.
    """
    sent, drafts = step_of(
        {"tp": 4, "dcp": 4, "schedule": "gather_q", "speculative": f"mtp:{k}", "page_size": 16}, k + 1
    )
    n, r, layers = 4, k + 1, 2
    heads, latent, rope, hidden, vocabulary = 24, 16, 4, 48, 97
    a = (n - 1) * heads * ((latent + rope) + (latent + 1)) * FLOAT
    t, v = n * (n - 1) * hidden * FLOAT, (n - 1) * vocabulary * FLOAT
    runs = r + k - 1
    assert drafts == k
    assert sent == {
        "gather_q": layers * r * a,
        "tp": r * ((2 * layers + 1) * t + v),
        "drafts/gather_q": runs * a,
        "drafts/tp": runs * (3 * t + v),
        **({"drafts/ids": (n - 1) * r * ID} if k > 1 else {}),
    }


@pytest.mark.parametrize("begin", [lambda llm: None, record_of_latents], ids=["launched", "recorded"])
def test_tp_2_sends_the_bytes_of_the_formula_recorded_or_not(begin):
    """As above with n = 2, where every rank has all pages: no query, state or id is sent. The module's head gets the
    accepted row only. The graphs are of r rows and one request, so nothing is padded."""
    k = 3
    options = {"tp": 2, "speculative": f"mtp:{k}", "attention_backend": "torch"}
    sent, drafts = step_of(options, k + 1, begin)
    n, r, layers, hidden, vocabulary = 2, k + 1, 2, 48, 97
    t, v = n * (n - 1) * hidden * FLOAT, (n - 1) * vocabulary * FLOAT
    assert drafts == k
    assert sent == {"tp": r * ((2 * layers + 1) * t + v), "drafts/tp": (r + k - 1) * 3 * t + k * v}


@pytest.mark.parametrize(
    ("grid", "schedule"), [((2, 1, 2), "ring_q"), ((2, 2, 2), "gather_q"), ((1, 3, 1), "gather_kv")], ids=str
)
def test_the_first_run_of_the_module_sends_what_a_layer_sends(grid, schedule):
    tp, pcp, dcp = grid
    options = {"tp": tp, "pcp": pcp, "dcp": dcp, "schedule": schedule, "speculative": "mtp:1", "page_size": 4}
    sent, _ = step_of(options, 2)
    assert sent[schedule] == 2 * sent[f"drafts/{schedule}"] > 0
    assert {label for label in sent if label.startswith("drafts/")} <= {f"drafts/{schedule}", "drafts/tp"}


def test_drafts_from_a_prompt_send_nothing():
    sent, _ = step_of({"tp": 2, "dcp": 2, "speculative": "prompt-lookup:3"}, 1)
    assert sent and not any(label.startswith("drafts") for label in sent)
