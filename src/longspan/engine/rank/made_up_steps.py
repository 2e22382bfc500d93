"""Plans without a scheduler: made-up requests, their pages, and a plan for each of their steps.

It owns how such plans are put together; which ones there are is in `warmup.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from longspan.cache.pages import PageRef
from longspan.engine.setup import EngineSetup
from longspan.plan.plan import Admission, Segment, StepPlan
from longspan.request import SamplingParams

LOCAL = "local"
"""The schedule under which nothing travels."""
_TOKEN = 0


@dataclass(frozen=True)
class MadeUpRequest:
    """A request of one group of made-up steps."""

    # its id
    name: str
    # the pcp index of each page, in position order
    pcp_of_page: Sequence[int]
    # how it is sampled
    params: SamplingParams
    # the shard of all its pages; None: those of each page's pcp index, in turn
    home: int | None = None


class _Pages:
    """Hands out the pages of every shard, from the first on, for one group of steps.

    They are adjacent, or with `run` in runs of so many adjacent ones, as in a pool in use: of every two runs the second
    comes first.
    """

    def __init__(self, setup: EngineSetup, run: int) -> None:
        self._shards = [cycle(shards) for shards in setup.grid.shards_of_pcp]
        self._free = [_in_runs(pages, run) if run else iter(range(pages)) for pages in setup.pages_per_shard]

    def of(self, request: MadeUpRequest) -> tuple[PageRef, ...]:
        """The pages of a request. Raises `StopIteration` if a shard has no more."""
        shards = [next(self._shards[pcp]) if request.home is None else request.home for pcp in request.pcp_of_page]
        return tuple([PageRef(shard, next(self._free[shard])) for shard in shards])


def segment_of(
    setup: EngineSetup, name: str, pcp: int, start: int, stop: int, schedule: str, prefill: bool, pending: int = 0,
    sample: int = 1,
) -> Segment:  # fmt: skip
    """A segment whose last `sample` rows are sampled. It needs pages of other ranks unless the schedule is `local`.

    One with pending drafts has as much slack.
    """
    remote = 0 if schedule == LOCAL else len(setup.model.layer_groups)
    tokens = (_TOKEN,) * (stop - start - pending)
    return Segment(
        name, start, tokens, pcp, prefill, remote, sample=sample, pending=pending, slack=max(0, pending - 1)
    )  # fmt: skip


def plans_of(
    setup: EngineSetup, requests: Sequence[MadeUpRequest], steps: Sequence[Sequence[Segment]], schedule: str,
    run: int = 0,
) -> Iterator[StepPlan]:  # fmt: skip
    """A plan for each step's segments, and one that ends the requests.

    Pages of a request are adjacent on a shard, or with `run` in scattered runs of so many adjacent ones.
    """
    pages = _Pages(setup, run)
    admitted = tuple(
        Admission(
            each.name, 1, 0, each.params, pages.of(each), (_TOKEN,) if each.params.needs_history else ()
        )
        for each in requests
    )  # fmt: skip
    schedules = (schedule,) * len(setup.model.layer_groups)
    empty = StepPlan(0, (), (), (), (), (), (), schedules, schedules)
    for number, segments in enumerate(steps):
        yield replace(empty, admitted=() if number else admitted, segments=tuple(segments))
    yield replace(empty, finished=tuple(each.name for each in requests))


def _in_runs(pages: int, run: int) -> Iterator[int]:
    """The numbers below `pages` in runs of `run`, of every two the second first."""
    for first in range(0, pages, 2 * run):
        yield from range(first + run, min(first + 2 * run, pages))
        yield from range(first, min(first + run, pages))
