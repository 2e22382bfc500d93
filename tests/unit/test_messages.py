"""What the server tells its core."""

import msgspec

from longspan.request import CoreRequest, SamplingParams
from longspan.server.messages import Start, ToCore


def test_what_completions_of_one_request_share_is_sent_once():
    prompt, params = list(range(1000)), SamplingParams(n=64, grammar="x" * 10_000)
    other = CoreRequest("other", [1], SamplingParams(seed=1), 7, 5)
    sent = [*(CoreRequest(str(number), prompt, params, number, 5) for number in range(64)), other]
    data = msgspec.msgpack.encode(Start.of(sent))
    assert len(data) < 64 * 1000
    got = msgspec.msgpack.decode(data, type=ToCore).requests
    assert [(r.request_id, list(r.prompt_token_ids), r.params, r.seed) for r in got] == [
        (r.request_id, list(r.prompt_token_ids), r.params, r.seed) for r in sent
    ]
