"""`/v1/completions` as OpenAI's own client sees it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import torch

from longspan import LLM, SamplingParams
from longspan.server.text import last_tokens
from tests.oracle import oracle
from tests.server.running import Running, ascii_folder, ascii_tokenizer, expected

PROMPT = "A long prompt that lies on both ranks, spread over pages of four."


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def events(server: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, of which the last is [DONE]."""
    with server.client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_greedy_text_is_that_of_transformers(client):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].text == expected(PROMPT, 20)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 20)


def test_a_stream_gives_the_same_text_piece_by_piece_and_its_usage_at_the_end(client):
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected(PROMPT, 20)
    assert len(chunks) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert last.choices == []
    assert last.usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_can_come_with_every_chunk(server):
    body = {"prompt": "abc", "max_tokens": 3, "stream_options": {"continuous_usage_stats": True}}
    assert [event["usage"]["completion_tokens"] for event in events(server, "/v1/completions", body)][-1] == 3


def test_many_prompts_with_many_completions_have_their_own_indices(server):
    answer = server.complete(["abc", "xyz", "abc"], 5, n=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[0] == texts[1] == texts[4] == texts[5] == expected("abc", 5) != texts[2]


def test_streamed_choices_together_are_those_of_the_whole_answer(server):
    body = {"prompt": ["abc", "xyz"], "max_tokens": 6, "n": 2, "seed": 5}
    whole = {c["index"]: c["text"] for c in server.post("/v1/completions", body).json()["choices"]}
    texts = dict.fromkeys(whole, "")
    for event in events(server, "/v1/completions", body):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == whole
    assert len(set(texts.values())) > 2


def test_a_seed_repeats_and_another_differs(server):
    texts = [server.complete("abc", 12, temperature=1, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_text_before_it(server):
    text = expected("abc", 30)
    stop = text[10:12]
    choice = server.complete("abc", 30, stop=["never so", stop])["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_log_probabilities_are_those_of_the_engine(server):
    answer = server.complete("abc", 4, logprobs=2)
    lines = answer["choices"][0]["logprobs"]
    with LLM(ascii_folder(), num_threads=1, dtype="float32") as llm:
        (output,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=4, logprobs=2))
    assert lines["token_logprobs"] == pytest.approx([row.sampled for row in output.outputs[0].logprobs], abs=1e-4)
    assert "".join(lines["tokens"]) == answer["choices"][0]["text"]
    assert lines["text_offset"] == [0, 1, 2, 3]
    assert all(len(top) == 2 for top in lines["top_logprobs"])


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_gives_the_prompt_and_its_log_probabilities(server, max_tokens):
    answer = server.complete(PROMPT, max_tokens, echo=True, logprobs=1)
    choice = answer["choices"][0]
    assert choice["text"] == PROMPT + (expected(PROMPT, max_tokens) if max_tokens else "")
    ids = torch.tensor([ascii_tokenizer().encode(PROMPT)])
    with torch.inference_mode():
        rows = oracle("llama")(ids).logits[0].log_softmax(-1)
    wanted = rows[:-1].gather(1, ids[0, 1:, None]).squeeze(1).tolist()
    first, *rest = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert rest[: len(wanted)] == pytest.approx(wanted, abs=1e-3)
    assert answer["usage"]["completion_tokens"] == max_tokens


def test_a_lone_token_is_echoed_without_a_log_probability(server):
    lines = server.complete("a", 0, echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert (lines["tokens"], lines["token_logprobs"], lines["top_logprobs"]) == (["a"], [None], [None])


def test_penalties_of_any_size_leave_a_token_to_sample(server):
    answer = server.complete("hello", 5, repetition_penalty=1e-40, top_p=0.9, temperature=1)
    assert answer["usage"]["completion_tokens"] == 5
    assert server.engine.restarts == 0


def test_a_biased_token_wins_and_a_banned_one_never_comes(server):
    text = expected("abc", 8)
    assert server.complete("abc", 8, logit_bias={"33": 100})["choices"][0]["text"] == "A" * 8
    banned = str(ord(text[0]) - 32)
    assert text[0] not in server.complete("abc", 8, logit_bias={banned: -100})["choices"][0]["text"]


def test_only_allowed_tokens_come_and_none_ends_the_text_before_min_tokens(server):
    fields = {"allowed_token_ids": [33, 34], "stop_token_ids": [34], "logit_bias": {"34": 50}}
    assert server.complete("abc", 8, **fields)["choices"][0]["text"] == ""
    choice = server.complete("abc", 8, **fields, min_tokens=5)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("AAAAA", "stop", 34)


def test_a_stop_string_within_min_tokens_does_not_end_the_text(server):
    text = expected("abc", 30)
    stop = text[3]
    found = server.complete("abc", 30, stop=stop, min_tokens=12)["choices"][0]["text"]
    ends = text.find(stop, 12)
    assert found == (text if ends < 0 else text[:ends])
    assert len(found) >= 12


def test_bad_words_never_come_and_their_parts_may(server):
    text = expected("abc", 20)
    word = text[4:6]
    found = server.complete("abc", 20, bad_words=[word])["choices"][0]["text"]
    assert found[:5] == text[:5] and word not in found
    assert text[0] not in server.complete("abc", 20, bad_words=[text[0]])["choices"][0]["text"]


def test_only_the_end_of_a_prompt_is_kept_on_request_however_long_it_is(server):
    assert server.complete("x" * 80_000 + "abc", 8, truncate_prompt_tokens=3)["choices"][0]["text"] == expected(
        "abc", 8
    )
    answer = server.complete([*[5] * 900, 65, 66, 67], 8, truncate_prompt_tokens=3)
    assert (answer["usage"]["prompt_tokens"], answer["choices"][0]["text"]) == (3, expected("abc", 8))
    assert server.complete("x" * 2000, 12, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 500
    echoed = server.complete("xyzabc", 1, truncate_prompt_tokens=3, echo=True, logprobs=0)["choices"][0]
    assert echoed["text"][:3] == "".join(echoed["logprobs"]["tokens"][:3]) == "abc"


@pytest.mark.parametrize(
    ("tokens", "keep", "kept"),
    [([9, 1, 2, 3], 3, [9, 2, 3]), ([9, 1, 2, 3], 1, [3]), ([9, 1], 3, [9, 1]), ([8, 1, 2, 3], 3, [1, 2, 3])],
)
def test_what_all_texts_begin_with_is_kept_and_counts(tokens, keep, kept):
    assert last_tokens(tokens, keep, [9]) == kept


def test_an_answer_has_the_id_that_its_request_gives(server):
    assert server.complete("abc", 1, request_id="mine")["id"] == "cmpl-mine"


def test_scores_of_the_prompt_come_by_token_id_with_ranks(server):
    choice = server.complete("abc", 1, prompt_logprobs=2)["choices"][0]
    lines = server.complete("abc", 1, echo=True, logprobs=2)["choices"][0]["logprobs"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    for token, row, value in zip("bc", rest, lines["token_logprobs"][1:], strict=False):
        given = row[str(ord(token) - 32)]
        assert (given["decoded_token"], given["logprob"]) == (token, value)
        assert sorted(one["rank"] for one in row.values() if one["rank"]) == [1, 2]
        assert max(row.values(), key=lambda one: one["logprob"])["rank"] == 1


def test_token_ids_are_given_on_request(server):
    choice = server.complete([1, 2, 3], 4, return_token_ids=True)["choices"][0]
    assert "".join(chr(32 + token) for token in choice["token_ids"]) == choice["text"]


def test_tokens_and_text_are_turned_into_each_other(server):
    answer = server.post("/tokenize", {"prompt": "Hi!"}).json()
    assert answer == {"count": 3, "max_model_len": 512, "tokens": [40, 73, 1]}
    assert server.post("/detokenize", {"tokens": [40, 73, 1]}).json() == {"prompt": "Hi!"}


def test_the_served_model_is_listed(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
