"""Tool calls in text: every family's way of writing them, however the text is cut, and nothing ever lost."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.errors import ConfigError
from longspan.server.tools import TOOL_FORMATS, ParsedDelta, ToolCall, ToolParser, detect_format
from longspan.server.tools.forced import CallListReader, call_begin

ADD = ToolCall("add", '{"a": 1, "b": -2.5}')
SAY = ToolCall("say", '{"text": "<}]) ü", "loud": true, "to": [{"id": null}]}')
NOW = ToolCall("now", "{}")

ADD_JSON = '{"name": "add", "arguments": {"a": 1, "b": -2.5}}'
SAY_JSON = '{"name": "say", "arguments": {"text": "<}]) ü", "loud": true, "to": [{"id": null}]}}'
NOW_JSON = '{"name": "now", "arguments": {}}'
ADD_LLAMA, SAY_LLAMA = (text.replace("arguments", "parameters") for text in (ADD_JSON, SAY_JSON))
ADD_PYTHON = "add(a=1, b=-2.5)"
SAY_PYTHON = """say(text="<}]) ü", loud=True, to=[{'id': None}])"""


def deepseek_v3(call: ToolCall) -> str:
    fenced = f"\n```json\n{call.arguments}\n```"
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call.name}{fenced}<｜tool▁call▁end｜>"


def deepseek_v31(call: ToolCall) -> str:
    return f"<｜tool▁call▁begin｜>{call.name}<｜tool▁sep｜>{call.arguments}<｜tool▁call▁end｜>"


def mistral(call: ToolCall, mark: str = "[ARGS]") -> str:
    return f"[TOOL_CALLS]{call.name}{mark}{call.arguments}"


BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

GOOD = [
    ("hermes", f"<tool_call>\n{ADD_JSON}\n</tool_call>", "", [ADD]),
    ("hermes", f"I'll <b>add</b>.\n<tool_call>{ADD_JSON}</tool_call>", "I'll <b>add</b>.\n", [ADD]),
    (
        "hermes",
        f"<tool_call>{SAY_JSON}</tool_call>\n<tool_call>{NOW_JSON}</tool_call>\nDone.",
        "\nDone.",
        [SAY, NOW],
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1, "b": -2.5}, "name": "add"}</tool_call>', "", [ADD]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [NOW]),
    ("llama3_json", ADD_LLAMA, "", [ADD]),
    ("llama3_json", f"<|python_tag|>{SAY_LLAMA}; {ADD_LLAMA}", "", [SAY, ADD]),
    ("llama3_json", f"\n{ADD_LLAMA}{SAY_LLAMA} and so on", "\n and so on", [ADD, SAY]),
    ("llama3_json", NOW_JSON, "", [NOW]),
    ("mistral", f"[TOOL_CALLS] [{ADD_JSON}, {SAY_JSON}]", "", [ADD, SAY]),
    ("mistral", f"See [1]. [TOOL_CALLS][{ADD_JSON[:-1]}, " + '"id": "a1b2c3d4e"}] Done', "See [1].  Done", [ADD]),
    ("mistral", f"[TOOL_CALLS] [{ADD_JSON} oops", " oops", [ADD]),
    ("mistral", mistral(ADD) + mistral(SAY), "", [ADD, SAY]),
    ("mistral", mistral(ADD, "[CALL_ID]a1b2c3d4e[ARGS]"), "", [ADD]),
    ("mistral", f"[TOOL_CALLS] [{SAY_JSON}" + mistral(ADD), "", [SAY, ADD]),
    ("deepseek_v3", f"Adding.{BEGIN}{deepseek_v3(ADD)}\n{deepseek_v3(SAY)}{END}", "Adding.", [ADD, SAY]),
    ("deepseek_v3", f"{BEGIN}{deepseek_v31(ADD)}{deepseek_v31(SAY)}{END} Done", " Done", [ADD, SAY]),
    ("deepseek_v3", f"{BEGIN}{deepseek_v3(ADD)}{BEGIN}{deepseek_v3(SAY)}{END}", "", [ADD, SAY]),
    ("pythonic", f"[{ADD_PYTHON}, {SAY_PYTHON}]", "", [ADD, SAY]),
    ("pythonic", "[\n    now(),\n] [now()]", " [now()]", [NOW]),
    ("pythonic", f"<|python_start|> [{ADD_PYTHON}]<|python_end|>", "", [ADD]),
    ("pythonic", "[say(text='<}]) ü', loud=true, to=[{\"id\": null}])]", "", [SAY]),
]

BAD = [
    ("hermes", "<tool_call>add(1, 2)</tool_call>"),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1,}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": 7, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": "one"}</tool_call>'),
    ("hermes", f"<tool_call>{ADD_JSON}</tool_response>"),
    ("llama3_json", "{name} is a placeholder"),
    ("llama3_json", '{"name": "Ada"}'),
    ("llama3_json", '{"name": "Ada", "parameters": 3}'),
    ("llama3_json", f"{{{ADD_LLAMA}}}"),
    ("llama3_json", "<|python_tag|>import math"),
    ("llama3_json", f"Here: {ADD_LLAMA}"),
    ("llama3_json", f"```json\n{ADD_LLAMA}\n```"),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", "[TOOL_CALLS]add"),
    ("mistral", "[TOOL_CALLS][ARGS]{}"),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": }'),
    ("deepseek_v3", f"{BEGIN}no call{END}"),
    ("deepseek_v3", deepseek_v3(ADD).replace("```json", "```")),
    ("deepseek_v3", deepseek_v3(ToolCall("add", "[1]"))),
    ("pythonic", "[1] According to the source"),
    ("pythonic", "[]"),
    ("pythonic", "[add(1, 2)]"),
    ("pythonic", "[add(a=one)]"),
    ("pythonic", "[add(**{'a': 1})]"),
    ("pythonic", "[add(a={[1]: 2})]"),
    ("pythonic", '[add(a="\0")]'),
    ("pythonic", "[[now()]]"),
    ("pythonic", "[add(a=1), 2]"),
    ("pythonic", "[add(a=b'1')]"),
    ("pythonic", "[add(a={1, 2})]"),
    ("pythonic", "[math.add(a=1)]"),
    ("pythonic", f"Sure: [{ADD_PYTHON}]"),
]


def deltas(format: str, pieces: Iterable[str]) -> list[ParsedDelta]:
    """What each piece and the end made certain."""
    parser = ToolParser(format)
    return [*(parser.append(piece) for piece in pieces), parser.finish()]


def parse(format: str, pieces: Iterable[str]) -> tuple[str, list[ToolCall]]:
    found = deltas(format, pieces)
    return "".join(delta.content for delta in found), [call for delta in found for call in delta.calls]


def released(format: str, pieces: Iterable[str]) -> list[str]:
    return [delta.content for delta in deltas(format, pieces)]


# --- formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "text", "content", "calls"), GOOD)
def test_calls_are_found_and_the_rest_is_content(format: str, text: str, content: str, calls: list[ToolCall]) -> None:
    assert parse(format, [text]) == (content, calls)


@pytest.mark.parametrize(("format", "text"), BAD)
def test_what_only_begins_like_a_call_is_content_unchanged(format: str, text: str) -> None:
    assert parse(format, [text]) == (text, [])


@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_plain_text_is_content_unchanged(format: str) -> None:
    text = "  Is 1 < 2 [yes]?\n\n```json\n{}\n```\n"
    assert parse(format, [text]) == (text, [])


def test_every_format_has_an_example_here() -> None:
    assert {format for format, *_ in GOOD} == {format for format, _ in BAD} == set(TOOL_FORMATS)


def test_an_unknown_format_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match="tool_call_parser=xml: unknown choice; use one of hermes, "):
        ToolParser("xml")


# --- arguments --------------------------------------------------------------------------------------


def hermes(arguments: str) -> tuple[str, list[ToolCall]]:
    return parse("hermes", [f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'])


@pytest.mark.parametrize("value", ["</tool_call>", "{", "}", '"', "\\", '\\"}', "<tool_call>{"])
def test_marks_and_braces_in_a_string_do_not_end_a_call(value: str) -> None:
    arguments = json.dumps({"x": value})
    assert hermes(arguments) == ("", [ToolCall("f", arguments)])


@pytest.mark.parametrize("value", ["]", ")", "'", '"', "\\", '\\")]'])
def test_brackets_in_a_python_string_do_not_end_a_call(value: str) -> None:
    assert parse("pythonic", [f"[f(x={value!r})]"]) == ("", [ToolCall("f", json.dumps({"x": value}))])


def test_arguments_written_as_a_string_are_passed_as_that_string() -> None:
    assert hermes(json.dumps('{"a":1}')) == ("", [ToolCall("f", '{"a":1}')])


def test_arguments_as_a_string_that_is_not_json_make_no_call() -> None:
    assert hermes(json.dumps('{"a": NaN}'))[1] == []


def test_a_raw_newline_in_a_string_is_escaped() -> None:
    assert hermes('{"code": "a\nb"}') == ("", [ToolCall("f", '{"code": "a\\nb"}')])


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '"\\ud800"'])
def test_values_that_no_json_response_can_carry_make_no_call(value: str) -> None:
    content, calls = hermes(f'{{"x": {value}}}')
    assert (value in content, calls) == (True, [])


def test_half_a_surrogate_pair_in_the_text_makes_no_call() -> None:
    text = "[f(x='\ud800')]"
    assert parse("pythonic", [text]) == (text, [])


@pytest.mark.parametrize("value", ["[" * 1_500 + "]" * 1_500, "[" * 100_000 + "]" * 100_000])
def test_json_nested_too_deep_to_read_is_content(value: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {{"x": {value}}}}}</tool_call>'
    assert parse("hermes", [text]) == (text, [])


@pytest.mark.parametrize("value", ["[" * 1_500 + "]" * 1_500, "-" * 100_000 + "1", "1" + "+1" * 100_000])
def test_python_nested_too_deep_to_read_is_content(value: str) -> None:
    assert parse("pythonic", [f"[f(x={value})]"]) == (f"[f(x={value})]", [])


# --- text in pieces ---------------------------------------------------------------------------------

EXAMPLES = sorted({(format, text) for format, text, *_ in [*GOOD, *BAD]})


@pytest.mark.parametrize(("format", "text"), EXAMPLES)
def test_where_the_text_is_cut_makes_no_difference(format: str, text: str) -> None:
    whole = parse(format, [text])
    assert parse(format, text) == whole
    for cut in range(1, len(text)):
        assert parse(format, [text[:cut], text[cut:]]) == whole


@pytest.mark.parametrize(("format", "text", "content", "calls"), GOOD)
def test_a_text_cut_off_anywhere_loses_nothing(format: str, text: str, content: str, calls: list[ToolCall]) -> None:
    for end in range(len(text)):
        some_content, some_calls = parse(format, [text[:end]])
        assert some_calls == calls[: len(some_calls)]
        if not some_calls:
            assert some_content == text[:end]


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool", ADD_JSON, SAY_JSON, ADD_LLAMA, ADD_PYTHON, "<|python_tag|>",
    "[TOOL_CALLS]", "[ARGS]", "add", BEGIN, END, deepseek_v3(NOW), deepseek_v31(NOW), "<｜tool▁call▁begin｜>",
    '{"name": "f"', "[", "]", "{", "}", "(", ")", '"', "'", "\\", ",", ";", "<", " ", "\n", "\0", "hi",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(TOOL_FORMATS), st.lists(st.sampled_from(FRAGMENTS), max_size=12), st.data())
def test_any_text_however_cut_gives_the_same_and_loses_nothing(
    format: str, fragments: list[str], data: st.DataObject
) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, calls = parse(format, [text])
    assert parse(format, pieces) == parse(format, text) == (content, calls)
    remaining = iter(text)
    assert all(character in remaining for character in content), "content is the text with calls left out"
    assert calls or content == text


# --- what is certain is released at once ------------------------------------------------------------


@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_words_are_never_held_back(format: str) -> None:
    words = ["Two", " words", ", (and) ", "more", "."]
    assert released(format, words) == [*words, ""]


def test_what_may_begin_a_mark_is_held_until_it_does_not() -> None:
    assert released("hermes", "a<to b<") == ["a", "", "", "", "<to ", "b", "", "<"]


def test_a_call_is_given_by_the_last_character_of_its_end() -> None:
    text = f"<tool_call>{ADD_JSON}</tool_call>"
    *before, last, end = deltas("hermes", text)
    assert (set(before), last, end) == ({ParsedDelta()}, ParsedDelta(calls=(ADD,)), ParsedDelta())


def test_a_call_in_a_list_is_given_before_the_list_ends() -> None:
    first, *_ = deltas("mistral", [f"[TOOL_CALLS] [{ADD_JSON}", f", {SAY_JSON}]"])
    assert first == ParsedDelta(calls=(ADD,))


def test_a_call_is_found_after_one_that_is_malformed() -> None:
    broken = '<tool_call>{"name": "add", "arguments": {</tool_call>\n'
    first, *_ = deltas("hermes", [broken + f"<tool_call>{ADD_JSON}</tool_call>"])
    assert first == ParsedDelta(broken, (ADD,))


def test_space_after_the_last_call_is_content() -> None:
    assert released("hermes", [f"<tool_call>{ADD_JSON}</tool_call>", " \n"]) == ["", "", " \n"]


@pytest.mark.parametrize(
    ("format", "text"),
    [("llama3_json", "{n"), ("pythonic", "[1]"), ("pythonic", "[see b"), ("llama3_json", "<|python_tag|>p")],
)
def test_prose_after_an_opening_bracket_is_released_by_its_first_word(format: str, text: str) -> None:
    assert released(format, [text[:-1], text[-1:]]) == ["", text, ""]


@pytest.mark.parametrize("format", ["llama3_json", "pythonic"])
def test_without_marks_only_the_start_of_the_text_is_held(format: str) -> None:
    assert released(format, ["Hi", " {", "[f(", "<|python"]) == ["Hi", " {", "[f(", "<|python", ""]


# --- calls that are required ------------------------------------------------------------------------

CALLS = [("say", '{"a": "x\\"}]", "b": [{"c": "{"}]}'), ('odd "name"\\', "{}"), ("say", '{ "n":\n[1, [2]]}')]
LISTED = "[" + ", ".join(f"{call_begin(name)}{arguments}}}" for name, arguments in CALLS) + "]"


def read_list(pieces: Iterable[str]) -> list[tuple[str, str]]:
    reader = CallListReader()
    found: list[tuple[str, str]] = []
    for delta in (delta for piece in pieces for delta in reader.append(piece)):
        if delta.name is not None:
            found.append((delta.name, ""))
        found[-1] = (found[-1][0], found[-1][1] + delta.arguments)
    return found


def test_a_list_of_calls_is_read_wherever_it_is_cut() -> None:
    assert read_list([LISTED]) == read_list(LISTED) == CALLS
    for cut in range(1, len(LISTED)):
        assert read_list([LISTED[:cut], LISTED[cut:]]) == CALLS


def test_of_a_list_that_is_cut_off_what_there_is_of_each_call_is_read() -> None:
    for end in range(len(LISTED)):
        for (name, arguments), (whole_name, whole) in zip(read_list([LISTED[:end]]), CALLS, strict=False):
            assert name == whole_name and whole.startswith(arguments)


def test_arguments_are_released_as_they_come() -> None:
    reader = CallListReader()
    pieces = [f"[{call_begin('f')}", '{"a"', ': "xy', 'z"', "}", "}]"]
    assert [[delta.arguments for delta in reader.append(piece)] for piece in pieces] == [
        [""], ['{"a"'], [': "xy'], ['z"'], ["}"], []
    ]  # fmt: skip


# --- which format a model was taught ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ('{{- \'<tool_call>\\n{"name": "\' + call.name }}', "hermes"),
        ("<|start_header_id|> <tool_call> {'name': .., 'parameters': ..}", "hermes"),
        ("{{- '[TOOL_CALLS] [' }}", "mistral"),
        ("{{ message['content'] + '<｜tool▁calls▁begin｜>' }}", "deepseek_v3"),
        ("{{- '<|python_tag|>' + call.name + '.call(' }}", "llama3_json"),
        ("<|start_header_id|> {{- '\"parameters\": ' }}", "llama3_json"),
        ("<|header_start|> {{- '\"parameters\": ' }}", "llama3_json"),
        ("<|start_header_id|> Respond in the format [func_name1(params_name1=params_value1)]", "pythonic"),
        ("<tool_call>\n<function=example_function_name>", None),
        ("<tool_call>{function-name}\n<arg_key>", None),
        ("<|python_tag|> <function=name>", None),
        ("<|im_start|> {{- '\"parameters\": ' }}", None),
        ("<|start_header_id|>{{ message['content'] }}<|eot_id|>", None),
        ("<|channel|>commentary to=functions.name", None),
        ("", None),
        (None, None),
    ],
)
def test_the_chat_template_tells_the_format_or_nothing(template: str | None, format: str | None) -> None:
    assert detect_format(template) == format
