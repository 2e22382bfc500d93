"""The detokenizer: whole characters only, stop strings wherever they fall, constant work per token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.engine.frontend.completion import Completion
from longspan.engine.frontend.detokenizer import Detokenizer, Tokenizer
from longspan.errors import RequestError
from longspan.request import FinishReason, SampledToken, SamplingParams, TokenOutput

PLAIN = SamplingParams()
SPECIAL = 10_000


class ChunkTokenizer:
    """Token i stands for the bytes `chunks[i]`; ids from SPECIAL on are special. Counts its work."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks
        self.decoded = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        self.decoded += len(token_ids)
        shown = b"" if skip_special_tokens else b"<special>"
        joined = b"".join(shown if i >= SPECIAL else self.chunks[i] for i in token_ids)
        return joined.decode("utf-8", errors="replace")


def byte_tokenizer() -> ChunkTokenizer:
    return ChunkTokenizer([bytes([i]) for i in range(256)])


def feed(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    """The pieces released by each token and by the end; the contract that every test relies on."""
    pieces = [detokenizer.append(token) for token in token_ids] + [detokenizer.finish()]
    assert "".join(pieces) == detokenizer.text
    return pieces


def text_of(text: str, params: SamplingParams) -> Detokenizer:
    detokenizer = Detokenizer(byte_tokenizer(), params)
    feed(detokenizer, list(text.encode()))
    return detokenizer


# --- characters -------------------------------------------------------------------------------------


def test_a_multi_byte_character_is_released_by_its_last_byte() -> None:
    pieces = feed(Detokenizer(byte_tokenizer(), PLAIN), list("a😀b".encode()))
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_text_before_an_incomplete_character_is_not_held_back() -> None:
    tokenizer = ChunkTokenizer([b"ab\xe4", b"\xbd", b"\xa0c"])
    assert feed(Detokenizer(tokenizer, PLAIN), [0, 1, 2]) == ["ab", "", "你c", ""]


def test_a_character_still_incomplete_at_the_end_is_a_replacement_character() -> None:
    assert feed(Detokenizer(byte_tokenizer(), PLAIN), [0x61, 0xF0, 0x9F]) == ["a", "", "", "\ufffd"]


def test_finishing_twice_releases_nothing_more() -> None:
    detokenizer = text_of("a\ufffd", SamplingParams(stop=("\ufffdb",)))
    assert (detokenizer.finish(), detokenizer.text) == ("", "a\ufffd")


some_text = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("\ufffd😀你é a")), max_size=60)


@settings(max_examples=200, deadline=None)
@given(some_text)
def test_bytes_of_any_text_give_the_text(text: str) -> None:
    assert text_of(text, PLAIN).text == text


@settings(max_examples=200, deadline=None)
@given(some_text, st.lists(st.integers(1, 9), min_size=1))
def test_tokens_that_cut_a_text_anywhere_give_the_text(text: str, sizes: list[int]) -> None:
    chunks: list[bytes] = []
    rest = text.encode()
    while rest:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(rest[:size])
        rest = rest[size:]
    detokenizer = Detokenizer(ChunkTokenizer(chunks), PLAIN)
    feed(detokenizer, list(range(len(chunks))))
    assert detokenizer.text == text


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_bytes_that_are_no_text_give_what_decoding_them_at_once_gives(data: bytes) -> None:
    detokenizer = Detokenizer(byte_tokenizer(), PLAIN)
    feed(detokenizer, list(data))
    assert detokenizer.text == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("garbage", range(10, 22))
def test_a_character_after_any_number_of_bad_bytes_is_whole(garbage: int) -> None:
    detokenizer = Detokenizer(byte_tokenizer(), PLAIN)
    feed(detokenizer, list(b"\xff" * garbage + "😀".encode()))
    assert detokenizer.text == "\ufffd" * garbage + "😀"


def test_characters_that_never_end_on_a_token_are_released_all_the_same() -> None:
    text = "é" * 200
    data = text.encode()
    tokenizer = ChunkTokenizer([data[:1], data[1:3], data[-1:]])
    detokenizer = Detokenizer(tokenizer, PLAIN)
    detokenizer.append(0)
    assert [detokenizer.append(1) for _ in range(199)] == ["é"] * 199


# --- special tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<special>b")])
def test_special_tokens_are_skipped_unless_wanted(skip: bool, text: str) -> None:
    detokenizer = Detokenizer(byte_tokenizer(), SamplingParams(skip_special_tokens=skip))
    feed(detokenizer, [0x61, SPECIAL, 0x62])
    assert detokenizer.text == text


def test_decoding_does_not_clean_up_spaces() -> None:
    class Recording:
        clean_up_tokenization_spaces = True

        def __init__(self) -> None:
            self.options: dict[str, Any] = {}

        def decode(self, token_ids: list[int], **options: Any) -> str:
            self.options = options
            return "a , b"

    tokenizer = Recording()
    Detokenizer(tokenizer, PLAIN).append(0)
    assert tokenizer.options == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


# --- work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [[0x61], list("😀".encode()), [0xF0], [0xBF], [SPECIAL], [0x61, SPECIAL, SPECIAL]],
    ids=["ascii", "emoji", "lone lead byte", "lone continuation", "special", "mixed"],
)
def test_work_grows_no_faster_than_the_output(pattern: list[int]) -> None:
    def work(num_tokens: int) -> int:
        tokenizer = byte_tokenizer()
        detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("never found",)))
        for i in range(num_tokens):
            detokenizer.append(pattern[i % len(pattern)])
        return tokenizer.decoded

    assert work(2400) - work(1200) <= 1.05 * (work(1200) - work(0))
    assert work(2400) <= 2400 * 40


# --- stop strings -----------------------------------------------------------------------------------


def test_a_stop_string_over_several_tokens_ends_the_text_before_it() -> None:
    detokenizer = Detokenizer(byte_tokenizer(), SamplingParams(stop=("END",)))
    assert feed(detokenizer, list(b"ab END cd")) == ["a", "b", " ", "", "", "", "", "", "", ""]
    assert (detokenizer.text, detokenizer.stopped_by) == ("ab ", "END")


def test_a_stop_string_may_be_included() -> None:
    detokenizer = text_of("ab END cd", SamplingParams(stop=("END",), include_stop_str_in_output=True))
    assert (detokenizer.text, detokenizer.stopped_by) == ("ab END", "END")


def test_a_stop_string_inside_one_token_ends_the_text_inside_it() -> None:
    detokenizer = Detokenizer(ChunkTokenizer([b"one. two", b" three"]), SamplingParams(stop=(". ",)))
    assert feed(detokenizer, [0, 1]) == ["one", "", ""]


def test_text_that_turns_out_to_be_no_stop_string_is_released() -> None:
    pieces = feed(Detokenizer(byte_tokenizer(), SamplingParams(stop=("aab",))), list(b"aaac"))
    assert pieces == ["", "", "a", "aac", ""]


def test_the_beginning_of_a_stop_string_at_the_end_is_released() -> None:
    detokenizer = text_of("see EN", SamplingParams(stop=("END",)))
    assert (detokenizer.text, detokenizer.stopped_by) == ("see EN", None)


@pytest.mark.parametrize(
    ("min_tokens", "stop", "expected"),
    [
        (0, ["ab"], ""), (2, ["ab"], "abc"), (1, ["ab"], ""), (3, ["ab"], "abc"), (5, ["ab"], "abcabc"),
        (2, ["ab", "abcd"], "abc"), (3, ["ca"], "ab"), (4, ["ca"], "abcabc"),
    ],
)  # fmt: skip
def test_a_stop_string_counts_if_it_ends_behind_the_first_min_tokens(min_tokens, stop, expected) -> None:
    assert text_of("abcabc", SamplingParams(stop=stop, min_tokens=min_tokens)).text == expected


def test_of_several_stop_strings_the_earliest_in_the_text_wins() -> None:
    assert text_of("a one b two", SamplingParams(stop=("two", "one"))).stopped_by == "one"


def test_of_stop_strings_that_end_together_the_longest_wins() -> None:
    detokenizer = text_of("a stop", SamplingParams(stop=("op", "stop")))
    assert (detokenizer.text, detokenizer.stopped_by) == ("a ", "stop")


def literal_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character until a stop string is complete; the longest of several."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


# Two letters and short strings make stops, near stops and overlaps of stops frequent.
dense_text = st.text("abé", max_size=30)
some_stops = st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(dense_text, st.text("abé", min_size=1, max_size=5))
def test_the_text_before_any_stop_string_is_released_and_no_more(text: str, stop: str) -> None:
    expected = text[: text.find(stop)] if stop in text else text
    assert text_of(text, SamplingParams(stop=(stop,))).text == expected


@settings(max_examples=300, deadline=None)
@given(dense_text, some_stops, st.integers(1, 7), st.booleans())
def test_several_stop_strings_end_the_text_alike_however_it_falls_into_tokens(
    text: str, stops: list[str], size: int, include: bool
) -> None:
    data = text.encode()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    params = SamplingParams(stop=tuple(stops), include_stop_str_in_output=include)
    detokenizer = Detokenizer(ChunkTokenizer(chunks), params)
    feed(detokenizer, list(range(len(chunks))))
    expected, stop = literal_stop(text, stops)
    assert detokenizer.stopped_by == stop
    assert detokenizer.text == expected + (stop if include and stop else "")


# --- no tokenizer -----------------------------------------------------------------------------------


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert feed(Detokenizer(None, PLAIN), [1, 2, 3]) == ["", "", "", ""]


def test_without_a_tokenizer_stop_strings_are_refused() -> None:
    with pytest.raises(RequestError, match=r"stop=\['END'\]: stop strings need a tokenizer"):
        Detokenizer(None, SamplingParams(stop=("END",)))


# --- tokenizers of other makes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """A tokenizer of Llama 2's kind: words begin with a mark, unknown characters are byte tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "▁hello", "▁world", "!", "▁"] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def sentencepiece_ids(words: list[str], emoji: str = "") -> list[int]:
    known = {"▁hello": 1, "▁world": 2, "!": 3, "▁": 4}
    return [known[word] for word in words] + [5 + byte for byte in emoji.encode()]


def test_spaces_between_sentencepiece_words_are_kept(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece_ids(["▁hello", "▁world", "!", "▁", "▁hello"])
    assert feed(Detokenizer(sentencepiece, PLAIN), ids) == ["hello", " world", "!", " ", " hello", ""]


def test_byte_fallback_characters_in_a_row_come_one_by_one(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece_ids(["▁hello"], "é😀") + sentencepiece_ids(["▁world"])
    assert feed(Detokenizer(sentencepiece, PLAIN), ids) == ["hello", "", "é", "", "", "", "😀", " world", ""]


def test_context_keeps_the_space_before_the_first_word(sentencepiece: Tokenizer) -> None:
    detokenizer = Detokenizer(sentencepiece, PLAIN, context=sentencepiece_ids(["▁hello"]))
    assert feed(detokenizer, sentencepiece_ids(["▁world"])) == [" world", ""]


class SpaceDroppingTokenizer:
    """Like SentencePiece's decoders: the space of the first token it is given is dropped."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join([" France", " is", " Paris"][token] for token in token_ids).removeprefix(" ")


@pytest.mark.parametrize(("stop", "text"), [((), " is Paris"), ((" Paris",), " is")])
def test_a_completion_keeps_its_first_space_and_finds_stops_in_it(stop, text):
    params = SamplingParams(stop=stop)
    completion = Completion("0", 0, params, 0, Detokenizer(SpaceDroppingTokenizer(), params, [0]))
    completion.take(TokenOutput("0", (SampledToken("0", 1),), None, 0))
    completion.take(TokenOutput("0", (SampledToken("0", 2),), FinishReason.LENGTH, 0))
    assert completion.output.text == text
