"""Any load of requests whose drafts are verified ahead, on ranks that only write and read slots: every token is right.

A token follows from all slots that its row reads. So a slot that another request has overwritten, a row at another
position and a page that was published too early all give other tokens.
"""

from __future__ import annotations

import random
from collections import deque
from zlib import crc32

import pytest

from longspan.attention.cost import CostModel, ScheduleChooser
from longspan.attention.schedules import SCHEDULES
from longspan.attention.workload import AttentionShape, GroupShape
from longspan.cache.manager import CacheManager
from longspan.cache.prefix import root_key
from longspan.config import ParallelConfig, SchedulerConfig, Speculation
from longspan.parallel.grid import Grid
from longspan.plan.drafts import drafted_behind
from longspan.plan.mirror import Mirror
from longspan.plan.result import DraftTokens, StepResult
from longspan.request import CoreRequest, SampledToken, SamplingParams
from longspan.scheduler.scheduler import Scheduler

VOCAB, STOP = 40, 7


def following(text):
    """The token after a text."""
    return crc32(repr(tuple(enumerate(text))).encode()) % VOCAB


def reference(prompt, count):
    text = list(prompt)
    while len(text) < len(prompt) + count and text[len(prompt) :][-1:] != [STOP]:
        text.append(following(text))
    return text[len(prompt) :]


class Rank:
    """Carries plans out in order, and finds on its own where pending segments begin."""

    def __init__(self, page_size, drafts, chance):
        self.mirror, self.drafts, self.chance = Mirror(page_size, 1), drafts, chance
        self.slots: dict[int, object] = {}
        self.carried: dict[str, tuple[int, list[int]]] = {}  # by request: right drafts; the token behind, and drafts

    def step(self, plan):
        self.mirror.apply(plan)
        begun = [(segment, *self.begin(segment)) for segment in plan.segments]
        for segment, start, tokens in begun:
            written = {start + number: token for number, token in enumerate(tokens)}
            for position in range(start, segment.stop + segment.slack):
                self.slots[self.slot(segment, position)] = position, written.get(position, "zero")
        sampled = [self.sample(*each) for each in begun if each[0].sample]
        self.carried = {segment.request_id: (right, [last, *drafts]) for segment, right, last, drafts, _ in sampled}
        return StepResult(
            tuple(token for *_, tokens in sampled for token in tokens),
            drafts=tuple(
                DraftTokens(segment.request_id, segment.stop - segment.sample + right, tuple(drafts))
                for segment, right, _, drafts, _ in sampled
            ),
        )

    def begin(self, segment):
        """(the segment's first position, its tokens)."""
        if not segment.pending:
            return segment.start, segment.token_ids
        shift, tokens = self.carried[segment.request_id]
        assert shift <= segment.slack
        return segment.start + shift, tokens[: segment.pending]

    def slot(self, segment, position):
        table = self.mirror.table(segment.request_id)
        number, offset = divmod(position, table.page_size)
        return table.pages[number].index * table.page_size + offset

    def text(self, segment, position):
        """What a row at a position reads."""
        read = [self.slots[self.slot(segment, number)] for number in range(position + 1)]
        return [token if found == number else None for number, (found, token) in enumerate(read)]

    def sample(self, segment, start, tokens):
        """(segment, right drafts, the token behind them, drafts behind it, what the driver reads)."""
        first = start + len(tokens) - segment.sample
        texts = [self.text(segment, first + number) for number in range(segment.sample)]
        found = [following(text) for text in texts]
        bad = self.chance.randrange(1, segment.sample) if segment.sample > 1 and self.chance.random() < 0.1 else None
        if bad is not None:  # the device goes on before it
            found[bad] = self.chance.randrange(VOCAB)
        drafts = tokens[len(tokens) - segment.sample + 1 :]
        right = next((n for n, draft in enumerate(drafts) if draft != found[n] or n + 1 == bad), len(drafts))
        text = [*texts[right], found[right]]
        last = segment.stop - segment.sample + segment.slack + right
        for _ in range(drafted_behind(last, self.mirror.table(segment.request_id), self.drafts)):
            text.append(following(text) if self.chance.random() < 0.7 else self.chance.randrange(VOCAB))
        read = tuple(
            SampledToken(segment.request_id, token, None, segment.stop - segment.sample + number)
            for number, token in enumerate(found)
            if number != bad
        )
        return segment, right, found[right], text[first + right + 2 :], read


def scheduler_of(drafts, page_size, pages):
    grid = Grid(ParallelConfig(1, 1, 1))
    group = GroupShape(grid.shards_of_pcp, grid.nodes(grid.context_group(0)))
    chooser = ScheduleChooser(CostModel(AttentionShape(4, 2, 8, 4), group, SCHEDULES), "auto")
    config = SchedulerConfig(
        max_num_batched_tokens=24, max_num_seqs=5, async_scheduling=True, speculative=Speculation("mtp", drafts)
    )  # fmt: skip
    cache = CacheManager(page_size, (pages,), enable_prefix_caching=True)
    return Scheduler(config, cache, grid, chooser, root_key("test"), drafts_ahead=True)


@pytest.mark.parametrize("seed", range(24))
def test_any_load_gives_the_tokens_of_the_model_whatever_is_drafted_ended_and_preempted(seed):
    chance = random.Random(seed)
    drafts, page_size = chance.randint(1, 4), chance.choice((1, 2, 4))
    scheduler = scheduler_of(drafts, page_size, pages=-(-chance.choice((48, 90)) // page_size))
    rank, flying, outputs, expected = Rank(page_size, drafts, chance), deque(), {}, {}
    most, slack, aborted = {}, 0, set()
    shared = [chance.randrange(VOCAB) for _ in range(12)]
    for number in range(10):
        prompt = shared[: chance.randrange(12)] + [chance.randrange(VOCAB) for _ in range(chance.randint(1, 9))]
        most[str(number)] = chance.randint(1, 18)
        expected[str(number)], outputs[str(number)] = reference(prompt, most[str(number)]), []
        params = SamplingParams(temperature=0, presence_penalty=0.1 * (number % 5 == 4))
        scheduler.add(CoreRequest(str(number), prompt, params, 0, most[str(number)]))
    unfinished = set(outputs)
    for _ in range(1500):
        while len(flying) < scheduler.decodes_at_once and (plan := scheduler.schedule()):
            flying.append((plan, rank.step(plan)))
            slack += sum(segment.slack for segment in plan.segments)
        if not flying:
            break
        for token in scheduler.commit(*flying.popleft()).tokens:
            name = token.request_id
            if name in unfinished:
                outputs[name].append(token.token_id)
                if token.token_id == STOP or len(outputs[name]) == most[name]:
                    scheduler.finish(name)
                    unfinished.discard(name)
        if unfinished and chance.random() < 0.01:
            name = chance.choice(sorted(unfinished))
            scheduler.finish(name)
            unfinished.discard(name)
            aborted.add(name)
        scheduler.check_integrity()
    assert not unfinished
    assert slack > 0
    for name, tokens in outputs.items():
        assert tokens == (expected[name][: len(tokens)] if name in aborted else expected[name])
