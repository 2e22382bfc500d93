"""What a request's parameters do to its logits: bias, penalties, and tokens that may not be sampled.

It owns these rules for a batch of rows, and the counts of earlier tokens on the device, which penalties read. Nothing
is read from the device. A row's logits do not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.host_copy import to_device
from longspan.engine.rank.sampling.rows import LateRows, SampleRow, SampleRows, every_token, unpacked
from longspan.engine.rank.sampling.transfer import OneCopy
from longspan.errors import EngineError
from longspan.plan.mirror import UNKNOWN

_LARGEST = 1e38
_ROWS_AT_ONCE = 64  # bounds the memory of what is computed on the way
_IN_PROMPT = 1 << 30  # set in the count of a token that is in the prompt; the rest counts it in the output


class PenaltyCounts:
    """How often each token is in the outputs of requests with penalties, and whether it is in their prompts.

    A table on the device, int32 [requests, vocab], whose first row stays 0, for rows without penalties. A request gets
    a row when it is first sampled. Later only the tokens that it got since are added: those sampled here without the
    host's help. With `drafts_are_late` that is all of them, by `accept` after each step; else not those behind drafts.
    """

    def __init__(self, drafts_are_late: bool = False) -> None:
        self.drafts_are_late = drafts_are_late
        self._table: Tensor | None = None
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        # tokens of the output that are in the table; None: all that were right, of which the device knows the number
        self._counted: dict[str, int | None] = {}

    @property
    def is_used(self) -> bool:
        """Whether any request has a row."""
        return bool(self._rows)

    def forget(self, request_id: str) -> None:
        """Give the row of a request that has ended to the next one."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._free.append(row)
            del self._counted[request_id]

    def number(self, row: SampleRow) -> int:
        """The table's row for a row of logits."""
        return self._rows[row.request_id] if row.params.penalises else 0

    def lacks(self, row: SampleRow, like: Tensor) -> Sequence[int]:
        """The tokens that the request got since it was last counted, which are counted from now on.

        Drafts are not among them. `like` are logits [R, vocab] on the table's device.
        """
        stop = row.position - row.drafts
        first = self._counted.get(row.request_id, 0)
        if first is None:
            first = stop
        if first > stop:
            self.forget(row.request_id)  # tokens that were sampled have been taken back
        if row.request_id not in self._rows:
            self._begin(row, like)
            first = 0
        found = row.output(first, stop)
        if len(found) != stop - first or UNKNOWN in found:
            raise EngineError(
                f"request {row.request_id}: output tokens {first}..{stop} are neither counted nor known, and its "
                "penalties need them; do not plan it ahead"
            )
        self._counted[row.request_id] = stop
        return found

    def add(self, numbers: Tensor, token_ids: Tensor) -> None:
        """Count tokens, int64 [K], in the table's rows `numbers`, int64 [K]."""
        if self._table is not None:
            _count(self._table, numbers, token_ids)

    def sampled(self, row: SampleRow) -> None:
        """The token that is sampled for `row`, which has no drafts, has been added."""
        self._counted[row.request_id] = row.position + 1

    def accept(self, rows: SampleRows, token_ids: Tensor, accepted: Tensor) -> None:
        """Count the tokens that are sampled behind right drafts only; see `Sampler.accept`."""
        found: list[tuple[int, int, int, int]] = []
        column, names = -1, rows.names
        for number, name in enumerate(names):
            column += number == 0 or names[number - 1] != name
            row = rows.special.get(number)
            if row is not None and row.params.penalises:
                found.append((self._rows[name], number, row.drafts, column))
                self._counted[name] = None
        if not found or self._table is None:
            return
        upload = OneCopy()
        for values in zip(*found, strict=True):
            upload.integers(values)
        in_table, indices, drafts, columns = upload.send(token_ids.device)
        _count(self._table, in_table, token_ids[indices], (drafts <= accepted[columns]).to(self._table.dtype))

    def of(self, numbers: Tensor, drafts: tuple[Tensor, Tensor] | None) -> Tensor:
        """A copy of the table's rows `numbers`, int64 [C]: int32 [C, vocab].

        `drafts` are (row of the copy, token), both int64 [K], of tokens that are counted in the copy only.
        """
        if self._table is None:
            raise EngineError("no request has penalties")
        found = self._table.index_select(0, numbers)
        if drafts is not None:
            _count(found, *drafts)
        return found

    def of_one(self, number: int, drafts: Tensor | None) -> Tensor:
        """One row of the table, int32 [vocab]; with `drafts`, int64 [K], in a copy."""
        if self._table is None:
            raise EngineError("no request has penalties")
        if drafts is None:
            return self._table[number]
        return self._table[number].index_add(0, drafts, torch.ones_like(drafts, dtype=torch.int32))

    def _begin(self, row: SampleRow, like: Tensor) -> None:
        """Give a request a row in which its prompt is marked."""
        if not self._free:
            self._grow(like)
        number = self._free.pop()
        self._rows[row.request_id], self._counted[row.request_id] = number, 0
        if self._table is not None:
            self._table[number].zero_()
            upload = OneCopy()
            upload.integers(row.prompt)
            self._table[number].index_fill_(0, upload.send(like.device)[0], _IN_PROMPT)

    def _grow(self, like: Tensor) -> None:
        """Double the table."""
        before = 1 if self._table is None else len(self._table)
        grown = torch.zeros((2 * before, like.shape[1]), dtype=torch.int32, device=like.device)
        if self._table is not None:
            grown[:before] = self._table
        self._table = grown
        self._free.extend(range(2 * before - 1, before - 1, -1))


def _count(table: Tensor, numbers: Tensor, token_ids: Tensor, times: Tensor | None = None) -> None:
    places = numbers * table.shape[1] + token_ids
    table.view(-1).index_add_(0, places, torch.ones_like(places, dtype=table.dtype) if times is None else times)


def _penalised(logits: Tensor, counts: Tensor, frequency: Tensor, presence: Tensor, repetition: Tensor) -> Tensor:
    """Logits fp32 with penalties, given the counts of their tokens, int32 of the same shape, and rates that fit it."""
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    output = counts & (_IN_PROMPT - 1)
    return torch.where(counts != 0, scaled, logits).sub_(frequency * output + presence * (output > 0))


@dataclass(frozen=True)
class LogitChanges:
    """The changes of one batch, of which the host's part is done: `apply` them once the upload is sent.

    Numbers in the fields are those of tensors in the upload.
    """

    # indices of the C rows that change; None if all do
    indices: int | None
    # places in the chosen rows, and what is added to their logits
    bias: tuple[int, int] | None
    # the penalties of the chosen rows; None if none has any
    penalties: _Penalties | None
    # packed masks of the chosen rows, uint8 [C, ceil(vocab / 8)]; None if all tokens are allowed
    allowed: Tensor | None
    # places in the chosen rows that may not be sampled
    banned: int | None

    @staticmethod
    def of(
        rows: SampleRows, chosen: Sequence[int], counts: PenaltyCounts, logits: Tensor, upload: OneCopy,
        late: LateRows | None = None,
    ) -> LogitChanges:  # fmt: skip
        """The changes of the rows `chosen` to `logits` [R, vocab]."""
        changed, vocabulary = [rows[i] for i in chosen], logits.shape[1]
        bias = [(at * vocabulary + i, x) for at, row in enumerate(changed) for i, x in row.params.logit_bias]
        banned = [at * vocabulary + token for at, row in enumerate(changed) for token in row.banned]
        penalises = any(row.params.penalises for row in changed)
        return LogitChanges(
            upload.integers(chosen) if len(chosen) < len(rows) else None,
            (upload.integers(i for i, _ in bias), upload.floats(x for _, x in bias)) if bias else None,
            _Penalties.of(rows, chosen, counts, logits, upload, late) if penalises else None,
            _masks(changed, vocabulary),
            upload.integers(banned) if banned else None,
        )

    def apply(self, logits: Tensor, counts: PenaltyCounts, sent: Sequence[Tensor]) -> Tensor:
        """The C rows of `logits` [R, vocab] with their changes, fp32; tokens that must not be sampled have -inf.

        Penalties are vLLM's, which follow OpenAI and CTRL. The repetition penalty divides the positive and multiplies
        the negative logits of each distinct token in prompt and output. The frequency penalty is subtracted for each
        occurrence in the output, the presence penalty once for each distinct token of the output.
        """
        chosen = logits.clone() if self.indices is None else logits.index_select(0, sent[self.indices])
        result = chosen.float()
        if self.bias is not None:
            places, values = (sent[number] for number in self.bias)
            result.view(-1).index_add_(0, places, values.view(torch.float64).float())
        if self.penalties is not None:
            result = self.penalties.apply(result, counts, sent)
        result.clamp_(-_LARGEST, _LARGEST)  # a tiny repetition penalty gives infinities, whose differences are NaN
        if self.allowed is not None:
            allowed = unpacked(to_device(self.allowed, logits.device), logits.shape[1])
            result.masked_fill_(~allowed, float("-inf"))
        if self.banned is not None:
            result.view(-1).index_fill_(0, sent[self.banned], float("-inf"))
        return result

    def put(self, changed: Tensor, logits: Tensor, sent: Sequence[Tensor]) -> Tensor:
        """All rows fp32 [R, vocab]: those of `logits`, and in their places the C of `changed`."""
        return changed if self.indices is None else logits.float().index_copy(0, sent[self.indices], changed)

    def sampled(self, token_ids: Tensor, counts: PenaltyCounts, sent: Sequence[Tensor]) -> None:
        """Count the sampled tokens, int64 [R], of rows with penalties."""
        if self.penalties is not None:
            self.penalties.sampled(token_ids, counts, sent)


@dataclass(frozen=True)
class _Penalties:
    """The penalties of the C rows that change."""

    # the table's rows
    numbers: int
    # frequency, presence and repetition penalties
    rates: tuple[int, int, int]
    # rows of the table, and tokens that are counted in them first
    lacking: tuple[int, int] | None
    # rows among the C, and drafts that are counted for them only: tokens, or their places in `row_tokens`
    drafts: tuple[int, int] | None
    # tokens that rows were computed from, where only the device knows them, int64
    row_tokens: Tensor | None
    # rows whose sampled tokens are counted
    counted: tuple[SampleRow, ...]
    # their rows of the table, and their indices in the batch
    then: tuple[int, int] | None

    @staticmethod
    def of(
        rows: SampleRows, chosen: Sequence[int], counts: PenaltyCounts, logits: Tensor, upload: OneCopy,
        late: LateRows | None,
    ) -> _Penalties:  # fmt: skip
        lacking: list[tuple[int, int]] = []
        drafts: list[tuple[int, int]] = []
        for at, i in enumerate(chosen):
            row = rows[i]
            if row.params.penalises:
                found = counts.lacks(row, logits)
                lacking += [(counts.number(row), token) for token in found]
                told = row.output(row.position - row.drafts, row.position)
                places = range(i - row.drafts + 1, i + 1)  # where there are late rows, those of a request are adjacent
                drafts += [
                    (at, token) for token in (told if late is None else [late.first + place for place in places])
                ]
        params = [rows[i].params for i in chosen]
        known = [] if counts.drafts_are_late else chosen
        certain = [i for i in known if rows[i].params.penalises and not rows[i].drafts]
        return _Penalties(
            upload.integers(counts.number(rows[i]) for i in chosen),
            (
                upload.floats(one.frequency_penalty for one in params),
                upload.floats(one.presence_penalty for one in params),
                upload.floats(one.repetition_penalty for one in params),
            ),
            _pairs(lacking, upload),
            _pairs(drafts, upload),
            None if late is None else late.token_ids,
            tuple(rows[i] for i in certain),
            _pairs([(counts.number(rows[i]), i) for i in certain], upload),
        )

    def apply(self, logits: Tensor, counts: PenaltyCounts, sent: Sequence[Tensor]) -> Tensor:
        if self.lacking is not None:
            counts.add(*(sent[number] for number in self.lacking))
        rates = tuple(sent[number].view(torch.float64).float()[:, None] for number in self.rates)
        drafts = None if self.drafts is None else (sent[self.drafts[0]], sent[self.drafts[1]])
        if drafts is not None and self.row_tokens is not None:
            drafts = drafts[0], self.row_tokens[drafts[1]]
        if logits.device.type == "cpu":  # row by row, only the few tokens that the row has seen
            for at, number in enumerate(sent[self.numbers].tolist()):
                of_row = None if drafts is None else drafts[1][drafts[0] == at]
                found = counts.of_one(number, of_row)
                seen = found.nonzero()[:, 0]
                logits[at, seen] = _penalised(logits[at, seen], found[seen], *(rate[at] for rate in rates))
            return logits
        found = counts.of(sent[self.numbers], drafts)
        for first in range(0, len(logits), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            logits[part] = _penalised(logits[part], found[part], *(rate[part] for rate in rates))
        return logits

    def sampled(self, token_ids: Tensor, counts: PenaltyCounts, sent: Sequence[Tensor]) -> None:
        if self.then is not None:
            numbers, indices = (sent[number] for number in self.then)
            counts.add(numbers, token_ids.index_select(0, indices))
        for row in self.counted:
            counts.sampled(row)


def _pairs(pairs: Sequence[tuple[int, int]], upload: OneCopy) -> tuple[int, int] | None:
    if not pairs:
        return None
    return upload.integers(first for first, _ in pairs), upload.integers(second for _, second in pairs)


def _masks(rows: Sequence[SampleRow], vocabulary: int) -> Tensor | None:
    """The sets of tokens that rows allow, uint8 [C, ceil(vocab / 8)]; None if all allow all."""
    if all(row.allowed is None for row in rows):
        return None
    everything = every_token(vocabulary)
    sets = bytearray().join(everything if row.allowed is None else row.allowed for row in rows)
    return torch.frombuffer(sets, dtype=torch.uint8).view(len(rows), -1)
