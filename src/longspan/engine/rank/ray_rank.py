"""A rank that is a Ray actor.

It owns the actor's one method; it must not know where the actor runs.
"""

from __future__ import annotations

from longspan.engine.rank.serving import serve_driver


class RankActor:
    """An actor whose one call lasts as long as the rank, so that the end of the call shows the end of the rank."""

    def serve(self, address: str, rank: int, world_size: int) -> None:
        """See `serve_driver`. Ray makes one GPU visible to the actor, so its number is 0."""
        serve_driver(address, rank, world_size)
