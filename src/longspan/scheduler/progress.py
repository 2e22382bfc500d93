"""How far a step's requests have come: the positions that it computes, and which of its drafts were right.

It owns these rules; it must not know the requests' states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from longspan.plan.plan import Segment
from longspan.request import SampledToken


class Progress(NamedTuple):
    """What a step does for one request."""

    # whether it decodes
    decodes: bool
    # the position up to which it is then computed, at least: no draft may be right
    stop: int
    # number of its drafts in the step
    num_drafts: int
    # the drafts; empty if only the ranks know them
    drafts: tuple[int, ...]


def progress(segments: Sequence[Segment]) -> dict[str, Progress]:
    """What a step does for each of its requests."""
    found: dict[str, Progress] = {}
    for segment in segments:
        request_id = segment.request_id
        before = found.get(request_id)
        if segment.prefill:
            stop = segment.stop if before is None else max(before.stop, segment.stop)
            found[request_id] = Progress(False, stop, 0, ())
        elif before is None:
            found[request_id] = Progress(True, segment.start + 1, segment.length - 1, segment.token_ids[1:])
        else:  # pieces of one request, in order: only the first decoded token is no draft
            drafts = (*before.drafts, *segment.token_ids)
            found[request_id] = before._replace(num_drafts=before.num_drafts + segment.length, drafts=drafts)
    return found


def right_tokens(tokens: Sequence[SampledToken], drafts: Sequence[int]) -> list[SampledToken]:
    """The accepted tokens of one request: those sampled after right drafts, up to and with the first difference.

    Random numbers depend on seed and position alone, so these are the tokens that decoding one at a time would give. A
    row behind drafts for which no token could be sampled has none here: it is computed again without drafts before it.
    """
    if not drafts:  # most requests: one token, or none
        return list(tokens[:1])
    in_order = sorted(tokens, key=lambda token: token.position)
    right = in_order[:1]
    for token, draft in zip(in_order[1:], drafts, strict=False):
        if right[-1].token_id != draft or token.position != right[-1].position + 1:
            break
        right.append(token)
    return right
