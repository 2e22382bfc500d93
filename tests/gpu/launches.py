"""Counts what code would launch on a GPU, without one: it runs on PyTorch's meta device, which computes nothing.

There Triton's kernels are counted in place of being launched. Code that reads a tensor's contents back fails, because
there are none; tensors that it copies to the device are listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from longspan.attention.attend import Attention
from longspan.attention.backends.triton.backend import TritonBackend
from longspan.attention.pool import KVPool
from longspan.attention.refillable import RefillableStep, StepSize
from longspan.attention.schedules import ContextGroup
from longspan.attention.step_buffer import StepBuffer
from longspan.attention.variants import AttentionOps, Heads
from longspan.attention.workload import ExpansionCost
from longspan.cache.layout import KVLayout
from longspan.models.config import ModelConfig
from longspan.models.context import Linear
from longspan.models.layers import DenseLinear
from longspan.models.params import Param, loaded_shape
from longspan.parallel.collectives import Traffic
from longspan.parallel.heads import HeadBlock
from longspan.parallel.threaded import ThreadedCollectives, ThreadFabric

META = torch.device("meta")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm", "grouped_mm"}
_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}


@dataclass
class Launches:
    """What was launched, in order."""

    names: list[str] = field(default_factory=list)  # of operations, or of Triton's kernels
    copies: list[str] = field(default_factory=list)  # operations that took a tensor from the host to the device

    @property
    def products(self) -> list[str]:
        """The matrix products among them."""
        return [name for name in self.names if name in PRODUCTS]


@contextmanager
def counted() -> Iterator[Launches]:
    """Count within this context. Nothing is launched."""
    found = Launches()

    def launch(kernel, grid):
        return lambda *_, **__: found.names.append(kernel.fn.__name__)

    with (
        patch.object(JITFunction, "__getitem__", launch, create=True),
        patch.object(InterpretedFunction, "__getitem__", launch, create=True),
        _Operations(found),
    ):
        yield found


class _Operations(TorchDispatchMode):
    """Counts PyTorch's operations on the meta device, but for those that only make or view a tensor."""

    def __init__(self, found: Launches) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)  # what is made of other operations counts as these
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        before, after = (
            {x.device.type for x in tree_leaves(part) if isinstance(x, Tensor)} for part in ((args, kwargs), result)
        )
        views = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if "meta" in before | after and not views and name not in _NOTHING:
            self._found.names.append(name)
            if before - {"meta"}:
                self._found.copies.append(name)
        return result


class MetaLoader:
    """A loader of a whole model on the meta device: weights have shapes and no contents."""

    device = META

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self._dtype = dtype

    def extent(self, axis: str, size: int) -> tuple[int, int]:
        return 0, size

    def load(self, *params: Param) -> Tensor:
        shapes = [loaded_shape(param.bounds(self.extent), param.stacked is not None) for param in params]
        dtype = torch.float32 if any(param.exact for param in params) else self._dtype
        return torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=dtype, device=META)

    def table(self, param: Param, is_multiplied: bool) -> Tensor:
        return self.load(param)

    def linear(self, *params: Param) -> Linear:
        return DenseLinear(self.load(*params))


def decode_attention(config: ModelConfig, rows: int) -> Attention:
    """The attention of a rank on its own in a decode step of `rows` rows, as it is when a CUDA graph is recorded."""
    layout = KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, 2, config.kv_factor)
    pool = KVPool(layout, range(config.num_layers), 8, 16, torch.bfloat16, META)
    block = (HeadBlock(0, config.num_q_heads, 0, config.num_kv_heads),)
    ops = AttentionOps(
        TritonBackend(META, config.cached_value_dim, processors=132), Heads(block, block, (block,)),
        config.attention_scale, config.cached_value_dim, ExpansionCost(),
    )  # fmt: skip
    alone = ThreadedCollectives(ThreadFabric(1), (0,), 0, Traffic())
    attention = Attention(pool, ops, ContextGroup(alone, ((0,),), ((0,),), 1024), config.layer_groups)
    step = RefillableStep(attention.preparer, ops.backend, StepSize(rows, None, 1), pool.slots, StepBuffer(META))
    attention.begin(step.prepared)
    return attention
