"""On a device, drafting reads nothing between its runs and copies nothing that would wait: seen on `meta` tensors."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.pool import KVPool
from longspan.attention.state import AttentionState
from longspan.engine.rank.settled_rows import Carried
from longspan.models.context import LayerContext
from longspan.models.shapes import ShapeLoader
from longspan.models.small_model import SmallModel
from tests.drafting import predictable_folder
from tests.engine.drafted import start, tokens_of
from tests.unit.test_sampling_copies import Copies, Literals, copies

__all__ = ["copies"]
META = torch.device("meta")


class Nothing(TorchBackend):
    """Computes nothing, and writes nothing."""

    def prepare(self, runs: Any, rows: int) -> Any:
        return self

    def writer(self, writes: Any, rows: int) -> Any:
        return self

    def slot_writer(self, slots: Tensor) -> Any:
        return self

    def write(self, cache: Any, k: Tensor, v: Tensor) -> None:
        pass

    def attend(self, q: Tensor, *_: Any, **__: Any) -> AttentionState:
        return AttentionState.empty(*q.shape, q)


class MetaLoader(ShapeLoader):
    """Its products give the shape of a result."""

    def linear(self, *params: Any) -> Any:
        rows = sum(param.shape[0] for param in params)
        return lambda x, bias=None: x.new_empty(*x.shape[:-1], rows)


def on_meta(llm: Any, drafter: Any) -> Any:
    """What drafts, with all its tensors on the `meta` device. What is carried shares its columns with the rank's."""
    drafts, attention = llm.engine.setup.drafts.model, drafter.attention
    model = llm.engine.setup.family.build(drafts, LayerContext(MetaLoader()), torch.float32)
    module = SmallModel(model, drafts.vocab_size, drafts.vocab_size)
    layout, group = llm.engine.setup.drafts.layout, attention._group
    pool = KVPool(layout, attention.pool.layers, attention.pool.slots // 4, 4, torch.float32, META)
    there = Attention(pool, replace(attention.ops, backend=Nothing(META)), group, attention.windows)
    here, carried = drafter.chain.carried, None
    if here is not None:
        carried = Carried(drafter.tokens, here.none, META)
        carried.columns = here.columns
    chain = replace(drafter.chain, module=module, attention=there, carried=carried)
    return replace(drafter, module=module, attention=there, chain=chain, device=META)


@pytest.mark.parametrize("ahead", [False, True])
def test_drafting_waits_for_nothing_between_its_runs_nor_for_the_step_before(copies: Copies, ahead: bool) -> None:
    folder = predictable_folder("llama")
    literals, seen, settled = Literals(), [], []
    options = {"speculative": f"draft:3:{folder}", "attention_backend": "torch", "async_scheduling": ahead}
    with start(folder, **options) as llm:
        (runner,) = llm.engine.executor.runners
        drafter = runner.drafter

        def settle(*step: Any) -> Any:
            there = on_meta(llm, drafter)
            with copies, literals:
                settled.append(there.settle(*step))
            return drafter.settle(*step)

        def draft(step: Any, requests: Any) -> Any:
            moved = replace(
                step, hidden=step.hidden.to(META), drawn=step.drawn.to(META), settled=settled[-1]
            )  # fmt: skip
            there = on_meta(llm, drafter)
            with copies, literals:
                there.draft(moved, requests)
            seen.append(len(step.view.samples))
            return drafter.draft(step, requests)

        runner.drafter = SimpleNamespace(draft=draft, hidden=drafter.hidden, settle=settle, accepted=drafter.accepted)
        tokens_of(llm)
    assert any(settled) == ahead
    assert max(seen) > 3  # drafts were verified
    assert copies.sent
    assert not copies.waiting
    assert not literals.seen
