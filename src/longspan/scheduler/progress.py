"""How far a step's requests have come: the positions that it computes, and which of its drafts were right.

It owns these rules; it must not know the requests' states.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.plan.plan import Segment
from longspan.request import SampledToken


def progress(segments: Sequence[Segment]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """For each request of a step, the position up to which it is then computed, and its drafts in the step."""
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for segment in segments:
        request_id, stop = segment.request_id, segment.stop
        drafts = () if segment.prefill else segment.token_ids[1:]
        if request_id in found:  # pieces of one request, in order: only the first decoded token is no draft
            before, earlier = found[request_id]
            stop, drafts = max(before, stop), earlier if segment.prefill else (*earlier, *segment.token_ids)
        found[request_id] = stop, drafts
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
