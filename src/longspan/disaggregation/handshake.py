"""What two instances compare before pages of one can be stored by the other, and which part of a page each rank stores.

It owns the fingerprints and the comparison; it must not know how messages are sent.
"""

from __future__ import annotations

from hashlib import blake2b

import msgspec
import torch

from longspan.disaggregation.instance import InstanceSetup
from longspan.disaggregation.messages import Format
from longspan.parallel.sharding import Sharding
from longspan.plan.source import Part
from longspan.weights.checkpoint import Checkpoint

PROTOCOL = 4
"""Version of `messages.py`: instances of different versions refuse each other."""

_SAMPLED_TENSORS = 64
_SAMPLED_ELEMENTS = 64
_NAMES = {
    "protocol": "protocol (another version of Longspan)",
    "model": "model configuration",
    "weights": "weights (another model or revision)",
    "dtype": "dtype",
    "kv_cache_dtype": "kv_cache_dtype",
    "kv_factor": "rows of a token in the cache",
    "row_bytes": "bytes of a cache row",
}


def format_of(setup: InstanceSetup) -> Format:
    """The format of an instance's pages.

    It includes a digest of a few weights, which are read here, so that two revisions of a model have different formats.
    """
    model = blake2b(repr(setup.model).encode(), digest_size=8).hexdigest()
    return Format(
        PROTOCOL, model, _weights_digest(setup.source.checkpoint), str(setup.dtype),
        setup.config.cache.dtype, setup.layout.kv_factor, setup.layout.row_bytes,
    )  # fmt: skip


def difference(decode: Format, prefill: Format) -> str | None:
    """The first difference between two formats, with a remedy; None if they are equal."""
    ours, theirs = msgspec.structs.asdict(decode), msgspec.structs.asdict(prefill)
    for field, name in _NAMES.items():
        if ours[field] != theirs[field]:
            return (
                f"{name}: the decode instance has {ours[field]}, the prefill instance {theirs[field]}; "
                "start both with the same model, --dtype and --kv-cache-dtype"
            )
    return None


def parts_of(setup: InstanceSetup) -> tuple[Part, ...]:
    """What each rank stores, in rank order."""
    grid, model = setup.grid, setup.model
    found: list[Part] = []
    for place in grid.ranks:
        sharding = Sharding(grid, place.rank, model.num_q_heads, model.num_kv_heads)
        layers = model.cached_layers(*sharding.extent("layers", model.num_layers))
        found.append(Part(place.rank, place.shard, layers, sharding.kv_extent))
    return tuple(found)


def _weights_digest(checkpoint: Checkpoint) -> str:
    """A digest of all names and shapes, and of a few elements of a few tensors.

    That is enough, because revisions of a model differ in most elements of most tensors.
    """
    names = sorted(checkpoint.names())
    digest = blake2b(digest_size=8)
    for name in names:
        digest.update(f"{name}{checkpoint.shape(name)}".encode())
    for name in names[:: max(1, len(names) // _SAMPLED_TENSORS)]:
        shape = checkpoint.shape(name)
        sizes = [1] * len(shape[:-1]) + [min(_SAMPLED_ELEMENTS, size) for size in shape[-1:]]
        sample = torch.empty(sizes)
        checkpoint.read(name, tuple(slice(0, size) for size in sizes), sample)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
