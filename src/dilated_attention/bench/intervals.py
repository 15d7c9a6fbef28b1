"""A confidence interval for the ratio of two times that were measured in turns. Needs no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

import attrs

# Of the log ratios, so many at either end are cut: pairs in which other work slowed one of the two.
TRIMMED: Final = 0.2
CONFIDENCE: Final = 0.99


@attrs.frozen
class Interval:
    """A ratio and where it lies with `CONFIDENCE`."""

    ratio: float
    low: float
    high: float

    def verdict(self, threshold: float) -> str:
        """Beyond the threshold "slower", beyond its inverse "faster", within both "equal"; else "undecided"."""
        if self.low > threshold:
            return "slower"
        if self.high < 1 / threshold:
            return "faster"
        if self.high < threshold and self.low > 1 / threshold:
            return "equal"
        return "undecided"


def ratio_interval(old: Sequence[float], new: Sequence[float]) -> Interval:
    """new / old from times of the same rounds: Yuen's t interval of the trimmed mean of the paired log ratios.

    K. K. Yuen, "The two-sample trimmed t for unequal population variances", Biometrika 61 (1974); one sample here.
    """
    logs = sorted(math.log(n / o) for o, n in zip(old, new, strict=True))
    cut = int(TRIMMED * len(logs))
    kept = logs[cut : len(logs) - cut]
    mean = statistics.fmean(kept)
    winsorised = [*([kept[0]] * cut), *kept, *([kept[-1]] * cut)]
    error = statistics.stdev(winsorised) / ((1 - 2 * cut / len(logs)) * math.sqrt(len(logs)))
    half = student_quantile(0.5 + CONFIDENCE / 2, len(kept) - 1) * error
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def student_quantile(probability: float, freedom: int) -> float:
    """Student's t, from the normal quantile by Cornish and Fisher's expansion; to 1 % from five degrees on."""
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))
