"""The steps that a rank runs before it is ready, so that no request waits for a kernel to compile or to be loaded.

It owns which steps these are, made from the setup alone, so that all ranks run the same ones; it must not know kernels.
Pages that they write are free: nothing has been cached yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from longspan.engine.rank.made_up_steps import LOCAL, MadeUpRequest, plans_of, segment_of
from longspan.engine.rank.progress import with_progress
from longspan.engine.rank.runner import Runner
from longspan.engine.setup import EngineSetup
from longspan.plan.plan import StepPlan
from longspan.request import SamplingParams

_DENSE_UNTIL = 512  # lengths below this are tried closely: kernels and their variants change most there
_FEW, _SEVERAL = 3, 17  # numbers of decode rows in a step
_SHORT = tuple(1 << n for n in range(7))  # lengths of later chunks: one for each kind of tile for a few rows
_LONG_ENOUGH = 640  # tokens before a later chunk, so that several programs share its rows
_RUNS = 32  # of adjacent pages of a request on a shard, in long steps over several
_SAMPLING = (
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(top_k=20),
    SamplingParams(min_p=0.1),
    SamplingParams(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1),
    SamplingParams(logprobs=1),
)
"""Parameters that take different ways through the sampler."""


def warm_up(runner: Runner, setup: EngineSetup, shown: bool) -> None:
    """Run all warm-up steps. All ranks must do so at the same time. With `shown` there is a progress bar.

    Recording has launched the kernels of short steps. Here they are run without their graphs, for the kernels of short
    chunks in steps with too many rows, and of those that find no room.
    """
    plans = list(warmup_plans(setup))
    graphs = runner.cuda_graphs
    with nullcontext() if graphs is None else graphs.without_short():
        for plan in with_progress("compiling kernels", plans, len(plans), shown):
            runner.step(plan)
    if runner.drafter is not None and setup.drafts_on_device:  # short chunks in steps with too many rows for a graph
        recorded, runner.drafter = runner.drafter, runner.drafter.with_graphs(None)
        for plan in _scattered(setup, LOCAL):
            runner.step(plan)
        runner.drafter = recorded


def warmup_plans(setup: EngineSetup) -> Iterator[StepPlan]:
    """The warm-up steps, in groups that leave no request behind."""
    for schedule in setup.possible_schedules:
        for length in _lengths(setup, every=schedule == LOCAL):
            yield from _prefill(setup, length, schedule)
            if schedule == setup.possible_schedules[0] != LOCAL:
                yield from _prefill(setup, length, LOCAL, chunks=1)  # sees itself only, so nothing travels
                yield from _at_home(setup, length)
        yield from _scattered(setup, schedule)
        for length, before, scattered in setup.backend.record.long_steps:
            yield from _long(setup, length, before, schedule, scattered)
        for rows in sorted({1, min(_FEW, most_rows(setup)), min(_SEVERAL, most_rows(setup)), most_rows(setup)}):
            yield from _decode(setup, rows, schedule, prefill=True)
            yield from _decode(setup, rows, schedule, prefill=False)
            for params in _SAMPLING if schedule == setup.possible_schedules[0] else ():
                yield from _decode(setup, rows, schedule, prefill=False, kinds=(params,))
            fitting = (n for n in _numbers_of_drafts(setup) if _pages_of_row(setup, n) <= min(setup.pages_per_shard))
            for drafts in fitting:
                yield from _decode(setup, min(rows, most_rows(setup, drafts)), schedule, prefill=False, drafts=drafts)


def _scattered(setup: EngineSetup, schedule: str) -> Iterator[StepPlan]:
    """Steps over pages that are not adjacent; and with latents steps of which some requests are expanded.

    Only a few rows take tiles of their own, so the later chunks are short.
    """
    if schedule != LOCAL:
        for length in _lengths(setup, every=False):
            yield from _prefill(setup, length, schedule, scattered=True)
        return
    positions = setup.model.max_position_embeddings
    room, page = min(_longest(setup) // 2, positions // 2), setup.config.cache.page_size
    # two requests of a step have so many tokens before it, which came in several steps if one is too small
    before = min(_LONG_ENOUGH, positions // 2, _tokens_of_pcp(setup) // 2 - room - page)
    expansion = setup.attention_shape.expansion
    if before <= page:
        return
    if _longest(setup) > positions // 2:  # `_prefill` has divided it
        yield from _later_chunks(setup, min(_longest(setup), positions - 2), (1,), scattered=False)
    expanded = expansion.per_token // expansion.saved_per_pair + 1 if expansion.saved_per_pair else None
    for drafts in _numbers_of_drafts(setup) if setup.drafts_ahead else ():
        yield from _later_chunks(setup, before, (1,), decode=1 + drafts, scattered=True)
    for length in (length for length in _SHORT if length <= room):
        yield from _later_chunks(setup, before, (length,), decode=int(length == 1), scattered=True)
        if expanded is not None and expanded <= room:
            for scattered in (False, True):
                yield from _later_chunks(setup, before, (expanded, length), scattered=scattered)


def largest_plans(setup: EngineSetup) -> Iterator[StepPlan]:
    """The steps that need the most memory: a prefill of all tokens of a step, and sampling for as many requests as may
    run at once, with all their drafts too."""
    for schedule in setup.possible_schedules:
        yield from _prefill(setup, _longest(setup), schedule)
    for drafts in {0, max(_numbers_of_drafts(setup), default=0)}:
        yield from _decode(setup, most_rows(setup, drafts), schedule, prefill=False, drafts=drafts)


def pages_for_largest(setup: EngineSetup) -> int:
    """Pages of each shard with which `largest_plans` has all tokens and all requests of a step."""
    page, shards = setup.config.cache.page_size, len(setup.grid.shards_of_pcp[0])
    most = max(_numbers_of_drafts(setup), default=0)
    decode = max(_pages_of_row(setup, drafts) * (_rows_of_step(setup, drafts) + 2) for drafts in (0, most))
    return max(-(-2 * (_share_of_step(setup) + page) // (shards * page)) + 1, decode)


def most_rows(setup: EngineSetup, drafts: int = 0) -> int:
    """The most requests with so many drafts that decode in a step, and for which there are pages."""
    room = min(setup.pages_per_shard) // _pages_of_row(setup, drafts) - 2
    return max(1, min(_rows_of_step(setup, drafts), room))


def _rows_of_step(setup: EngineSetup, drafts: int) -> int:
    """The most requests with so many drafts that may decode in a step."""
    return max(1, min(setup.config.scheduler.running_limit, setup.config.scheduler.step_tokens // (1 + drafts)))


def _pages_of_row(setup: EngineSetup, drafts: int) -> int:
    """Pages of a request in `_decode`: for two tokens, its drafts, and as many more that are drafted behind these.

    Drafts that are verified ahead may begin as many positions later.
    """
    return -(-(2 + (3 if setup.drafts_ahead else 2) * drafts) // setup.config.cache.page_size)


def _numbers_of_drafts(setup: EngineSetup) -> list[int]:
    """Numbers of drafts whose steps may have tiles of their own: powers of two, and the most that a request has."""
    how = setup.config.scheduler.speculative
    most = 0 if how is None else how.tokens
    return sorted({*(1 << n for n in range(most.bit_length())), most} - {0})


def _longest(setup: EngineSetup) -> int:
    """The most tokens of one pcp index in a step: its share of a step's tokens, if there are pages for two of them."""
    return max(1, min(_share_of_step(setup), _tokens_of_pcp(setup) // 2 - setup.config.cache.page_size))


def _share_of_step(setup: EngineSetup) -> int:
    """A pcp index's share of a step's tokens."""
    return -(-setup.config.scheduler.step_tokens // setup.grid.pcp)


def _tokens_of_pcp(setup: EngineSetup) -> int:
    """Tokens for which the ranks of a pcp index have pages."""
    return min(setup.pages_per_shard) * len(setup.grid.shards_of_pcp[0]) * setup.config.cache.page_size


def _lengths(setup: EngineSetup, every: bool) -> list[int]:
    """Lengths of prefills: powers of two with their neighbours, and the largest. Few of them unless `every`."""
    longest = _longest(setup)
    powers = [1 << n for n in range(longest.bit_length())]
    if not every:
        return sorted({*(length for length in _SHORT if length <= longest), *powers[::3], longest})
    near = {length for p in powers if p <= _DENSE_UNTIL for length in (p - 1, p, p + 1, p + p // 2)}
    far = {length for p in powers if p > _DENSE_UNTIL for length in (p, p + 1)}
    return sorted(length for length in {*near, *far, longest} if 0 < length <= longest)


def _prefill(
    setup: EngineSetup, length: int, schedule: str, scattered: bool = False, chunks: int = 2
) -> Iterator[StepPlan]:
    """`chunks` of `length` tokens a pcp index: one that sees itself only, and one that sees the first one too.

    Under `local` every pcp index has a request of its own, else one request is spread over all of them.
    """
    page, pcps, requests = setup.config.cache.page_size, range(setup.grid.pcp), []
    pieces: list[list[tuple[str, int, int, int]]] = [[], []]  # of both chunks: request, pcp index, start, stop
    local = schedule == LOCAL
    for number, part in enumerate(
        _parts(length, setup.model.max_position_embeddings // (chunks if local else 2 * len(pcps)))
    ):
        if local:
            for pcp in pcps:
                name = f"{number} of {pcp}"
                requests.append(MadeUpRequest(name, [pcp] * -(-2 * part // page), _SAMPLING[pcp % len(_SAMPLING)]))
                for chunk in range(2):
                    pieces[chunk].append((name, pcp, chunk * part, (chunk + 1) * part))
            continue
        pages = -(-part // page)  # whole pages, because a page has one writer
        requests.append(
            MadeUpRequest(f"{number}", [pcp for _ in range(2) for pcp in pcps for _ in range(pages)], _SAMPLING[0])
        )
        for place in range(2 * len(pcps)):
            chunk, pcp = divmod(place, len(pcps))
            pieces[chunk].append((f"{number}", pcp, place * pages * page, (place + 1) * pages * page))
    steps = [[segment_of(setup, *piece, schedule, prefill=True) for piece in chunk] for chunk in pieces]
    yield from plans_of(setup, requests, steps[:chunks], schedule, int(scattered))


def _at_home(setup: EngineSetup, length: int) -> Iterator[StepPlan]:
    """First chunks of `length` tokens whose pages are all on one shard: of every shard alone, and of all in a step.

    Only the rank that stores a chunk reads it from the cache. Nothing for a length of which no context has a home.
    """
    page, most = setup.config.cache.page_size, setup.config.scheduler.local_limit
    if not 1 < length <= min(most, setup.max_model_len, min(setup.pages_per_shard) * page):
        return
    pcps = {shard: pcp for pcp, shards in enumerate(setup.grid.shards_of_pcp) for shard in shards}
    requests = [
        MadeUpRequest(f"{shard}", [pcp] * -(-length // page), _SAMPLING[0], home=shard) for shard, pcp in pcps.items()
    ]
    chunks = [segment_of(setup, f"{shard}", pcp, 0, length, LOCAL, prefill=True) for shard, pcp in pcps.items()]
    together = [chunks] if length * len(chunks) <= setup.config.scheduler.step_tokens else []
    yield from plans_of(setup, requests, [*([chunk] for chunk in chunks), *together], LOCAL)


def _long(setup: EngineSetup, length: int, before: int, schedule: str, scattered: bool) -> Iterator[StepPlan]:
    """A chunk of `length` tokens a pcp index, behind `before` tokens on every shard, which no step computes.

    Nothing if no step or no request is as long. Pages are adjacent, or if `scattered` in several runs. Under `local`
    every pcp index has a request of its own, else one request is spread over all of them.
    """
    page, pcps, shards = setup.config.cache.page_size, range(setup.grid.pcp), len(setup.grid.shards_of_pcp[0])
    local = schedule == LOCAL
    held = before * shards // page  # pages of a pcp index
    most = -(-length // page)
    total = (held + most) * page * (1 if local else len(pcps))
    too_long = length > _share_of_step(setup) or total > setup.max_model_len
    if too_long or length % page or (held + most) * page > _tokens_of_pcp(setup):
        return
    if local:
        requests = [MadeUpRequest(f"{pcp}", [pcp] * (held + most), _SAMPLING[0]) for pcp in pcps]
        places = [(f"{pcp}", pcp, held * page) for pcp in pcps]
    else:
        order = [pcp for count in (held, most) for pcp in pcps for _ in range(count)]
        requests = [MadeUpRequest("0", order, _SAMPLING[0])]
        places = [("0", pcp, (held * len(pcps) + pcp * most) * page) for pcp in pcps]
    step = [segment_of(setup, name, pcp, at, at + length, schedule, prefill=True) for name, pcp, at in places]
    run = -(-(held + most) // shards // _RUNS) if scattered else 0
    yield from plans_of(setup, requests, [step], schedule, run)


def _later_chunks(
    setup: EngineSetup, before: int, lengths: Sequence[int], scattered: bool, decode: int = 0
) -> Iterator[StepPlan]:
    """`before` tokens of a request for each of `lengths`, and then chunks of these lengths in one step.

    Every pcp index has requests of its own. With `decode` so many decode rows of the same context follow, beside a
    prompt: all but one of them are drafts that are verified ahead.
    """
    pages = -(-(before + max(lengths) + 3 * decode) // setup.config.cache.page_size)
    named = [(f"{n} of {pcp}", pcp, length) for n, length in enumerate(lengths) for pcp in range(setup.grid.pcp)]
    requests = [MadeUpRequest(name, [pcp] * pages, _SAMPLING[0]) for name, pcp, _ in named]

    most = max(1, _longest(setup) // len(lengths))
    steps = [
        [segment_of(setup, name, pcp, start, min(start + most, before), LOCAL, prefill=True) for name, pcp, _ in named]
        for start in range(0, before, most)
    ]
    steps.append([
        segment_of(setup, name, pcp, before, before + length, LOCAL, prefill=True) for name, pcp, length in named
    ])  # fmt: skip
    if decode:
        requests.append(MadeUpRequest("prompt", [0], _SAMPLING[0]))
        rows = [
            segment_of(
                setup, name, pcp, before + length, before + length + decode, LOCAL, prefill=False,
                pending=decode if decode > 1 else 0, sample=decode,
            )
            for name, pcp, length in named
        ]  # fmt: skip
        steps.append([*rows, segment_of(setup, "prompt", 0, 0, 1, LOCAL, prefill=True)])
    yield from plans_of(setup, requests, steps, LOCAL, int(scattered))


def _parts(length: int, most: int) -> list[int]:
    """A length as a sum of nearly equal parts of `most` at most, but of at least one."""
    count = -(-length // max(1, most))
    return [length // count + (number < length % count) for number in range(count)]


def _decode(
    setup: EngineSetup, rows: int, schedule: str, prefill: bool, kinds: Sequence[SamplingParams] = _SAMPLING,
    drafts: int = 0,
) -> Iterator[StepPlan]:  # fmt: skip
    """Two decode steps of `rows` requests, the second with `drafts` each; its tokens are pending where it may be
    planned ahead.

    With `prefill` there is a short prompt in each step, so that it is not recorded.
    """
    pcp, pages = setup.grid.pcp, _pages_of_row(setup, drafts)
    requests = [MadeUpRequest(f"{row}", [row % pcp] * pages, kinds[row % len(kinds)]) for row in range(rows)]
    steps = []
    for position in range(2):
        sample = 1 + drafts * position
        ahead = setup.drafts_ahead if drafts else setup.config.scheduler.async_scheduling
        steps.append([
            segment_of(
                setup, f"{row}", row % pcp, position, position + sample, schedule, prefill=False,
                pending=sample if position and ahead else 0, sample=sample,
            )
            for row in range(rows)
        ])  # fmt: skip
    if prefill:
        requests.append(MadeUpRequest("prompt", [0] * (2 * pages), kinds[0]))
        for step, start in zip(steps, (0, 2), strict=True):
            step.append(segment_of(setup, "prompt", 0, start, start + 2, schedule, prefill=True))
    yield from plans_of(setup, requests, steps, schedule)
