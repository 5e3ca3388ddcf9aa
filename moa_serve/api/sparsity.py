"""SparsityPressure: by how much the thresholds of a request are raised, so that fewer experts are computed for it while others wait.

The longer the queue, the higher the factor, up to what the operator allows, in few steps: each factor is an identity of keys and values of
its own, which finds nothing in the prefix cache that another one left, and a run of its own in a batch. A request keeps what it got when it
was admitted. What an option of the request sets is not touched (`rules.yields`). Belongs to the event loop.
"""

from collections.abc import Mapping

LEVELS = 4
REST = "other"  # adapters without a factor of their own, as metrics call them


class SparsityPressure:
    """
    Args:
        most: the highest factor; 1 raises nothing.
        of_adapters: the highest factor of adapters that have their own.
        first_waiting: rows that wait when the first of the steps is taken.
        max_waiting: rows that may wait; the last step is taken when they do. The others lie between, equally far apart.
    """

    def __init__(self, most: float, of_adapters: Mapping[str, float], *, first_waiting: int, max_waiting: int) -> None:
        self._most = {**of_adapters, REST: most}
        apart = (max_waiting - first_waiting) / (LEVELS - 1)
        self._begins = [0.0, *(first_waiting + step * apart for step in range(LEVELS))]
        # A step is left half way to the one below: a queue that wavers around its beginning must not change identities all the time.
        self._ends = [0.0, *((below + begin) / 2 for below, begin in zip(self._begins, self._begins[1:], strict=False))]
        self._level = 0

    def admit(self, num_waiting: int) -> int:
        """The level of a request that is being admitted while so many rows wait, its own among them: 0 to LEVELS."""
        self._level = self._next(num_waiting)
        return self._level

    def scale(self, adapter: str, level: int) -> float:
        """The factor of an adapter, by name: 1 at level 0, its highest at the last."""
        most = self._most.get(adapter, self._most[REST])
        return most if level == LEVELS else min(most, round(1 + (most - 1) * level / LEVELS, 4))

    def shown(self, num_waiting: int) -> dict[str, float]:
        """Factors of a request that is admitted next, by adapter, the rest as REST; empty where none is ever raised."""
        if max(self._most.values()) == 1:
            return {}
        level = self._next(num_waiting)
        return {name: self.scale(name, level) for name in self._most}

    def _next(self, num_waiting: int) -> int:
        level = self._level
        while level and num_waiting < self._ends[level]:
            level -= 1
        while level < LEVELS and num_waiting >= self._begins[level + 1]:
            level += 1
        return level
