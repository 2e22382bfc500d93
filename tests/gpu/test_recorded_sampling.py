"""Recorded draws on a GPU give the tokens of the kernels launched one by one, for any batch of any size."""

from __future__ import annotations

import pytest
import torch

from longspan import SamplingParams
from longspan.engine.rank.recorder import CudaRecorder
from longspan.engine.rank.sampling.gumbel import DrawParameters
from longspan.engine.rank.sampling.recorded import RecordedDraw

pytestmark = pytest.mark.gpu
KINDS = (
    SamplingParams(temperature=0), SamplingParams(temperature=1), SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=1, top_k=20), SamplingParams(temperature=1, min_p=0.1),
)  # fmt: skip


def test_a_recorded_draw_gives_the_tokens_of_the_kernels():
    from longspan.engine.rank.sampling.kernels import draw

    device = torch.device("cuda", 0)
    logits = torch.randn(8, 5003, device=device) * 4
    with torch.inference_mode():
        recorded = RecordedDraw(logits, draw, CudaRecorder(device))
        for step, kinds in enumerate([KINDS, KINDS[1:2], KINDS[:1], KINDS[2:], KINDS[1:2] * 8, KINDS]):
            logits.copy_(torch.randn(logits.shape, device=device) * 4)
            positions = [step + number for number in range(len(kinds))]
            parameters = None if kinds == KINDS[:1] else DrawParameters.of(kinds, range(len(kinds)), device)
            for _ in range(2):  # the second time with the table as it is
                wanted = draw(logits[: len(kinds)], parameters, torch.tensor(positions, device=device))
                assert torch.equal(recorded.draw(parameters, positions), wanted)
