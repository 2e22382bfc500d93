"""One rank at work: mirrors the page tables, runs the model on its rows, samples what it owns.

It owns a rank's state between steps; it must not decide anything a plan decides, nor know how plans
reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.disaggregation.worker import TransferThread
from longspan.engine.rank.graphs import Recordings, of_one_kind, recordable
from longspan.engine.rank.page_store import PageStore
from longspan.engine.rank.sampling.grammar import Matcher, Vocabulary
from longspan.engine.rank.sampling.sampler import SampleRow, Sampling, score, start_sampling
from longspan.errors import EngineError, RequestError
from longspan.models.context import Model
from longspan.parallel.collectives import Collectives
from longspan.parallel.grid import Grid
from longspan.parallel.pipeline import Pipeline
from longspan.parallel.trace import STEP
from longspan.plan.mirror import Mirror
from longspan.plan.plan import StepPlan
from longspan.plan.reach import Place
from longspan.plan.result import StepResult
from longspan.plan.view import RankView, SampleRequest, ScoredRows, rank_view
from longspan.request import PromptScore

_SCORED_ROWS = 128
Finish = Callable[[], StepResult]


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
    model: Model
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
        self._debug = parts.debug
        self._device = parts.device
        self._vocabulary = parts.vocabulary
        self._runs_ahead = parts.runs_ahead
        self._sampled: dict[str, Tensor] = {}  # the last step's tokens, where the next may need them unread
        self._mirror = Mirror(parts.page_size, grid.num_shards)
        self._matchers: dict[str, Matcher] = {}  # of requests under a grammar
        self.recordings = parts.recordings
        self.transfer = parts.transfer
        self._store = parts.store

    @property
    def model(self) -> Model:
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

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step; returns what this rank is to hand over (others of its TP group: no tokens)."""
        return self.start(plan)()

    def start(self, plan: StepPlan) -> Finish:
        """Run one step up to its tokens, which the function returned waits for: a GPU may still be computing them."""
        with torch.inference_mode(), self._groups.context.traffic.trace.span(f"step {plan.step}", STEP):
            failed_saves, failed_loads = self._copy_pages(plan)
            finish = self._start(plan)
        if self.transfer is not None:
            self.transfer.computed(plan)
        if not failed_saves and not failed_loads:
            return finish
        return lambda: replace(finish(), failed_loads=failed_loads, failed_saves=failed_saves)

    def close(self) -> None:
        """End what runs beside its steps."""
        if self.transfer is not None:
            self.transfer.close()

    def _copy_pages(self, plan: StepPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Between the pool and other tiers; returns the saves that the disk did not take, and the loads that found no
        intact page."""
        if self._store is None:
            return (), ()
        return tuple(self._store.save(plan.saves)), tuple(self._store.load(plan.loads))

    def _start(self, plan: StepPlan) -> Finish:
        if self._debug:
            self._compare_digest(plan)
        self._apply(plan)
        if not plan.segments:
            return StepResult
        schedules = self._attention.schedules
        if self.recordings is not None and recordable(plan, schedules):
            return self._replay(of_one_kind(plan, schedules), self.recordings)
        view = rank_view(plan, self._mirror.requests, self._place, self._attention.windows, self._attention.moves)
        self._attention.begin(self._attention.preparer.step(view))
        hidden = self._model.layers(self._enter(view), self._integers(view.positions), self._attention)
        if self._model.head is None:
            self._groups.pipeline.send(hidden)
            return StepResult
        returns = self._grid.returns_tokens(self._rank)
        scores = [score for rows in view.scored for score in self._score(hidden, rows, self._model.head, returns)]
        if not view.samples:
            return self._finish(view, hidden, scores)
        logits = self._model.head(hidden[self._integers([wanted.row for wanted in view.samples])])
        return self._finish(view, logits, scores)

    def _replay(self, plan: StepPlan, recordings: Recordings) -> Finish:
        """A decode step through a recording, in which every row is sampled."""
        view = rank_view(plan, self._mirror.requests, self._place, self._attention.windows, self._attention.moves)
        rows = [sum(segment.pcp == pcp for segment in plan.segments) for pcp in range(self._grid.pcp)]
        logits = recordings.logits(view, rows, self._token_ids(view), self._integers(view.positions))
        return self._finish(view, logits, [])

    def _finish(self, view: RankView, logits: Tensor, scores: Sequence[PromptScore]) -> Finish:
        """Sample `logits` [samples, vocab]; on ranks that do not return tokens only if the next step may need them."""
        self._sampled.clear()
        returns = self._grid.returns_tokens(self._rank)
        if not view.samples or (not returns and not self._runs_ahead):
            return lambda: StepResult(prompt_scores=tuple(scores))
        errors, sampling = self._sample(logits, view.samples)
        return lambda: StepResult(tuple(sampling.finish()), tuple(scores), errors) if returns else StepResult()

    def _score(
        self, hidden: Tensor, rows: ScoredRows, head: Callable[[Tensor], Tensor], returns: bool
    ) -> Iterator[PromptScore]:
        """In blocks: logits of a long chunk are larger than the model. Every rank of the TP group takes part."""
        known = self._mirror.requests[rows.request_id]
        for first in range(0, rows.length, _SCORED_ROWS):
            count = min(_SCORED_ROWS, rows.length - first)
            position = rows.position + first
            logits = head(hidden[rows.row + first : rows.row + first + count])
            if returns:
                tokens = known.history[position : position + count]
                yield from score(logits, rows.request_id, position, tokens, known.params.prompt_logprobs or 0)

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

    def _sample(self, logits: Tensor, samples: tuple[SampleRequest, ...]) -> tuple[dict[str, str], Sampling]:
        """By request why it cannot go on, and the sampling of the others."""
        rows: list[SampleRow] = []
        kept: list[int] = []
        errors: dict[str, str] = {}
        for number, wanted in enumerate(samples):
            try:
                rows.append(self._row(wanted))
                kept.append(number)
            except RequestError as error:
                errors[wanted.request_id] = str(error)
        sampling = start_sampling(logits[kept] if errors else logits, rows)
        if self._runs_ahead:
            self._sampled.update(zip((row.request_id for row in rows), sampling.token_ids, strict=True))
        return errors, sampling

    def _row(self, wanted: SampleRequest) -> SampleRow:
        known, matcher = self._mirror.requests[wanted.request_id], self._matchers.get(wanted.request_id)
        output = known.output(wanted.position)
        return SampleRow(
            request_id=wanted.request_id,
            params=known.params,
            seed=known.seed,
            position=wanted.position,
            prompt_token_ids=known.history[: known.num_prompt],
            output_token_ids=output,
            allowed=matcher.allowed(output) if matcher else None,
        )

    def _apply(self, plan: StepPlan) -> None:
        self._mirror.apply(plan)
        for request_id in plan.finished:
            self._matchers.pop(request_id, None)
        for admission in plan.admitted:
            if admission.params.grammar is not None:
                self._matchers[admission.request_id] = self._vocabulary.matcher(admission.params.grammar)
        if self.transfer is not None:
            self.transfer.apply(plan, self._mirror.table)

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
