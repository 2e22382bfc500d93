"""How many drafts of a request are worth computing: fewer where few prove right, and in large batches.

It owns the rule and what it remembers of a request. It depends on counts only, never on time, so that runs repeat.
"""

from __future__ import annotations

_WINDOW = 32  # first drafts after which all counts are halved, so that old ones weigh less
_PROBE = 16  # where nothing is worth drafting, one draft is tried every so many steps


class DraftLength:
    """How many drafts of one request are worth computing, from how many proved right so far."""

    def __init__(self) -> None:
        # by position, drafts that were computed behind right ones only, and those of them that were right
        self._reached: list[float] = []
        self._right: list[float] = []
        self._steps_without = 0

    def add(self, drafted: int, accepted: int) -> None:
        """Count a step that computed so many drafts, of which the first `accepted` were right."""
        missing = drafted - len(self._reached)
        self._reached += [0.0] * missing
        self._right += [0.0] * missing
        if drafted and self._reached[0] >= _WINDOW:
            self._reached = [count / 2 for count in self._reached]
            self._right = [count / 2 for count in self._right]
        for position in range(min(accepted + 1, drafted)):
            self._reached[position] += 1
            self._right[position] += position < accepted

    def choose(self, most: int, rows: int, fixed_rows: int) -> int:
        """The number of drafts, up to `most`, in a step in which `rows` requests decode.

        It maximises goodput, the tokens accepted in the time of a step (Liu et al. 2024, "Optimizing Speculative
        Decoding for Serving Large Language Models Using Goodput"), as if all these requests were like this one. A step
        takes as long as `fixed_rows` rows, for reading the weights and for launches, and one more for each row. With
        p[i] the chance that draft i is right if all before it are, and n requests, k drafts give
        n · (1 + p[1] + p[1]·p[2] + ...) tokens in the time of fixed_rows + n · (1 + k) rows. The chances fall with i,
        so the first k with a draft that is worth less than the mean is the best one.

        p[i] is the share of right ones at the position, with one more observation that is p[i - 1]; p[0] is 1. So a
        request begins with all drafts. If nothing is worth drafting, one draft is tried every few steps.
        """
        tokens, chance, likely = 1.0, 1.0, 1.0
        for count in range(most):
            reached, right = (self._reached[count], self._right[count]) if count < len(self._reached) else (0.0, 0.0)
            likely = (right + likely) / (reached + 1)
            chance *= likely
            if chance * (fixed_rows / rows + 1 + count) <= tokens:
                return count if count else self._try_again()
            tokens += chance
        self._steps_without = 0
        return most

    def _try_again(self) -> int:
        """1 every few steps, else 0."""
        self._steps_without = (self._steps_without + 1) % _PROBE
        return 0 if self._steps_without else 1
