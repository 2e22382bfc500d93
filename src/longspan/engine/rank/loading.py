"""Load a rank's slices of a checkpoint, as the tensors that its model asks for.

It owns the mapping from logical axes to slices, and the sharing of tensors between ranks of one process; it must not
know file formats or architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from longspan.compiled.blocks import QuantisedBlocks, joined
from longspan.compiled.mxfp4 import BLOCK as PACKED_BLOCK
from longspan.config.products import COMPILED_FORMS
from longspan.engine.rank.scaled_weights import ScaledWeights
from longspan.engine.rank.upload import CudaCopying, Upload
from longspan.engine.setup import EngineSetup
from longspan.models.blocks import BlockLinear
from longspan.models.context import Linear, LinearStack
from longspan.models.layers import DenseLinear, PanelLinear, TableLinear, can_pack
from longspan.models.ops.base import Table
from longspan.models.packed import PackedLinear
from longspan.models.params import Bounds, Param, loaded_shape
from longspan.models.quantised import linear_in_form
from longspan.models.scaled import BLOCK, BlockScaled, BlockScaledLinear
from longspan.parallel.sharding import Sharding
from longspan.weights.checkpoint import BlockCheckpoint, Checkpoint
from longspan.weights.mxfp4 import Mxfp4Checkpoint

T = TypeVar("T")
_Key = tuple["WeightPiece", ...]


class WeightPiece(NamedTuple):
    """A slice of one tensor of the checkpoint."""

    # the tensor's name
    name: str
    # (start, stop) of each dimension
    bounds: Bounds
    # whether the tensor stacks several weights [n, in, out], of which the slice is one, loaded as [out, in]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The slice's shape once it is loaded."""
        return loaded_shape(self.bounds, self.stacked)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The slice of each dimension."""
        return tuple(slice(start, stop) for start, stop in self.bounds)

    @property
    def is_whole_blocks(self) -> bool:
        """Whether the slice begins and ends at boundaries of FP8 scale blocks."""
        return not self.stacked and all(bound % BLOCK == 0 for bounds in self.bounds for bound in bounds)

    @property
    def has_whole_blocks_of_inputs(self) -> bool:
        """Whether the slice of a stacked tensor has inputs that begin and end between blocks of MXFP4."""
        return self.stacked and len(self.bounds) == 3 and all(bound % PACKED_BLOCK == 0 for bound in self.bounds[1])

    def is_in_blocks_of(self, width: int | None) -> bool:
        """Whether the slice is a matrix whose columns begin and end between blocks of `width`, if there are any."""
        return width is not None and not self.stacked and all(bound % width == 0 for bound in self.bounds[-1])

    def rows(self, start: int, stop: int) -> WeightPiece:
        """The part of the slice that is loaded as its rows [start, stop)."""
        dim = len(self.bounds) - 1 if self.stacked else 0
        first = self.bounds[dim][0]
        narrowed = (*self.bounds[:dim], (first + start, first + stop), *self.bounds[dim + 1 :])
        return self._replace(bounds=narrowed)

    def read(self, checkpoint: Checkpoint, out: Tensor) -> None:
        """Read the slice into `out`, of shape `shape` and any dtype. Raises `WeightError`."""
        target = out.permute(*reversed(range(out.dim())))[None] if self.stacked else out
        checkpoint.read(self.name, self.slices, target)


class TensorStore:
    """Loaded tensors by name and slice. Ranks of one process that need the same slice share one tensor.

    One tensor is loaded at a time, which bounds the memory that conversion takes. Weights that `scaled` holds in FP8
    are kept in FP8 if their slice is made of whole blocks, and stacked weights that `packed` holds are kept in MXFP4.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device = torch.device("cpu"),
        scaled: ScaledWeights | None = None, form: str = "plain", packed: Mxfp4Checkpoint | None = None,
    ) -> None:  # fmt: skip
        self.device = device
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._scaled = scaled
        self._packed = packed
        self._form = form
        self._blocks = checkpoint if form == "blocks" and isinstance(checkpoint, BlockCheckpoint) else None
        self._upload = Upload(CudaCopying()) if device.type == "cuda" else None
        self.drafts: TensorStore | None = None  # of a checkpoint of its own that drafts
        self.on_read: Callable[[], None] = _nothing  # called after each slice, for a progress bar
        self._tensors: dict[_Key, Tensor] = {}
        self._linears: dict[_Key, Linear] = {}
        self._stacks: dict[_Key, LinearStack] = {}
        self._lock = Lock()

    @classmethod
    def of(cls, setup: EngineSetup, device: torch.device) -> TensorStore:
        """The store of a resolved configuration."""
        form = setup.config.products.form if setup.config.products else "plain"
        found = cls(setup.source.checkpoint, setup.dtype, device, setup.scaled.weights, form, setup.scaled.packed)
        if setup.drafts:
            found.drafts = cls(setup.drafts.checkpoint.source.checkpoint, setup.dtype, device, None, form)
        return found

    def tensor(self, pieces: Sequence[WeightPiece], exact: bool = False) -> Tensor:
        """The slices concatenated along dimension 0, [rows, ...], in fp32 if `exact`, else in the model's dtype."""
        dtype = torch.float32 if exact else self._dtype
        with self._lock:
            return _once(self._tensors, pieces, lambda wanted: self._read(wanted, dtype))

    def linear(self, pieces: Sequence[WeightPiece], is_whole: bool = False) -> Linear:
        """A linear layer whose weight [out, in] is the slices concatenated along dimension 0.

        The layer may pack the weight; the plain tensor is then not kept. `is_whole`: see `linear_in_form`.
        """
        with self._lock:
            return _once(self._linears, pieces, partial(self._linear, is_whole=is_whole))

    def table_linear(self, pieces: Sequence[WeightPiece]) -> Linear:
        """The product with a table of the vocabulary, which is the tensor that `tensor` returns in the plain form."""
        if self._form == "plain":
            return TableLinear(self.tensor(pieces))
        return self.linear(pieces)

    def table(self, pieces: Sequence[WeightPiece], is_multiplied: bool) -> Table:
        """See `Loader.table`: the panels of the product if there are any, else the tensor."""
        in_panels = (is_multiplied and self._form in COMPILED_FORMS) or self._keeps_blocks(pieces)
        product = self.table_linear(pieces) if in_panels else None
        return product.panels if isinstance(product, PanelLinear | BlockLinear) else self.tensor(pieces)

    def linear_stack(self, entries: Sequence[Sequence[WeightPiece]], is_whole: bool = False) -> LinearStack:
        """The linear layers of several weights of one shape, each as in `linear`.

        They are read one by one into one tensor, in the form in which they are kept, unless the layers pack them.
        """
        pieces = [piece for entry in entries for piece in entry]
        with self._lock:
            return _once(self._stacks, pieces, lambda _: self._stack(entries, is_whole))

    def _stack(self, entries: Sequence[Sequence[WeightPiece]], is_whole: bool) -> LinearStack:
        if self._scaled and entries and all(self._keeps_scaled(entry) for entry in entries):
            return self._scaled_stack(self._scaled, entries)
        if self._packed and entries and all(self._keeps_packed(entry) for entry in entries):
            return self._packed_stack(self._packed, [piece for entry in entries for piece in entry])
        one = torch.empty(0, dtype=self._dtype, device=self.device)
        packs = self._form != "plain" or can_pack(one)
        if not entries or packs or any(self._keeps_scaled(entry) for entry in entries):
            return LinearStack(tuple(self._linear(entry, is_whole) for entry in entries))
        rows = sum(piece.shape[0] for piece in entries[0])
        weight = one.new_empty(len(entries), rows, *entries[0][0].shape[1:])
        for entry, out in zip(entries, weight, strict=True):
            self._fill(out, entry)
        return LinearStack(tuple(DenseLinear(each, pack=False) for each in weight), weight)

    def _scaled_stack(self, kept: ScaledWeights, entries: Sequence[Sequence[WeightPiece]]) -> LinearStack:
        rows, columns = sum(piece.shape[0] for piece in entries[0]), entries[0][0].shape[1]
        values = torch.empty(len(entries), rows, columns, dtype=torch.float8_e4m3fn, device=self.device)
        scales = torch.empty(len(entries), rows // BLOCK, columns // BLOCK, device=self.device)
        stacked = [BlockScaled(*each) for each in zip(values, scales, strict=True)]
        for entry, out in zip(entries, stacked, strict=True):
            for part, found in zip(out, self._read_scaled(kept, entry), strict=True):
                part.copy_(found)
        return LinearStack(tuple(BlockScaledLinear(each, kept.fused) for each in stacked), values, scales)

    def _packed_stack(self, kept: Mxfp4Checkpoint, pieces: Sequence[WeightPiece]) -> LinearStack:
        """The stack of weights that are one slice each."""
        rows, columns = pieces[0].shape
        sizes = (len(pieces), rows, columns // 2), (len(pieces), rows, columns // PACKED_BLOCK)
        values, scales = (torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes)
        pinned = self.device.type == "cuda"
        for piece, *out in zip(pieces, values, scales, strict=True):
            read = [torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned) for part in out]
            kept.read_packed(piece.name, piece.slices, *read)
            for part, found in zip(out, read, strict=True):  # the allocator keeps page-locked memory until it is copied
                part.copy_(found, non_blocking=pinned)
            self.on_read()
        return LinearStack(tuple(map(PackedLinear, values, scales)), values, scales)

    def _linear(self, pieces: Sequence[WeightPiece], is_whole: bool = False) -> Linear:
        if self._scaled and self._keeps_scaled(pieces):
            return BlockScaledLinear(self._read_scaled(self._scaled, pieces), self._scaled.fused)
        if self._blocks and self._keeps_blocks(pieces):
            return BlockLinear(joined([self._read_blocks(self._blocks, piece) for piece in pieces]))
        weight = self._read(pieces, self._dtype)
        form = "panels" if self._form == "blocks" else self._form  # a weight that is not in blocks is not rounded
        return linear_in_form(weight, form, is_whole=is_whole)

    def _keeps_scaled(self, pieces: Sequence[WeightPiece]) -> bool:
        """Whether the weight stays in FP8."""
        kept = self._scaled
        return kept is not None and all(
            piece.is_whole_blocks and kept.checkpoint.has_scales(piece.name) for piece in pieces
        )

    def _keeps_packed(self, pieces: Sequence[WeightPiece]) -> bool:
        """Whether the weight of a stack stays in MXFP4."""
        kept = self._packed
        return (
            kept is not None
            and len(pieces) == 1
            and (kept.is_packed(pieces[0].name) and pieces[0].has_whole_blocks_of_inputs)
        )

    def _keeps_blocks(self, pieces: Sequence[WeightPiece]) -> bool:
        """Whether the weight stays in the blocks of its file."""
        kept = self._blocks
        return kept is not None and all(piece.is_in_blocks_of(kept.block_width(piece.name)) for piece in pieces)

    def _read_blocks(self, kept: BlockCheckpoint, piece: WeightPiece) -> QuantisedBlocks:
        found = kept.read_blocks(piece.name, piece.slices)
        self.on_read()
        return found

    def _read(self, pieces: Sequence[WeightPiece], dtype: torch.dtype) -> Tensor:
        rows = sum(piece.shape[0] for piece in pieces)
        whole = torch.empty(rows, *pieces[0].shape[1:], dtype=dtype, device=self.device)
        self._fill(whole, pieces)
        return whole

    def _fill(self, whole: Tensor, pieces: Sequence[WeightPiece]) -> None:
        """Read slices into `whole`, one after the other along dimension 0."""
        rows = [piece.shape[0] for piece in pieces]
        for piece, out in zip(pieces, torch.split(whole, rows), strict=True):
            if self._upload is None:
                piece.read(self._checkpoint, out)
            else:
                self._upload.fill(out, partial(self._read_rows, piece))
            self.on_read()

    def _read_rows(self, piece: WeightPiece, start: int, stop: int, out: Tensor) -> None:
        piece.rows(start, stop).read(self._checkpoint, out)

    def _read_scaled(self, kept: ScaledWeights, pieces: Sequence[WeightPiece]) -> BlockScaled:
        rows, columns = [piece.shape[0] for piece in pieces], pieces[0].shape[1]
        pinned = self.device.type == "cuda"
        values = torch.empty(sum(rows), columns, dtype=torch.float8_e4m3fn, pin_memory=pinned)
        scales = torch.empty(sum(rows) // BLOCK, columns // BLOCK, pin_memory=pinned)
        blocks = torch.split(scales, [count // BLOCK for count in rows])
        for piece, part, part_scales in zip(pieces, torch.split(values, rows), blocks, strict=True):
            kept.checkpoint.read_scaled(piece.name, piece.slices, part, part_scales)
            self.on_read()
        # the allocator keeps page-locked memory until the copy is done
        return BlockScaled(values.to(self.device, non_blocking=pinned), scales.to(self.device, non_blocking=pinned))


def _nothing() -> None:
    pass


def _once(made: dict[_Key, T], pieces: Sequence[WeightPiece], make: Callable[[Sequence[WeightPiece]], T]) -> T:
    key = tuple(pieces)
    if key not in made:
        made[key] = make(pieces)
    return made[key]


class RankLoader:
    """The loader that a model is built with: it returns this rank's part of each parameter."""

    def __init__(self, store: TensorStore, sharding: Sharding) -> None:
        self._store = store
        self._sharding = sharding

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self._store.device

    def extent(self, axis: str, size: int) -> tuple[int, int]:
        """(start, stop) of this rank's part of a logical axis."""
        return self._sharding.extent(axis, size)

    def load(self, *params: Param) -> Tensor:
        """This rank's slice of each parameter, concatenated along dimension 0: [rows, ...]."""
        exact = any(param.exact for param in params)
        return self._store.tensor([self._piece(param) for param in params], exact)

    def table(self, param: Param, is_multiplied: bool) -> Table:
        """This rank's part of a table of the vocabulary: see `Loader.table`."""
        return self._store.table([self._piece(param)], is_multiplied)

    def linear(self, *params: Param) -> Linear:
        """A linear layer whose weight is this rank's slice of each parameter, concatenated along dimension 0."""
        pieces = [self._piece(param) for param in params]
        if params[0].axes[0] == "vocab":
            return self._store.table_linear(pieces)
        return self._store.linear(pieces, all(param.has_whole_inputs for param in params))

    def linear_stack(self, *entries: Sequence[Param]) -> LinearStack:
        """The linear layers whose weights are this rank's slices of each entry's parameters."""
        pieces = [[self._piece(param) for param in entry] for entry in entries]
        is_whole = all(param.has_whole_inputs for entry in entries for param in entry)
        return self._store.linear_stack(pieces, is_whole)

    def _piece(self, param: Param) -> WeightPiece:
        return WeightPiece(param.name, param.bounds(self.extent), param.stacked is not None)
