"""On a device, drafting reads nothing between its runs and copies nothing that would wait: seen on `meta` tensors."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.pool import KVPool
from longspan.attention.state import AttentionState
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
    """What drafts, with all its tensors on the `meta` device."""
    drafts, attention = llm.engine.setup.drafts.model, drafter.attention
    model = llm.engine.setup.family.build(drafts, LayerContext(MetaLoader()), torch.float32)
    module = SmallModel(model, drafts.vocab_size, drafts.vocab_size)
    layout, group = llm.engine.setup.drafts.layout, attention._group
    pool = KVPool(layout, attention.pool.layers, attention.pool.slots // 4, 4, torch.float32, META)
    there = Attention(pool, replace(attention.ops, backend=Nothing(META)), group, attention.windows)
    chain = replace(drafter.chain, module=module, attention=there)
    return replace(drafter, module=module, attention=there, chain=chain, device=META)


def test_drafting_waits_for_nothing_between_its_runs(copies: Copies) -> None:
    folder = predictable_folder("llama")
    literals, seen = Literals(), []
    with start(folder, speculative=f"draft:3:{folder}", attention_backend="torch") as llm:
        (runner,) = llm.engine.executor.runners
        drafter = runner.drafter
        there = on_meta(llm, drafter)

        def draft(step: Any, requests: Any) -> Any:
            moved = replace(step, hidden=step.hidden.to(META), sampled=step.sampled.to(META))
            with copies, literals:
                there.draft(moved, requests)
            seen.append(len(step.view.samples))
            return drafter.draft(step, requests)

        runner.drafter = SimpleNamespace(draft=draft, hidden=drafter.hidden)
        tokens_of(llm)
    assert max(seen) > 3  # drafts were verified
    assert copies.sent
    assert not copies.waiting
    assert not literals.seen
