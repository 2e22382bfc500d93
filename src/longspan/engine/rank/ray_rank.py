"""A rank as a Ray actor.

It owns nothing but the call; it must not know where the actor runs.
"""

from __future__ import annotations

from longspan.engine.rank.serving import serve_driver


class RankActor:
    """Serves the driver in one call that lasts as long as the rank: its end tells of the rank's."""

    def serve(self, address: str, rank: int, world_size: int) -> None:
        """See `serve_driver`; Ray shows the actor one GPU, so its number is 0."""
        serve_driver(address, rank, world_size)
