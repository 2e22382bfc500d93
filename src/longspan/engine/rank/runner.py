"""One rank at work: mirrors the page tables, runs the model on its rows, samples what it owns.

It owns a rank's state between steps; it must not decide anything a plan decides, nor know how plans
reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.cache.pages import PageTable
from longspan.disaggregation.worker import TransferThread
from longspan.engine.rank.graphs import Recordings, of_one_kind, recordable
from longspan.engine.rank.page_store import PageStore
from longspan.engine.rank.sampling.grammar import Matcher, Vocabulary
from longspan.engine.rank.sampling.sampler import SampleRow, Sampling, score, start_sampling
from longspan.errors import EngineError, RequestError
from longspan.models.decoder import DecoderModel
from longspan.parallel.collectives import Collectives
from longspan.parallel.grid import Grid
from longspan.parallel.pipeline import Pipeline
from longspan.parallel.trace import STEP
from longspan.plan.plan import LOST, Admission, Segment, StepPlan
from longspan.plan.reach import Place
from longspan.plan.view import RankView, SampleRequest, ScoredRows, rank_view
from longspan.request import SampledToken, SamplingParams

_SCORED_ROWS = 128
Finish = Callable[[], list[SampledToken]]


@dataclass
class _Mirror:
    """What a rank remembers of a request; `history` only if its sampling parameters need it."""

    params: SamplingParams
    seed: int
    num_prompt: int
    table: PageTable
    matcher: Matcher | None = None
    history: list[int] = field(default_factory=list)

    def output(self, count: int) -> list[int]:
        """The first `count` tokens it has generated, if they are remembered."""
        return self.history[self.num_prompt : self.num_prompt + count]

    def remember(self, segment: Segment) -> None:
        """Take a segment's tokens, in place of drafts that proved wrong."""
        if self.history and (segment.stop > len(self.history) or not segment.prefill):
            self.history[segment.start :] = segment.token_ids


@dataclass(frozen=True)
class Groups:
    """A rank's groups: the TP group splits heads, the context group pages, the pipeline layers."""

    tp: Collectives
    context: Collectives
    pipeline: Pipeline


@dataclass(frozen=True)
class RankParts:
    """What a rank is made of; `build.py` puts it together."""

    grid: Grid
    rank: int
    model: DecoderModel
    attention: Attention
    groups: Groups
    device: torch.device
    vocabulary: Vocabulary
    # tokens of a page
    page_size: int
    # whether ranks compare the digests of their plans
    debug: bool
    # whether a step may begin before the last one's tokens are read
    runs_ahead: bool
    # of decode steps; None where none is recorded
    recordings: Recordings | None = None
    # pages outside the device, if any are kept there
    store: PageStore | None = None
    # pages on their way from or to other instances, if this one has a role
    transfer: TransferThread | None = None


class Runner:
    """Carries out plans on one rank, in order."""

    def __init__(self, parts: RankParts) -> None:
        grid, rank = parts.grid, parts.rank
        self._grid = grid
        self._rank = rank
        self._place = Place(grid.ranks[rank].pcp, grid.ranks[rank].shard, grid.shards_of_pcp)
        self._model = parts.model
        self._attention = parts.attention
        self._groups = parts.groups
        self._page_size = parts.page_size
        self._debug = parts.debug
        self._device = parts.device
        self._vocabulary = parts.vocabulary
        self._runs_ahead = parts.runs_ahead
        self._sampled: dict[int, Tensor] = {}  # the last step's tokens, where the next may need them unread
        self._mirrors: dict[int, _Mirror] = {}
        self.recordings = parts.recordings
        self.transfer = parts.transfer
        self._store = parts.store

    @property
    def model(self) -> DecoderModel:
        """This rank's part of the model."""
        return self._model

    @property
    def attention(self) -> Attention:
        """This rank's attention."""
        return self._attention

    @property
    def is_asynchronous(self) -> bool:
        """Whether `start` returns before its step is computed."""
        return self._device.type == "cuda"

    def step(self, plan: StepPlan) -> list[SampledToken]:
        """Run one step; returns the tokens this rank is to hand over (others of its TP group: none)."""
        return self.start(plan)()

    def start(self, plan: StepPlan) -> Finish:
        """Run one step up to its tokens, which the function returned waits for: a GPU may still be computing them."""
        with torch.inference_mode(), self._groups.context.traffic.trace.span(f"step {plan.step}", STEP):
            lost = self._copy_pages(plan)
            finish = self._start(plan)
        if self.transfer is not None:
            self.transfer.computed(plan)
        return (lambda: [*lost, *finish()]) if lost else finish

    def close(self) -> None:
        """End what runs beside its steps."""
        if self.transfer is not None:
            self.transfer.close()

    def _copy_pages(self, plan: StepPlan) -> list[SampledToken]:
        """Between the pool and other tiers; returns the loads that found no intact page."""
        if self._store is None:
            return []
        self._store.save(plan.saves)
        return [SampledToken(LOST, number) for number in self._store.load(plan.loads)]

    def _start(self, plan: StepPlan) -> Finish:
        if self._debug:
            self._compare_digest(plan)
        self._apply(plan)
        if not plan.segments:
            return list
        if self.recordings is not None and recordable(plan):
            return self._replay(of_one_kind(plan), self.recordings)
        view = rank_view(plan, self._mirrors, self._place, self._attention.windows, self._attention.moves)
        self._attention.begin(view)
        hidden = self._model.layers(self._enter(view), self._integers(view.positions), self._attention)
        if self._model.head is None:
            self._groups.pipeline.send(hidden)
            return list
        returns = self._grid.returns_tokens(self._rank)
        scored = [token for rows in view.scored for token in self._score(hidden, rows, self._model.head, returns)]
        if not view.samples:
            return self._finish(view, hidden, scored)
        logits = self._model.head(hidden[self._integers([wanted.row for wanted in view.samples])])
        return self._finish(view, logits, scored)

    def _replay(self, plan: StepPlan, recordings: Recordings) -> Finish:
        """A decode step through a recording, in which every row is sampled."""
        view = rank_view(plan, self._mirrors, self._place, self._attention.windows, self._attention.moves)
        rows = [sum(segment.pcp == pcp for segment in plan.segments) for pcp in range(self._grid.pcp)]
        logits = recordings.logits(view, rows, self._token_ids(view), self._integers(view.positions))
        return self._finish(view, logits, [])

    def _finish(self, view: RankView, logits: Tensor, scored: list[SampledToken]) -> Finish:
        """Sample `logits` [samples, vocab]; on ranks that do not return tokens only if the next step may need them."""
        self._sampled.clear()
        returns = self._grid.returns_tokens(self._rank)
        if not view.samples or (not returns and not self._runs_ahead):
            return lambda: scored
        failed, sampling = self._sample(logits, view.samples)
        return lambda: [*scored, *failed, *sampling.finish()] if returns else []

    def _score(
        self, hidden: Tensor, rows: ScoredRows, head: Callable[[Tensor], Tensor], returns: bool
    ) -> Iterator[SampledToken]:
        """In blocks: logits of a long chunk are larger than the model. Every rank of the TP group takes part."""
        mirror = self._mirrors[rows.request_id]
        for first in range(0, rows.length, _SCORED_ROWS):
            count = min(_SCORED_ROWS, rows.length - first)
            position = rows.position + first
            logits = head(hidden[rows.row + first : rows.row + first + count])
            if returns:
                tokens = mirror.history[position : position + count]
                yield from score(logits, rows.request_id, position, tokens, mirror.params.prompt_logprobs or 0)

    def _enter(self, view: RankView) -> Tensor:
        """Hidden states [T, hidden] before this stage's layers."""
        if self._model.embedding is not None:
            return self._model.embedding(self._token_ids(view))
        shape = (len(view.token_ids), self._model.hidden_size)
        return self._groups.pipeline.receive(shape, self._model.dtype)

    def _token_ids(self, view: RankView) -> Tensor:
        """int64 [T]; tokens that nobody else knows yet are taken from where this rank sampled them."""
        known = self._integers(view.token_ids)
        if view.pending:
            rows, requests = zip(*view.pending, strict=True)
            known[self._integers(rows)] = torch.stack([self._sampled[request] for request in requests])
        return known

    def _integers(self, values: Sequence[int]) -> Tensor:
        found = torch.tensor(values, dtype=torch.int64)
        if self._device.type == "cpu":
            return found
        return found.pin_memory().to(self._device, non_blocking=True)  # does not wait for the step under way

    def _sample(self, logits: Tensor, samples: tuple[SampleRequest, ...]) -> tuple[list[SampledToken], Sampling]:
        """Requests that cannot go on, and the sampling of the others."""
        rows: list[SampleRow] = []
        kept: list[int] = []
        failed: list[SampledToken] = []
        for number, wanted in enumerate(samples):
            try:
                rows.append(self._row(wanted))
                kept.append(number)
            except RequestError as error:
                failed.append(SampledToken(wanted.request_id, 0, position=wanted.position, error=str(error)))
        sampling = start_sampling(logits[kept] if failed else logits, rows)
        if self._runs_ahead:
            self._sampled.update(zip((row.request_id for row in rows), sampling.token_ids, strict=True))
        return failed, sampling

    def _row(self, wanted: SampleRequest) -> SampleRow:
        mirror = self._mirrors[wanted.request_id]
        output = mirror.output(wanted.position)
        return SampleRow(
            request_id=wanted.request_id,
            params=mirror.params,
            seed=mirror.seed,
            position=wanted.position,
            prompt_token_ids=mirror.history[: mirror.num_prompt],
            output_token_ids=output,
            allowed=mirror.matcher.allowed(output) if mirror.matcher else None,
        )

    def _apply(self, plan: StepPlan) -> None:
        for request_id in plan.finished:
            del self._mirrors[request_id]
        for admission in plan.admitted:
            self._mirrors[admission.request_id] = self._mirror(admission)
        for new in plan.new_pages:
            self._mirrors[new.request_id].table.extend(new.pages)
        for segment in plan.segments:
            self._mirrors[segment.request_id].remember(segment)
        if self.transfer is not None:
            self.transfer.apply(plan, lambda request_id: self._mirrors[request_id].table)

    def _mirror(self, admission: Admission) -> _Mirror:
        table = PageTable(self._page_size, self._grid.num_shards)
        table.extend(admission.pages)
        grammar = admission.params.grammar
        matcher = None if grammar is None else self._vocabulary.matcher(grammar)
        return _Mirror(admission.params, admission.seed, admission.num_prompt, table, matcher, list(admission.history))

    def _compare_digest(self, plan: StepPlan) -> None:
        """Debug: every rank of all groups must be about to take the same branches."""
        mine = torch.frombuffer(bytearray(plan.digest()), dtype=torch.uint8).to(self._device)
        for group in (self._groups.tp, self._groups.context):
            for member, digest in enumerate(group.all_gather(mine, [len(mine)] * group.size, "debug")):
                if not torch.equal(digest, mine):
                    raise EngineError(
                        f"step {plan.step}: member {member} of rank {self._rank}'s group has another plan"
                    )
        if not self._groups.pipeline.agrees(mine):
            raise EngineError(f"step {plan.step}: the stage before rank {self._rank} has another plan")
