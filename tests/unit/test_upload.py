"""Weights on their way to a GPU: blocks through a few buffers, none of which is written while it is copied."""

from __future__ import annotations

import pytest
import torch

from longspan.config import ParallelConfig
from longspan.engine.rank.loading import RankLoader, TensorStore
from longspan.engine.rank.upload import Upload
from longspan.errors import WeightError
from longspan.models.params import Param
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import Sharding
from longspan.weights.checkpoint import NoWeights


class Late:
    """Copies only when somebody waits: what was overwritten before that arrives wrong."""

    def __init__(self):
        self.buffers = 0
        self.pending = []

    def buffer(self, size):
        self.buffers += 1
        return torch.empty(size, dtype=torch.uint8)

    def start(self, target, block):
        def arrived():
            if copy in self.pending:
                self.pending.remove(copy)
                target.copy_(block)

        copy = (id(target), arrived)
        self.pending.append(copy)
        return arrived

    def finish(self):
        for _, arrived in list(self.pending):
            arrived()


def rows_of(source):
    """What an upload reads from."""

    def write(start, stop, out):
        out.copy_(source[start:stop])

    return write


class Numbers(NoWeights):
    """A checkpoint whose tensors count their elements."""

    whole = torch.arange(6 * 10 * 4, dtype=torch.float32).view(6, 10, 4)

    def read(self, name, index, out):
        out.copy_((self.whole if name == "stacked" else self.whole.view(60, 4))[index])


@pytest.mark.parametrize("rows", [1, 2, 9, 10, 11, 100])
@pytest.mark.parametrize("size", [16, 40, 64])
def test_every_row_arrives_whatever_the_sizes_and_however_late_copies_end(rows, size):
    """Rows have 16 bytes; a buffer of 40 bytes holds two."""
    late = Late()
    upload = Upload(late, buffers=2, size=size)
    for factor in (1, 2):
        source = factor * torch.arange(rows * 4, dtype=torch.int32).view(rows, 4)
        target = torch.full_like(source, -1)
        upload.fill(target, rows_of(source))
        late.finish()
        assert torch.equal(target, source)
    assert late.buffers == 2


def test_a_row_larger_than_a_buffer_gets_larger_buffers():
    source, late = torch.rand(3, 100), Late()
    target = torch.zeros_like(source)
    Upload(late, buffers=2, size=16).fill(target, rows_of(source))
    late.finish()
    assert torch.equal(target, source)


def test_an_error_of_a_thread_that_reads_is_raised():
    def damaged(start, stop, out):
        raise WeightError("damaged")

    with pytest.raises(WeightError, match="damaged"):
        Upload(Late(), size=16).fill(torch.zeros(9, 4), damaged)


@pytest.mark.parametrize("name", ["plain", "stacked"])
def test_a_tensor_that_is_read_in_blocks_equals_one_that_is_read_at_once(name):
    stacked, plain = Param(name, (6, 10, 4), (None, None, "ffn"), stacked=3), Param(name, (60, 4), ("ffn", None))
    param = stacked if name == "stacked" else plain
    sharding = Sharding(Grid(ParallelConfig(2)), 1, 2, 2)
    first, second, late = TensorStore(Numbers(), torch.float32), TensorStore(Numbers(), torch.float32), Late()
    second._upload = Upload(late, buffers=2, size=32)
    expected, blocked = (RankLoader(store, sharding).load(param, param) for store in (first, second))
    late.finish()
    assert torch.equal(blocked, expected)
    assert expected.shape == ((4, 10) if name == "stacked" else (60, 4))
