"""The requests of a load test: prompts, lengths and arrival times, random or from a file.

It owns files, random tokens and arrival times; it must not know how requests are sent.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import msgspec

from longspan.config import require, require_choice
from longspan.errors import ConfigError

DATASETS = ("random", "sharegpt", "gsm8k", "trace")
BLOCK_TOKENS = 512
_OUTPUT_LEN = 128
_ONLY_FOR = {
    "input_len": "random", "prefix_len": "random", "vary": "random",
    "speedup": "trace", "max_input_len": "trace",
}  # fmt: skip
# Common words. In nearly every vocabulary each is one token together with the space before it.
_WORDS = (
    "the of and to in is that for it as was with be by on not he but at are this have from or had an they which one "
    "you were her"
)
_SHAPES = {
    "sharegpt": '[{"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}, ...]',
    "gsm8k": 'a line each of {"question": text, "answer": text}',
    "trace": 'a line each of {"timestamp": ms, "input_length": tokens, "output_length": tokens, '
    f'"hash_ids": [an id for every {BLOCK_TOKENS} tokens of input]}}',
}


@dataclass(frozen=True)
class RequestLoad:
    """The options of a load. Lengths are in tokens.

    Raises `ConfigError`, also for an option that the dataset does not use.
    """

    # one of `DATASETS`
    dataset: str = "random"
    # file of the dataset; required by every dataset except `random`
    dataset_path: str | None = None
    # requests of one run
    num_prompts: int = 100
    # mean length of random prompts, without the prefix
    input_len: int = 1024
    # tokens to generate; None: 128, or those of each row in a trace
    output_len: int | None = None
    # random lengths are uniform within this fraction of their mean
    vary: float = 0.0
    # tokens of a prefix that all random prompts share
    prefix_len: int = 0
    # mean requests per second of a Poisson process; None: all at once
    request_rate: float | None = None
    # divides the arrival times of a trace
    speedup: float = 1.0
    # longer prompts of a trace are cut to this
    max_input_len: int | None = None
    # seed of tokens, lengths and arrival times
    seed: int = 0
    # random token ids are below this
    vocab_size: int = 30000
    # whether random prompts are sent as words, not as token ids
    text_prompts: bool = False

    def __post_init__(self) -> None:
        require_choice("dataset", self.dataset, DATASETS)
        for name in ("num_prompts", "input_len", "output_len", "max_input_len", "vocab_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1", "give 1 or more")
        require(self.prefix_len >= 0, "prefix_len", self.prefix_len, "must not be negative", "give 0 or more")
        require(0 <= self.vary < 1, "vary", self.vary, "is not a fraction", "give 0 or more and less than 1")
        for name in ("request_rate", "speedup"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be more than 0", "give a positive number")
        for field in fields(self):
            owner, value = _ONLY_FOR.get(field.name, self.dataset), getattr(self, field.name)
            useful = owner == self.dataset or value == field.default
            require(useful, field.name, value, f"has no use with dataset={self.dataset}", f"use it with {owner}")
        own_times = self.dataset == "trace" and self.request_rate is not None
        require(not own_times, "request_rate", self.request_rate, "a trace has its own times", "use speedup")
        path, random_load = self.dataset_path, self.dataset == "random"
        require(random_load or path is not None, "dataset_path", path, "is missing", f"name a {self.dataset} file")
        require(not random_load or path is None, "dataset_path", path, "has no use with dataset=random", "drop it")


@dataclass(frozen=True)
class LoadRequest:
    """One request of a load."""

    # seconds from the start of the run
    arrival_s: float
    # text or token ids
    prompt: str | list[int]
    # tokens to generate
    max_tokens: int


class Dataset(Protocol):
    """The requests of several runs.

    Runs have the same lengths and arrival times. As far as a file permits they have different prompts, so that no run
    finds prefixes of an earlier run in the server's cache.
    """

    def requests(self, run: int) -> Iterator[LoadRequest]:
        """The requests of one run, in order of arrival."""

    def notes(self, runs: int) -> list[str]:
        """Notes on the prompts, for the reader of the results."""


class _Turn(msgspec.Struct):
    speaker: str = msgspec.field(name="from")
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Turn]


class _Problem(msgspec.Struct):
    question: str


class _TraceRow(msgspec.Struct):
    # milliseconds
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    # tokens of the prompt
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    # tokens to generate
    output_length: Annotated[int, msgspec.Meta(ge=1)]
    # one for each `BLOCK_TOKENS` tokens of the prompt; equal ids stand for equal tokens
    hash_ids: list[int]


_T = TypeVar("_T")


def open_dataset(load: RequestLoad) -> Dataset:
    """The dataset of a load; reads its file if it has one.

    Raises `ConfigError`, which names file, line, field and what was expected.
    """
    if load.dataset_path is None:
        return RandomPrompts(load)
    path = Path(load.dataset_path)
    try:
        if load.dataset == "trace":
            return TracePrompts(load, read_trace(path, load.num_prompts))
        texts = _read_sharegpt(path) if load.dataset == "sharegpt" else _read_gsm8k(path)
    except OSError as error:
        raise ConfigError("dataset_path", path, f"cannot be read ({error})", "name a file") from error
    require(bool(texts), "dataset_path", path, "holds no prompt", f"it must be {_SHAPES[load.dataset]}")
    return TextPrompts(load, texts)


def poisson_arrivals(count: int, rate: float | None, seed: int) -> list[float]:
    """Arrival times of `count` requests in seconds after the first, a Poisson process of `rate` requests per second.

    With `rate` None all requests arrive at once.
    """
    if rate is None:
        return [0.0] * count
    generator = random.Random(f"{seed}/arrivals")
    return list(accumulate((generator.expovariate(rate) for _ in range(count - 1)), initial=0.0))


def trace_arrivals(timestamps_ms: Sequence[float], speedup: float) -> list[float]:
    """Arrival times in seconds after the earliest timestamp, divided by `speedup`."""
    first = min(timestamps_ms)
    return [(timestamp - first) / 1000 / speedup for timestamp in timestamps_ms]


class TokenCounts:
    """Random tokens, drawn by a key. Equal keys give equal tokens, in every process."""

    def __init__(self, load: RequestLoad) -> None:
        self._seed = load.seed
        self._words = _WORDS.split() if load.text_prompts else None
        self._ids = list(range(load.vocab_size if self._words is None else len(self._words)))

    def draw(self, key: str, count: int) -> list[int]:
        """The first `count` tokens of a key."""
        return random.Random(f"{self._seed}/{key}").choices(self._ids, k=count)

    def prompt(self, ids: list[int]) -> str | list[int]:
        """The prompt for the tokens: their ids, or a word for each."""
        return ids if self._words is None else " ".join(self._words[number] for number in ids)


class RandomPrompts:
    """Random prompts. All prompts of a run share a prefix."""

    def __init__(self, load: RequestLoad) -> None:
        self._load, self._tokens = load, TokenCounts(load)

    def requests(self, run: int) -> Iterator[LoadRequest]:
        """See `Dataset.requests`. Lengths of prompts and outputs are uniform within ±`vary` of their means."""
        load, tokens = self._load, self._tokens
        lengths = random.Random(f"{load.seed}/lengths")

        def around(mean: int) -> int:
            return max(1, round(mean * lengths.uniform(1 - load.vary, 1 + load.vary)))

        prefix = tokens.draw(f"{run}/prefix", load.prefix_len)
        for number, arrival in enumerate(poisson_arrivals(load.num_prompts, load.request_rate, load.seed)):
            ids = prefix + tokens.draw(f"{run}/{number}", around(load.input_len))
            yield LoadRequest(arrival, tokens.prompt(ids), around(load.output_len or _OUTPUT_LEN))

    def notes(self, runs: int) -> list[str]:
        """See `Dataset.notes`."""
        return []


class TextPrompts:
    """Texts of a file in random order. Each run continues where the previous one ended."""

    def __init__(self, load: RequestLoad, texts: Sequence[str]) -> None:
        self._load = load
        self._texts = random.Random(load.seed).sample(texts, len(texts))

    def requests(self, run: int) -> Iterator[LoadRequest]:
        """See `Dataset.requests`. After the last text of the file the first one follows."""
        load = self._load
        for number, arrival in enumerate(poisson_arrivals(load.num_prompts, load.request_rate, load.seed)):
            text = self._texts[(run * load.num_prompts + number) % len(self._texts)]
            yield LoadRequest(arrival, text, load.output_len or _OUTPUT_LEN)

    def notes(self, runs: int) -> list[str]:
        """See `Dataset.notes`: whether prompts repeat."""
        if runs * self._load.num_prompts <= len(self._texts):
            return []
        return [f"the file's {len(self._texts)} prompts repeat, so a prefix cache may help more than in life"]


class TracePrompts:
    """A recorded trace, at its own times. Equal hash ids stand for equal tokens."""

    def __init__(self, load: RequestLoad, rows: Sequence[_TraceRow]) -> None:
        self._load, self._tokens = load, TokenCounts(load)
        self._rows = sorted(rows, key=lambda row: row.timestamp)

    def requests(self, run: int) -> Iterator[LoadRequest]:
        """See `Dataset.requests`. Prompts longer than `max_input_len` are cut to it."""
        load, tokens = self._load, self._tokens
        arrivals = trace_arrivals([row.timestamp for row in self._rows], load.speedup)
        for row, arrival in zip(self._rows, arrivals, strict=True):
            length = min(row.input_length, load.max_input_len or row.input_length)
            blocks = row.hash_ids[: -(-length // BLOCK_TOKENS)]
            ids = [token for block in blocks for token in tokens.draw(f"{run}/{block}", BLOCK_TOKENS)]
            yield LoadRequest(arrival, tokens.prompt(ids[:length]), load.output_len or row.output_length)

    def notes(self, runs: int) -> list[str]:
        """See `Dataset.notes`: how many prompts are cut, and whether the trace has fewer requests than asked for."""
        notes, asked, limit = [], self._load.num_prompts, self._load.max_input_len
        if len(self._rows) < asked:
            notes.append(f"the trace has {len(self._rows)} requests, {asked} were asked for")
        if limit is not None:
            cut = sum(row.input_length > limit for row in self._rows)
            notes.append(f"{cut} of {len(self._rows)} prompts cut to {limit} tokens")
        return notes


def _read_sharegpt(path: Path) -> list[str]:
    """The first human turn of each conversation; conversations without one are left out."""
    entries = _decode(path.read_bytes(), list[msgspec.Raw], str(path), "sharegpt")
    texts = []
    for number, entry in enumerate(entries, 1):
        turns = _decode(entry, _Conversation, f"{path}, entry {number}", "sharegpt").conversations
        texts += [turn.value for turn in turns if turn.speaker in ("human", "user")][:1]
    return texts


def _read_gsm8k(path: Path) -> list[str]:
    return [row.question for _, row in _json_lines(path, _Problem, "gsm8k")]


def read_trace(path: Path, most: int) -> list[_TraceRow]:
    rows = []
    for (where, row), _ in zip(_json_lines(path, _TraceRow, "trace"), range(most), strict=False):
        needed = -(-row.input_length // BLOCK_TOKENS)
        if len(row.hash_ids) < needed:
            problem = f"Expected {needed} ids for input_length={row.input_length}, got {len(row.hash_ids)}"
            raise ConfigError("dataset_path", where, f"{problem} - at `$.hash_ids`", f"expected {_SHAPES['trace']}")
        rows.append(row)
    require(bool(rows), "dataset_path", path, "holds no request", f"it must be {_SHAPES['trace']}")
    return rows


def _json_lines(path: Path, kind: type[_T], shape: str) -> Iterator[tuple[str, _T]]:
    """The place (for errors) and the content of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _decode(line, kind, where, shape)


def _decode(data: bytes | msgspec.Raw, kind: type[_T], where: str, shape: str) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError("dataset_path", where, str(error), f"expected {_SHAPES[shape]}") from error
