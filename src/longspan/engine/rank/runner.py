"""Run plans on one rank: mirror the page tables, run the model on the rank's rows, sample.

It owns a rank's state between steps; it must not decide anything that a plan decides, nor know how plans arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.host_copy import integers
from longspan.disaggregation.worker import TransferThread
from longspan.engine.rank.drafting import Drafter, ReadDrafts, SampledStep
from longspan.engine.rank.graphs import GraphRunner, recordable, travelling, uniform
from longspan.engine.rank.last_tokens import LastTokens
from longspan.engine.rank.page_store import PageStore
from longspan.engine.rank.sampling.constraints import Constraint
from longspan.engine.rank.sampling.grammar import Vocabulary
from longspan.engine.rank.sampling.logprobs import start_scoring
from longspan.engine.rank.sampling.recorded import Draw, RecordedDraw
from longspan.engine.rank.sampling.rows import LateRows, SampleRow, SampleRows
from longspan.engine.rank.sampling.sampler import Sampler, Sampling
from longspan.engine.rank.settled_rows import SettledStep
from longspan.engine.rank.short_steps import ShortStep
from longspan.errors import EngineError, RequestError
from longspan.models.context import Model
from longspan.parallel.collectives import Collectives
from longspan.parallel.experts import GatheredExperts
from longspan.parallel.grid import Grid
from longspan.parallel.pipeline import Pipeline
from longspan.parallel.trace import STEP
from longspan.plan.decode import DecodeSamples, decode_view
from longspan.plan.mirror import Mirror
from longspan.plan.plan import StepPlan, rows_of_pcp
from longspan.plan.reach import Place
from longspan.plan.result import StepResult
from longspan.plan.view import RankView, SampleRequest, ScoredRows, rank_view
from longspan.request import PromptScore, SamplingParams

_SCORED_ROWS = 128
Finish = Callable[[], StepResult]
Scores = Callable[[], list[PromptScore]]
_GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class Groups:
    """The groups of ranks that one rank belongs to."""

    # the TP group, which splits heads
    tp: Collectives
    # the context group, which splits the pages of a context
    context: Collectives
    # the stages, which split layers
    pipeline: Pipeline


@dataclass(frozen=True)
class RankParts:
    """The parts of a rank, as `build.py` makes them."""

    # coordinates of all ranks
    grid: Grid
    # this rank's number
    rank: int
    # this rank's stage and head shard of the model
    model: Model
    # attention with this rank's KV pool
    attention: Attention
    # groups of ranks that this rank belongs to
    groups: Groups
    # where the rank's tensors are
    device: torch.device
    # tokens of the model, and as the grammar library sees them
    vocabulary: Vocabulary
    # tokens of a page
    page_size: int
    # whether ranks compare the digests of their plans
    debug: bool
    # whether a step may start before the tokens of the previous one are read
    async_scheduling: bool
    # draws a batch of tokens; None: as the device of the logits decides
    draw: Draw | None = None
    # recorded decode steps: CUDA graphs, or a CPU's calls of kernels; None if they are not recorded
    cuda_graphs: GraphRunner | None = None
    # offloaded pages; None without offload
    store: PageStore | None = None
    # moves pages from or to other instances; None without a role
    transfer: TransferThread | None = None
    # experts that every rank computes for the rows of all; None if there are none
    experts: GatheredExperts | None = None
    # drafts tokens with layers of the model; None before the last stage, and where the ranks do not draft
    drafter: Drafter | None = None


def _with_failures(finish: Finish, copied: Callable[[], tuple[list[int], list[int]]]) -> StepResult:
    """A step's result, with the pages that were not saved and those that were not loaded."""
    result, (saves, loads) = finish(), copied()
    return replace(result, failed_saves=tuple(saves), failed_loads=tuple(loads)) if saves or loads else result


class Runner:
    """Runs plans on one rank, in order."""

    def __init__(self, parts: RankParts) -> None:
        grid, rank = parts.grid, parts.rank
        self._grid = grid
        self._rank = rank
        first_slots = parts.attention.pool.first_slots
        self._place = Place(grid.ranks[rank].pcp, grid.ranks[rank].shard, grid.shards_of_pcp, first_slots)
        self._model = parts.model
        self._attention = parts.attention
        self._groups = parts.groups
        self._debug = parts.debug
        self._device = parts.device
        self._vocabulary = parts.vocabulary
        self._async_scheduling = parts.async_scheduling
        self._last_tokens = LastTokens(parts.device)  # kept under async scheduling only
        drafts_are_late = parts.drafter is not None and parts.drafter.accepted is not None
        self._sampler = Sampler(parts.draw, drafts_are_late)
        self._mirror = Mirror(parts.page_size, grid.num_shards)
        self._constraints: dict[str, Constraint] = {}  # by id of requests whose tokens are constrained
        self._failed: dict[str, str] = {}  # why requests cannot go on, of which more steps may be in flight
        self.cuda_graphs = parts.cuda_graphs
        self.transfer = parts.transfer
        self._store = parts.store
        self._experts = parts.experts
        self.drafter = parts.drafter

    @property
    def model(self) -> Model:
        """This rank's part of the model."""
        return self._model

    @property
    def attention(self) -> Attention:
        """Attention with this rank's KV pool."""
        return self._attention

    @property
    def device(self) -> torch.device:
        """Where the rank's tensors are."""
        return self._device

    @property
    def is_asynchronous(self) -> bool:
        """Whether `start` returns before its step is computed."""
        return self._device.type == "cuda"

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step and wait for its result. Only the rank that returns tokens for its TP group has any in it."""
        return self.start(plan)()

    def start(self, plan: StepPlan) -> Finish:
        """Start one step. The returned function waits for its result, which a GPU may still be computing."""
        with torch.inference_mode(), self._groups.context.traffic.trace.span(f"step {plan.step}", STEP):
            # first: the step may overwrite pages that are saved
            copied = None if self._store is None else self._store.start(plan.saves, plan.loads)
            finish = self._start(plan)
            if self._experts is not None:
                self._experts.expect(None)  # recorded steps are padded: equally many everywhere
        if self.transfer is not None:
            self.transfer.computed(plan)
        return finish if copied is None else partial(_with_failures, finish, copied)

    def close(self) -> None:
        """End the transfer thread, if there is one."""
        if self.transfer is not None:
            self.transfer.close()

    def _start(self, plan: StepPlan) -> Finish:
        if self._debug:
            self._compare_digest(plan)
        self._apply(plan)
        if not plan.segments:
            return StepResult
        schedules = self._attention.schedules
        graphs, attention = self.cuda_graphs, self._attention
        if graphs is not None and recordable(plan, schedules, graphs.sends):
            pcps = [segment.pcp for segment in plan.segments]
            rows = [pcps.count(pcp) for pcp in range(self._grid.pcp)]
            if graphs.has_room(rows):
                return self._replay(plan, graphs, rows)
        requests, place, causal = self._mirror.requests, self._place, attention.causal_runs
        short = None if graphs is None else graphs.short_step(plan, requests, place)
        view = short.view if short else rank_view(plan, requests, place, attention.windows, attention.moves, causal)
        hidden, settled = self._hidden(plan, view, short)
        if self._model.head is None:  # not the last stage
            self._groups.pipeline.send(hidden)
            return StepResult
        returns = self._grid.returns_tokens(self._rank)
        scores = [read for rows in view.scored for read in self._score(hidden, rows, self._model.head, returns)]
        draft = None
        if self.drafter is not None:
            draft = partial(self._draft, self.drafter, partial(SampledStep, plan, view, hidden, settled=settled))
        if not view.samples:
            return self._finish(view, hidden, scores, draft)
        sampled = self._integers([wanted.row for wanted in view.samples])
        late = None if settled is None else LateRows(settled.rows.shifts[sampled], settled.rows.token_ids[sampled])
        return self._finish(view, self._model.head(hidden[sampled]), scores, draft, late=late)

    def _draft(self, drafter: Drafter, step: Callable[[Tensor], SampledStep], drawn: Tensor) -> ReadDrafts:
        """Start drafting after the rows with the outcome `drawn` int64 [2, samples]; `step` makes the step of it."""
        with self._groups.context.traffic.within("drafts"):
            return drafter.draft(step(drawn), self._mirror.requests)

    def _hidden(self, plan: StepPlan, view: RankView, short: ShortStep | None) -> tuple[Tensor, SettledStep | None]:
        """Hidden states [T, hidden] after the layers of this stage, and the rows where the device has found them."""
        token_ids, requests, settled = partial(self._last_tokens.fill, view), self._mirror.requests, None
        if self.drafter is not None:
            recorded = self.drafter.hidden(plan, view, requests, token_ids)
            if recorded is not None:
                return recorded
            settled = self.drafter.settle(plan, view, requests)
        elif short is not None:
            return short.hidden(token_ids), None
        if self._experts is not None:
            self._experts.expect(rows_of_pcp(plan.segments, self._grid.pcp))
        if settled is not None and self._model.embedding is not None:
            attend, rows = settled.attend(self._attention, view), settled.rows
            return self._model.layers(self._model.embedding(rows.token_ids), rows.positions, attend), settled
        self._attention.begin(self._attention.preparer.step(view))
        return self._model.layers(self._enter(view), self._integers(view.positions), self._attention), None

    def _replay(self, plan: StepPlan, cuda_graphs: GraphRunner, rows: Sequence[int]) -> Finish:
        """Run a decode step as a CUDA graph, with `rows` rows of each pcp index. Every row is sampled."""
        view = self._uniform_view(plan)
        logits = cuda_graphs.logits(view, rows, self._last_tokens.fill(view))
        return self._finish(view, logits, [], recorded=cuda_graphs.recorded_draw(rows))

    def _uniform_view(self, plan: StepPlan) -> RankView:
        """This rank's share of the `uniform` step."""
        requests, windows, moves = self._mirror.requests, self._attention.windows, self._attention.moves
        schedule = travelling(plan, self._attention.schedules)
        if schedule is None or moves[schedule] == "queries":
            return decode_view(plan, requests, self._place, windows, schedule)
        return rank_view(uniform(plan, self._attention.schedules), requests, self._place, windows, moves)

    def _finish(
        self, view: RankView, logits: Tensor, scores: Sequence[Scores],
        draft: Callable[[Tensor], ReadDrafts] | None = None, recorded: RecordedDraw | None = None,
        late: LateRows | None = None,
    ) -> Finish:  # fmt: skip
        """Start sampling from `logits` [samples, vocab], and then drafting. `late` is that of `Sampler.start`.

        Ranks that do not return tokens sample too under async scheduling, because their next step needs the tokens, and
        where they draft from them.
        """
        self._last_tokens.forget()
        returns = self._grid.returns_tokens(self._rank)
        if not view.samples or not (returns or self._async_scheduling or draft):
            if draft:
                draft(self._integers(()).view(2, 0))
            return lambda: StepResult(prompt_scores=tuple(chain.from_iterable(read() for read in scores)))
        rows = self._rows(view.samples)
        sampling = self._sample(logits, rows, recorded, late)
        drafts = draft(sampling.drawn) if draft else tuple
        if self.drafter is not None and self.drafter.accepted is not None:
            self._sampler.accept(rows, sampling.drawn, self.drafter.accepted)

        def finish() -> StepResult:
            if not returns:
                return StepResult()
            sampled = sampling.finish()
            found = tuple(chain.from_iterable(read() for read in scores))
            return StepResult(tuple(sampled.tokens), found, sampled.errors, drafts=drafts())

        return finish

    def _score(
        self, hidden: Tensor, rows: ScoredRows, head: Callable[[Tensor], Tensor], returns: bool
    ) -> Iterator[Scores]:
        """Start scoring tokens of a prompt, from `hidden` [T, hidden]. What is returned waits for the device.

        Rows are scored in blocks, because the logits of a long chunk may be larger than the model. Every rank of the TP
        group takes part, because `head` gathers the vocabulary.
        """
        known = self._mirror.requests[rows.request_id]
        for first in range(0, rows.length, _SCORED_ROWS):
            count = min(_SCORED_ROWS, rows.length - first)
            position = rows.position + first
            logits = head(hidden[rows.row + first : rows.row + first + count])
            if returns:
                tokens = known.history[position : position + count]
                yield start_scoring(logits, rows.request_id, position, tokens, known.params.prompt_logprobs or 0)

    def _enter(self, view: RankView) -> Tensor:
        """Hidden states [T, hidden] before this stage's layers: embedded, or received from the stage before."""
        if self._model.embedding is not None:
            return self._model.embedding(self._last_tokens.fill(view))
        shape = (len(view.token_ids), self._model.hidden_size)
        return self._groups.pipeline.receive(shape, self._model.dtype)

    def _integers(self, values: Sequence[int]) -> Tensor:
        return integers(values, self._device)

    def _sample(
        self, logits: Tensor, rows: SampleRows, recorded: RecordedDraw | None, late: LateRows | None
    ) -> Sampling:
        """Start sampling from `logits` [samples, vocab], with `recorded` if it can be."""
        sampling = self._sampler.start(logits, rows, recorded, late)
        if self._async_scheduling:
            self._last_tokens.keep(sampling.token_ids, rows.names)
        return sampling

    def _rows(self, samples: Sequence[SampleRequest]) -> SampleRows:
        """The rows to sample."""
        if not isinstance(samples, DecodeSamples):
            return SampleRows.of([self._row(wanted) for wanted in samples])
        special: dict[int, SampleRow] = {}
        if self._constraints or self._failed:
            named = [
                number for number, name in enumerate(samples.names)
                if name in self._constraints or name in self._failed
            ]  # fmt: skip
            special = {number: self._row(samples[number]) for number in named}
        return SampleRows.of_decode(samples, special)

    def _row(self, wanted: SampleRequest) -> SampleRow:
        """The row to sample. One for which no token may be sampled has an error, and is greedy."""
        request_id, position, drafts = wanted.request_id, wanted.position, wanted.drafts
        known, constraint = self._mirror.requests[request_id], self._constraints.get(request_id)
        allowed: bytes | None = None
        banned: Sequence[int] = ()
        error = self._failed.get(request_id, "")
        if constraint is not None and not error:
            try:
                allowed, banned = constraint.masks(position, known.output(position), drafts)
            except RequestError as problem:
                error = str(problem)
                if not drafts:
                    self._failed[request_id] = error
        if error:
            return SampleRow(request_id, _GREEDY, 0, position, drafts=drafts, error=error)
        params, history = known.params, known.history
        return SampleRow(request_id, params, known.seed, position, history, known.num_prompt, drafts, allowed, banned)

    def _apply(self, plan: StepPlan) -> None:
        self._mirror.apply(plan)
        for request_id in plan.finished:
            self._constraints.pop(request_id, None)
            self._failed.pop(request_id, None)
            self._sampler.forget(request_id)
        for admission in plan.admitted:
            if admission.params.constrains:
                self._constraints[admission.request_id] = Constraint(admission.params, self._vocabulary)
        if self.transfer is not None:
            self.transfer.apply(plan, self._mirror.table)

    def _compare_digest(self, plan: StepPlan) -> None:
        """For debugging: raise `EngineError` unless all ranks of this rank's groups have the same plan."""
        mine = torch.frombuffer(bytearray(plan.digest()), dtype=torch.uint8).to(self._device)
        for group in (self._groups.tp, self._groups.context):
            for member, digest in enumerate(group.all_gather(mine, [len(mine)] * group.size, "debug")):
                if not torch.equal(digest, mine):
                    raise EngineError(
                        f"step {plan.step}: member {member} of rank {self._rank}'s group has another plan"
                    )
        if not self._groups.pipeline.agrees(mine):
            raise EngineError(f"step {plan.step}: the stage before rank {self._rank} has another plan")
