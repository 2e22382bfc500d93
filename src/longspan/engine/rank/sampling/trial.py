"""Whether the kernels that draw tokens give the tokens of plain operations, tried once before they are used.

It owns the trial; it must not know how tokens are drawn.
"""

from __future__ import annotations

import logging

import torch

from longspan.engine.rank.sampling.gumbel import DrawParameters
from longspan.engine.rank.sampling.recorded import Draw
from longspan.request import SamplingParams

_LOG = logging.getLogger("longspan.engine")
_VOCABULARY = 3001  # more than a block, and no multiple of one
_KINDS = (
    SamplingParams(), SamplingParams(temperature=0), SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(top_k=20), SamplingParams(top_k=40, top_p=0.8), SamplingParams(top_p=0.3, min_p=0.01),
)  # fmt: skip


def tried(draw: Draw, reference: Draw, device: torch.device) -> Draw:
    """`draw` if it runs on the device and gives the tokens of `reference` there, else `reference`, with a warning.

    Greedy rows, rows without filters and others are tried apart, because kernels are compiled for each of them.
    """
    params = [kind for kind in _KINDS for _ in range(2)]
    logits = torch.randn(len(params), _VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
    logits, positions = logits.to(device, torch.bfloat16), torch.arange(len(params), device=device)
    filtered, plain = (DrawParameters.of(some, range(len(params)), device) for some in (params, params[:4] * 3))
    try:
        found = [draw(logits, parameters, positions).tolist() for parameters in (filtered, plain, None)]
        problem = "other tokens than plain operations"
    except Exception as error:  # whatever a compiler or a driver raises
        found, problem = [], f"{type(error).__name__}: {error}"
    if found == [reference(logits, parameters, positions).tolist() for parameters in (filtered, plain, None)]:
        return draw
    _LOG.warning("the kernels that draw tokens are not used on %s: %s; sampling is slower", device, problem)
    return reference
