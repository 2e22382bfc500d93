"""The tokenizer rebuilt from the GGUF file, and text through the whole engine."""

from collections.abc import Iterator

import pytest

from longspan import LLM, SamplingParams
from longspan.engine.frontend.detokenizer import Detokenizer
from tests.smollm2.conftest import tokenizer

pytestmark = pytest.mark.smollm2


def test_digits_are_single_tokens_and_control_tokens_are_one():
    ids = tokenizer().encode("12345 <|im_start|>user")
    assert [tokenizer().decode([token]) for token in ids[:5]] == list("12345")
    assert 1 in ids
    assert tokenizer().convert_ids_to_tokens(1) == "<|im_start|>"


@pytest.mark.parametrize("text", ["Hello, world!", "naïve café — 東京 🗼", "  two  spaces\n\ttab", "x = {1: 'a'}", ""])
def test_text_survives_a_round_trip(text):
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_text_is_released_piece_by_piece_in_whole_characters():
    text = "Grüße, 你好 👩‍👩‍👧! It 's 3 , 141 .\n\n  def f(x):\n\treturn x"
    detokenizer = Detokenizer(tokenizer(), SamplingParams())
    pieces = [detokenizer.append(token) for token in tokenizer().encode(text)] + [detokenizer.finish()]
    assert "".join(pieces) == detokenizer.text == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_every_token_of_the_file_has_its_id():
    assert len(tokenizer()) == 49152


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("smollm2", prefill_context_parallel_size=2, local_context=8, num_threads=1, dtype="float32") as started:
        yield started


def test_a_question_is_answered_and_ends_at_the_models_end_token(llm):
    prompt = llm.chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=32))
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"


def test_a_stop_string_across_a_token_boundary_is_cut_off(llm):
    (whole,) = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=12))
    text = whole.outputs[0].text
    stop = text[5:12]
    (cut,) = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=12, stop=stop))
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)


def test_batches_of_text_come_back_in_order(llm):
    prompts = ["One, two, three,", "The capital of France is"]
    together = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6))
    alone = [llm.generate(prompt, SamplingParams(temperature=0, max_tokens=6))[0] for prompt in prompts]
    assert [output.prompt for output in together] == prompts
    assert [output.outputs[0].text for output in together] == [output.outputs[0].text for output in alone]
