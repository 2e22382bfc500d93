"""On a device, sampling reads nothing before it must and copies nothing that would wait: seen on `meta` tensors.

Such tensors have no numbers, so whatever reads one raises. Copies are seen in the operations that PyTorch dispatches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longspan.attention import host_copy
from longspan.engine.rank.sampling import transfer
from longspan.engine.rank.sampling.logprobs import start_scoring
from longspan.engine.rank.sampling.rows import LateRows, SampleRow, SampleRows, token_bits
from longspan.engine.rank.sampling.sampler import Sampler
from longspan.models import moe
from longspan.models.context import LayerContext, LinearStack
from longspan.models.decoder import DecoderModel
from longspan.models.grouped import sum_grouped
from longspan.models.layers import DenseLinear
from longspan.models.params import Param
from longspan.models.shapes import ShapeLoader
from longspan.planner.models import find_model
from longspan.request import SamplingParams

VOCABULARY = 1000
BATCHES = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalised": {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "logit_bias": ((3, 1.0),)},
    "logprobs": {"logprobs": 5},
    "forbidden": {"temperature": 0},
}


class Copies(TorchDispatchMode):
    """Lists what takes numbers from ordinary host memory to a device, or from a device to the host."""

    def __init__(self) -> None:
        super().__init__()
        # addresses of host memory that is pinned
        self.pinned: set[int] = set()
        # copies from pinned memory
        self.sent = 0
        # copies that would wait
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        host = [x for x in tensors if x.device.type == "cpu" and x.dim()]
        there = [x for x in [*tensors, *tree_leaves(result)] if isinstance(x, Tensor) and x.device.type == "meta"]
        if host and there:
            copies = func.overloadpacket.__name__ in ("to", "_to_copy") and (kwargs or {}).get("non_blocking")
            if copies and all(x.data_ptr() in self.pinned for x in host):
                self.sent += 1
            else:
                self.waiting.append(str(func))
        return result


class Literals(TorchFunctionMode):
    """Lists Python numbers that become tensors on a device, or indices of one: the dispatcher does not show them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor) and result.device.type != "cpu"
        indexed = func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device.type != "cpu"
        if made or (indexed and isinstance(args[1], list)):
            self.seen.append(func.__name__)
        return result


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """Copies, with host memory in place of pinned memory, and reading that starts but never arrives."""
    found = Copies()

    def pinned(tensor: Tensor, device: torch.device) -> Tensor:
        assert device.type == "meta"
        found.pinned.add(tensor.data_ptr())
        return tensor

    def read(data: Tensor) -> Any:
        return lambda: pytest.fail("read before it must be")

    monkeypatch.setattr(host_copy, "pinned", pinned)
    monkeypatch.setattr(transfer, "_read", read)
    return found


def rows_of(name: str, position: int, fields: dict[str, Any] | None = None) -> list[SampleRow]:
    params = [SamplingParams(**(fields or BATCHES[name])), SamplingParams(temperature=0)]
    allowed = token_bits(range(50), VOCABULARY) if name == "forbidden" else None
    return [
        SampleRow(f"{name} {i}", one, i, position, [1, 2, 3], 3, 0, None if i else allowed, () if i else [7, 8])
        if name == "forbidden"
        else SampleRow(f"{name} {i}", one, i, position, [1, 2, 3], 3)
        for i, one in enumerate(params)
    ]


@pytest.mark.parametrize("name", BATCHES)
def test_no_batch_waits_for_the_device(name: str, copies: Copies) -> None:
    sampler = Sampler()
    first, second = rows_of(name, 0), rows_of(name, 1)
    second = [row._replace(params=one.params) for row, one in zip(second, first, strict=True)]
    literals = Literals()
    with torch.inference_mode(), copies, literals:
        for rows in (first, second):
            sampler.start(torch.empty(2, VOCABULARY, device="meta"), rows)
    assert not copies.waiting and not literals.seen


@pytest.mark.parametrize(
    ("name", "copied"), [("greedy", 0), ("sampled", 1), ("penalised", 1), ("logprobs", 1), ("forbidden", 2)]
)
def test_a_step_of_the_same_rows_copies_once(name: str, copied: int, copies: Copies) -> None:
    """The masks of a grammar go in a copy of their own."""
    sampler, params = Sampler(), [row.params for row in rows_of(name, 0)]
    before = 0
    for position in range(3):
        rows = [row._replace(params=one) for row, one in zip(rows_of(name, position), params, strict=True)]
        before = copies.sent
        with torch.inference_mode(), copies:
            sampler.start(torch.empty(2, VOCABULARY, device="meta"), rows)
    assert copies.sent - before == copied


def test_penalties_beside_drafts_that_only_the_device_knows_wait_for_nothing(copies: Copies) -> None:
    """Two copies: of the step, and of what is counted when the device knows which drafts are right."""
    sampler, literals = Sampler(drafts_are_late=True), Literals()
    first, second = rows_of("penalised", 0)
    number = torch.empty(3, dtype=torch.int64, device="meta")
    for position in range(3):
        drafted = [first._replace(position=position + drafts, drafts=drafts) for drafts in range(2 if position else 0)]
        rows = SampleRows.of([*(drafted or [first]), second._replace(position=position)])
        late, before = LateRows(number, number) if drafted else None, copies.sent
        with torch.inference_mode(), copies, literals:
            sampling = sampler.start(torch.empty(len(rows), VOCABULARY, device="meta"), rows, late=late)
            sampler.accept(rows, sampling.drawn, number)
    assert not copies.waiting and not literals.seen and copies.sent - before == 2


def test_a_prompt_is_scored_without_reading_its_scores(copies: Copies) -> None:
    literals = Literals()
    with torch.inference_mode(), copies, literals:
        start_scoring(torch.empty(3, VOCABULARY, device="meta"), "7", 1, [4, 5, 6], 2)
    assert not copies.waiting and not literals.seen and copies.sent == 1


class MetaLoader(ShapeLoader):
    """A loader of a whole model in bfloat16, without memory."""

    def load(self, *params: Param) -> Tensor:
        found = super().load(*params)
        return found if params[0].exact else found.to(torch.bfloat16)

    def linear(self, *params: Param) -> DenseLinear:
        return DenseLinear(self.load(*params), pack=False)

    def linear_stack(self, *entries: Any) -> LinearStack:
        weight = torch.stack([self.load(*entry) for entry in entries])
        return LinearStack(tuple(DenseLinear(each, pack=False) for each in weight), weight)


def attend(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In place of attention, whose work is planned on the host before the step."""
    return q.new_empty(*q.shape[:2], layer.latent.value_dim if layer.latent else v.shape[-1])


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-235b-a22b", "deepseek-v3"])
def test_a_whole_step_of_a_model_waits_for_nothing(model: str, name: str, copies: Copies, monkeypatch: Any) -> None:
    """Of a few layers with the sizes of real models, dense ones and mixtures; then its logits are sampled."""
    monkeypatch.setattr(moe, "choose_sum", lambda held: sum_grouped)
    config = find_model(model)[0]
    config = replace(config, num_layers=4, vocab_size=VOCABULARY)
    built = DecoderModel(config, LayerContext(MetaLoader(lambda axis, size: (0, size))), torch.bfloat16)
    sampler, literals = Sampler(), Literals()
    token_ids = positions = torch.zeros(2, dtype=torch.int64, device="meta")
    with torch.inference_mode(), copies, literals:
        logits = built.head(built.layers(built.embedding(token_ids), positions, attend))
        sampler.start(logits, rows_of(name, 0))
    assert logits.shape == (2, VOCABULARY)
    assert not copies.waiting and not literals.seen
