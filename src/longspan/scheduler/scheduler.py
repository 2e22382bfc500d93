"""The scheduler: which requests compute which tokens in the next step.

It owns the waiting and running requests, the token budget, fairness and preemption, and returns one `StepPlan` for each
step. Pure Python: it must not import torch, nor know how a plan is carried out.
"""

from __future__ import annotations

from bisect import insort_right
from collections.abc import Sequence
from itertools import islice

from longspan.attention.cost import ScheduleChooser
from longspan.cache.manager import CacheManager
from longspan.cache.prefix import Key
from longspan.config import SchedulerConfig
from longspan.parallel.grid import Grid
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult
from longspan.plan.source import Source
from longspan.request import CoreRequest, SampledToken
from longspan.scheduler.acceptance import DraftCounts
from longspan.scheduler.counters import SchedulerCounters
from longspan.scheduler.loading import PageLoader
from longspan.scheduler.preemption import Preemption
from longspan.scheduler.prefix_hits import PrefixHits
from longspan.scheduler.progress import Progress, progress
from longspan.scheduler.sequence import Grammars, SequenceState
from longspan.scheduler.step import StepBuilder
from longspan.scheduler.waiting import WaitingQueue

_MAX_LOOKAHEAD = 64  # waiting requests that are considered in a step, so that short ones can pass a long one


class Scheduler:
    """Continuous batching over sharded pages.

    A step first takes one token of every decoding request, so a long prefill does not delay decodes. The rest of the
    budget goes to prefills: first to those in progress, oldest first, each leaving up to half of what remains for
    others, then to waiting prompts. Behind a prefill in progress only prompts that fit whole start, so a short prompt
    passes a long one. With the policy `priority`, requests of a lower number come before all others instead.

    Completions of one user's request take turns with other requests (`WaitingQueue`). Where they hold all places or
    pages, one is preempted for a request of which nothing runs.

    With pipeline stages as many steps are in flight as there are stages, and each takes its share of the budget and of
    the decoding requests. With `async_scheduling` a step is planned while the one before it runs. In both cases steps
    are committed in order. Ranks carry steps out in order too, so a page may be given to another request while an
    earlier step still uses it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheManager,
        grid: Grid,
        chooser: ScheduleChooser,
        root_key: Key,
        windows: Sequence[int | None] = (None,),
        grammars: Grammars | None = None,
        drafts_ahead: bool = False,
    ) -> None:
        self.config = config
        self.cache = cache
        self.grid = grid
        self.chooser = chooser
        self.windows = windows
        self._grammars = grammars  # to leave out drafts that grammars do not allow; without it ranks find them wrong
        self._loader = PageLoader(config, cache, grid)
        self._hits = PrefixHits(cache, root_key, on_one_shard=config.schedule == "local")
        self._sequences: dict[str, SequenceState] = {}
        self.waiting = WaitingQueue(self._rank)
        self.running: list[SequenceState] = []
        self._fetching: dict[str, SequenceState] = {}  # their KV is being fetched from another instance
        self._held: dict[str, SequenceState] = {}  # ended, but another instance may still fetch their pages
        self._fetches = 0  # number of the last fetch
        self.preemptions = 0
        self.drafts = DraftCounts()
        self._readers: set[str] = set()  # ids of unfinished requests whose every token is read before the next
        self._finished: list[str] = []  # ids that the next plan reports as finished
        self._step = 0  # number of the last step
        self._progress: dict[int, dict[str, Progress]] = {}  # what each step in flight does, by its number
        self._no_room = False  # whether a waiting request found no pages in the last step
        # whether ranks verify drafts before the driver knows them, and where they begin
        self._drafts_ahead = drafts_ahead
        # whether a token may be computed before its id is known
        alone = config.speculative is None or drafts_ahead
        self.plans_ahead = bool(config.async_scheduling) and grid.pp == 1 and alone
        self.steps_at_once = 2 if self.plans_ahead else grid.pp
        # the same for steps that only decode. A GPU computes such a step faster than a result reaches the driver and
        # the next plan the rank; with drafts a step takes longer
        self.decodes_at_once = self.steps_at_once + (self.plans_ahead and not drafts_ahead)

    def add(self, request: CoreRequest, source: Source | None = None) -> None:
        """Queue a request that `Limits.check` has accepted.

        With a `source` its prompt is computed by that instance: once admitted it holds pages, and it is not computed
        until `arrived` is called.
        """
        self.queue(SequenceState(request, self.cache.new_table(), source))

    def queue(self, sequence: SequenceState) -> None:
        """Put a request into the waiting queue."""
        self.waiting.add(sequence)
        self._sequences[sequence.request_id] = sequence
        if sequence.params.needs_output:
            self._readers.add(sequence.request_id)

    def finish(self, request_id: str) -> None:
        """End a request in any state, and release its pages. Unknown ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        self._readers.discard(request_id)
        if sequence in self.running:
            self.running.remove(sequence)
        elif not self._fetching.pop(request_id, None) and not self._held.pop(request_id, None):
            self.waiting.remove(sequence)
            return
        self._release(sequence)

    def hold(self, request_id: str) -> None:
        """Stop computing a running request, but keep its pages until `finish`. Unknown ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.running.remove(sequence)
            self._held[request_id] = sequence

    def arrived(self, request_id: str) -> None:
        """The KV of a request has been fetched into its pages: from now on it decodes."""
        sequence = self._fetching.pop(request_id)
        sequence.source = None
        sequence.computed = len(sequence.tokens) - 1
        self._run(sequence)
        self._hits.publish(sequence, sequence.computed)

    def schedule(self) -> StepPlan | None:
        """The next step. None if there is nothing to do, or nothing until a step in flight is committed."""
        self._make_way()
        while True:
            budget = self._micro_batch(self.config.step_tokens)
            step = StepBuilder(self.config, self.cache, self.grid, self.windows, budget)
            self._decode(step)
            self._prefill(step)
            busy = self.cache.is_loading or any(sequence.in_flight for sequence in self.running)
            if step.segments or step.fetches or not self.running or busy:
                break
            # prefills in progress hold all pages: one gives up its own
            self._preempt(self._preemption().victim(self.running))
        if not (step.segments or step.fetches or self.cache.copies_waiting):
            return None
        self._step += 1
        self._advance(step)
        finished, self._finished = tuple(self._finished), []
        return step.build(self._step, finished, self.chooser)

    def commit(self, plan: StepPlan, result: StepResult) -> StepResult:
        """Take the result of a step: append its tokens, and publish pages that are full. Call it in step order.

        Returns the result without requests that have ended meanwhile, and without tokens after a wrong draft.
        """
        self.cache.settle(plan.saves, plan.loads, set(result.failed_loads), set(result.failed_saves))
        accepted: list[SampledToken] = []
        tokens_of: dict[str, list[SampledToken]] = {}
        expected = {(draft.request_id, draft.position): draft.token_ids for draft in result.drafts}
        for token in result.tokens:
            tokens_of.setdefault(token.request_id, []).append(token)
        for request_id, done in self._progress.pop(plan.step).items():
            sequence = self._sequences.get(request_id)
            if sequence is None:
                continue
            right, counts = sequence.take(done, tokens_of.get(request_id, ()), expected)
            accepted += right
            self.drafts = self.drafts.plus(counts) if counts.drafted else self.drafts
            self._hits.publish(sequence, len(sequence.tokens) - 1 if done.decodes else done.stop)
        scores = tuple(score for score in result.prompt_scores if score.request_id in self._sequences)
        errors = {
            request_id: error for request_id, error in result.errors.items() if request_id in self._sequences
        }  # fmt: skip
        return StepResult(tuple(accepted), scores, errors)

    def awaits(self, plan: StepPlan) -> bool:
        """Whether a request has nothing to compute until its token of this step is read: one with a grammar."""
        readers = self._readers
        return bool(readers) and any(segment.sample and segment.request_id in readers for segment in plan.segments)

    def cached_tokens(self, request_id: str) -> int:
        """Number of tokens of a request's prefix hit when it was first admitted. Raises `KeyError` after its end."""
        return self._sequences[request_id].cached_tokens or 0

    def counters(self) -> SchedulerCounters:
        """Queue lengths and counts."""
        waiting = len(self.waiting) + len(self._fetching)
        return SchedulerCounters(waiting, len(self.running), self.preemptions, self.drafts)

    def check_integrity(self) -> None:
        """Raise `EngineError` unless every page is free, idle, or held as often as page tables and loads say."""
        holding = (*self.running, *self._fetching.values(), *self._held.values())
        self.cache.check_integrity(sequence.table for sequence in holding)

    def _advance(self, step: StepBuilder) -> None:
        """Note what the step will have computed when the next one begins."""
        found = self._progress[self._step] = progress(step.segments)
        for request_id, done in found.items():
            sequence = self._sequences[request_id]
            sequence.computed = done.stop
            sequence.in_flight += 1
        for segment in step.segments if self.plans_ahead else ():
            sequence = self._sequences[segment.request_id]
            if segment.sample and sequence.may_be_planned_ahead(self._drafts_ahead):
                sequence.await_token(segment, step.drafted_behind(segment, sequence.table))

    def _micro_batch(self, amount: int) -> int:
        """One step's share of `amount`, when each pipeline stage works on a step of its own."""
        return -(-amount // self.grid.pp)

    def _decode(self, step: StepBuilder) -> None:
        """Add a token of every decoding request. Without a page for it one that is not in the step is preempted."""
        rows = batch = self._micro_batch(sum(sequence.remaining <= 1 for sequence in self.running))
        index = 0
        while index < len(self.running) and step.budget and rows:
            sequence = self.running[index]
            if sequence.remaining != 1 or not step.can_follow(sequence):
                index += 1
            elif step.add_decode(sequence, sequence.draft(self.config, step.budget - rows, batch, self._grammars)):
                index += 1
                rows -= 1
            else:
                # those before it are in the step already
                self._preempt(self._preemption().victim(self.running[index:]))
                step.preempted = True

    def _prefill(self, step: StepBuilder) -> None:
        """Spend the rest of the budget on prefills in progress, then on waiting requests."""
        active = [sequence for sequence in self.running if sequence.remaining > 1]
        for sequence, share in zip(active, self._shares(active, step.budget), strict=True):
            step.add_chunk(sequence, share)
        if not step.preempted:
            self._admit(step, bool(active))

    def _shares(self, active: Sequence[SequenceState], budget: int) -> list[int]:
        """Number of tokens for each prefill in progress, oldest first.

        Each leaves up to half of the remaining budget for the prefills after it and for waiting prompts that fit in.
        """
        short = [s.remaining for s in islice(self.waiting, _MAX_LOOKAHEAD) if s.remaining <= budget // 2]
        behind = sum(short) + sum(sequence.remaining for sequence in active)
        shares: list[int] = []
        for sequence in active:
            behind -= sequence.remaining
            shares.append(min(sequence.remaining, budget - min(budget // 2, behind)))
            budget -= shares[-1]
        return shares

    def _admit(self, step: StepBuilder, prefilling: bool) -> None:
        """Start waiting requests in order.

        Behind a prefill in progress only prompts that fit whole into the step start. A prompt for which the cache has
        no room holds back all behind it, since otherwise it might wait for ever.
        """
        self._no_room = False
        if not self.waiting:
            return
        passed: list[SequenceState] = []
        reserved = sum(sequence.pages_missing for sequence in (*self.running, *self._fetching.values()))
        while self.waiting and step.budget and self._has_place:
            sequence = self.waiting.pop()
            if sequence.in_flight:  # preempted, and a step in flight will return a token of it
                passed.append(sequence)
                continue
            self._hits.take(sequence)
            whole = sequence.source is not None or sequence.remaining <= step.budget
            room = self._has_room(sequence, reserved)
            if room and self._must_load(sequence):  # its match is released below, and made again after the load
                reserved += sequence.pages_missing
            elif room and (whole or not prefilling):
                if sequence.cached_tokens is None:
                    sequence.cached_tokens = sequence.computed
                step.admit(sequence)
                if sequence.source is not None:
                    self._fetches += 1
                    self._fetching[sequence.request_id] = sequence
                    step.add_fetch(sequence, self._fetches, sequence.source)
                    reserved += sequence.pages_missing
                    continue
                self._run(sequence)
                step.add_chunk(sequence, min(sequence.remaining, step.budget))
                reserved += sequence.pages_missing
                prefilling = prefilling or not whole
                continue
            # it does not start in this step: later requests may
            self._hits.give_back(sequence)
            passed.append(sequence)
            self._no_room = not room
            if not room or len(passed) >= _MAX_LOOKAHEAD:
                break
        self.waiting.extendleft(passed)

    @property
    def _has_place(self) -> bool:
        """Whether one more request may run."""
        return len(self.running) + len(self._fetching) < self.config.running_limit

    def _make_way(self) -> None:
        """Preempt a completion whose siblings run, if a request of which nothing runs has no place or no pages.

        At most one in a step.
        """
        if not self.waiting or (self._has_place and not self._no_room):
            return
        preemption = self._preemption()
        newcomer = preemption.newcomer(islice(self.waiting, _MAX_LOOKAHEAD))
        victim = None if newcomer is None else preemption.victim_for(newcomer, self.running)
        if newcomer is not None and victim is not None:
            self._preempt(victim)
            self.waiting.advance(newcomer)

    def _preemption(self) -> Preemption:
        return Preemption((*self.running, *self._fetching.values()), self._rank)

    def _has_room(self, sequence: SequenceState, reserved: int) -> bool:
        """Whether the cache has pages for the request, besides `reserved` ones that other requests still need."""
        if self.config.schedule == "local":
            held = {page.shard for page in sequence.table.pages}
            return any(self._can_be_home(shard, sequence) for shard in held or range(self.cache.num_shards))
        return self.cache.total_available() - reserved >= sequence.pages_missing

    def _can_be_home(self, shard: int, sequence: SequenceState) -> bool:
        """Whether the request fits on the shard now, and at its full length if it were alone there."""
        large_enough = self.cache.pools[shard].num_pages >= sequence.max_pages
        return large_enough and self.cache.available(shard) >= sequence.pages_missing

    def _must_load(self, sequence: SequenceState) -> bool:
        """Whether the request waits until pages after its prefix hit are loaded from another tier."""
        offloads = self.cache.offload is not None
        return offloads and self._loader.must_wait(sequence, self._hits.reusable(sequence, len(sequence.table.pages)))

    def _preempt(self, sequence: SequenceState) -> None:
        """Release a running request's pages, and let it wait again."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.restart(self.cache.new_table)
        self.waiting.put_back(sequence, siblings_run=self._preemption().runs(sequence.parent_id))
        self.preemptions += 1

    def _run(self, sequence: SequenceState) -> None:
        """Let a request run, behind those of its priority."""
        insort_right(self.running, sequence, key=self._rank)

    def _rank(self, sequence: SequenceState) -> int:
        """Requests with a lower rank come first; all have the same one under `fcfs`."""
        return sequence.params.priority if self.config.scheduling_policy == "priority" else 0

    def _release(self, sequence: SequenceState) -> None:
        """Release a request's pages. The next plan reports the request as finished."""
        self.cache.release(sequence.table.pages)
        self._finished.append(sequence.request_id)
