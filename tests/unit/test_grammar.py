"""A matcher follows drafts under a grammar, takes wrong ones back, and is then as if they had never been."""

from __future__ import annotations

import random
from functools import cache

import pytest
from llguidance import LLMatcher

from longspan.engine.rank.sampling.grammar import Matcher, Vocabulary
from longspan.errors import RequestError
from tests.oracle import VOCAB
from tests.server.running import ascii_tokenizer

END = VOCAB - 1
GRAMMARS = {
    "object": LLMatcher.grammar_from_json_schema(
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yes"]}}, "required": ["a"]}
    ),
    "rows": LLMatcher.grammar_from_json_schema(
        {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "maxItems": 2}, "maxItems": 4}
    ),
    "pattern": LLMatcher.grammar_from_regex(r"(ab|abc|[0-9]{2,5}x)+(\.|!!)?"),
    "calls": LLMatcher.grammar_from_lark(
        'start: "<" call ("," call)* ">"\ncall: /[a-c]+/ "(" %json {"type": "null"} ")"'
    ),
}


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(ascii_tokenizer().backend_tokenizer.to_str, VOCAB, (END,))


def matcher(grammar: str) -> Matcher:
    return vocabulary().matcher(grammar)


def tokens(text: str) -> list[int]:
    return list(ascii_tokenizer().encode(text))


def members(bits: bytes) -> list[int]:
    return [token for token in range(VOCAB) if bits[token >> 3] >> (token & 7) & 1]


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("seed", range(6))
def test_drafts_that_are_taken_back_leave_no_trace(name: str, seed: int) -> None:
    """A walk whose steps read up to five drafts, right and wrong ones, in any order of the rows."""
    pick = random.Random(seed)
    followed, output = matcher(GRAMMARS[name]), []
    while len(output) < 60 and output[-1:] != [END]:
        drafts: list[int] = []
        for _ in range(pick.randrange(6)):
            may_follow = members(matcher(GRAMMARS[name]).allowed([*output, *drafts]))
            drafts.append(pick.choice(may_follow))
            if drafts[-1] == END:
                break
        counts = list(range(len(drafts) + 1))
        pick.shuffle(counts)
        for count in counts:
            ahead = [*output, *drafts[:count]]
            assert followed.allowed(ahead, count) == matcher(GRAMMARS[name]).allowed(ahead)
        right = pick.randrange(len(drafts) + 1)
        output += drafts[:right]
        if output[-1:] != [END]:
            output.append(pick.choice(members(matcher(GRAMMARS[name]).allowed(output))))


def test_a_draft_that_the_grammar_does_not_allow_is_an_error_of_its_row_alone() -> None:
    followed = matcher(GRAMMARS["pattern"])
    with pytest.raises(RequestError, match="token 67 is not allowed"):
        followed.allowed(tokens("12cx"), 3)
    with pytest.raises(RequestError, match="is not allowed"):
        followed.allowed(tokens("12c"), 2)
    assert members(followed.allowed(tokens("12"), 1)) == sorted(tokens("0123456789x"))
    assert members(followed.allowed(tokens("1"))) == sorted(tokens("0123456789"))
    with pytest.raises(RequestError):  # a token that was sampled
        followed.allowed(tokens("1c"))
    with pytest.raises(RequestError):
        followed.allowed(tokens("1"))


TOO_LARGE = LLMatcher.grammar_from_json_schema({"type": "string", "pattern": "(.{0,300}a.{0,300}){1,30}"})


def read_too_much(followed: Matcher, output: list[int]) -> None:
    """The grammar grows with every `a`, so behind some of them it cannot be followed."""
    with pytest.raises(RequestError, match="cannot be followed"):
        for count in range(1, 200):
            followed.allowed([*output, *tokens("a" * count)], count)


def test_drafts_that_are_too_much_for_the_library_fail_neither_their_request_nor_others() -> None:
    followed, sibling, output = matcher(TOO_LARGE), matcher(TOO_LARGE), tokens('"b')
    expected = followed.allowed(output)
    read_too_much(followed, output)
    assert followed.allowed(output) == expected
    assert sibling.allowed(output) == expected
    assert matcher(TOO_LARGE).allowed(output) == expected


def test_an_output_that_is_too_much_for_the_library_fails_alone() -> None:
    followed, output = matcher(TOO_LARGE), tokens('"b')
    expected = followed.allowed(output)
    with pytest.raises(RequestError, match="cannot be followed"):
        for count in range(1, 200):
            followed.allowed([*output, *tokens("a" * count)])
    with pytest.raises(RequestError, match="cannot be followed"):
        followed.allowed([*output, *tokens("a" * 200)])
    assert matcher(TOO_LARGE).allowed(output) == expected


@pytest.mark.parametrize(
    ("output", "drafts", "count"),
    [
        ("1", "2x3", 3),
        ("1", "2xx3", 2),
        ("1", "c", 0),
        ("ab", ".", 1),
        ("ab", ".a", 1),
        ("ab!", "!", 1),
        ("ab!!", "!", 0),
    ],
)
def test_the_drafts_before_the_first_that_is_not_allowed_are_counted(output: str, drafts: str, count: int) -> None:
    followed = matcher(GRAMMARS["pattern"])
    assert followed.count_allowed(tokens(output), tokens(drafts)) == count
    assert followed.allowed(tokens(output)) == matcher(GRAMMARS["pattern"]).allowed(tokens(output))


def test_an_end_may_be_drafted_where_the_grammar_may_end() -> None:
    followed = matcher(GRAMMARS["pattern"])
    assert followed.count_allowed(tokens("ab"), [END, 5]) == 1
    assert followed.count_allowed(tokens("abc1"), [END]) == 0
    assert members(followed.allowed([*tokens("abc12x"), END], 1)) == [END]
    assert END in members(followed.allowed(tokens("abc12x")))


def test_a_grammar_that_cannot_be_read_allows_no_draft() -> None:
    assert matcher("{").count_allowed([], [1]) == 0
    with pytest.raises(RequestError, match="cannot be followed"):
        matcher("{").allowed([])
