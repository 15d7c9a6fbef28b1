"""How a pattern repeats itself along the sequence. Needs no torch and no numpy."""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs


@attrs.frozen
class Repeats:
    """What `Pattern.repeats` says, for all heads and before causality.

    A query at p, from `start` on, counts a key at q below `fixed` as a query at p + `period` does. Of all others it
    counts only those from p - `left` to p + `right`, and them as one at p + `period` counts the key at q + `period`.
    """

    fixed: int
    start: int
    period: int
    left: int
    right: int

    @classmethod
    def of_all(cls, members: Iterable[Repeats | None]) -> Repeats | None:
        """That of a pattern made of several; None where one does not repeat itself.

        What one counts at the fixed keys of another moves with its queries, so it must be out of their reach.
        """
        known = list(members)
        found = [member for member in known if member is not None]
        if len(found) < len(known):
            return None
        fixed = max(member.fixed for member in found)
        return cls(
            fixed=fixed,
            start=max(max(member.start, fixed + member.left if member.fixed < fixed else 0) for member in found),
            period=math.lcm(*(member.period for member in found)),
            left=max(member.left for member in found),
            right=max(member.right for member in found),
        )
