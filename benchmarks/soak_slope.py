"""How fast a number grows over time, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCKS = 10
STUDENT = 2.306  # the 97.5% quantile of Student's t with BLOCKS - 2 degrees of freedom


@dataclass(frozen=True)
class Slope:
    """Growth a minute, and the ends of its 95% confidence interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float], values: Sequence[float]) -> Slope:
        """A line through the means of BLOCKS stretches of samples, by least squares.

        Samples that follow each other are alike, which would make the interval too narrow; means of stretches are less
        so. Raises ValueError for fewer than BLOCKS samples.
        """
        if len(seconds) < BLOCKS:
            raise ValueError(f"a slope takes {BLOCKS} samples or more, got {len(seconds)}: run for longer")
        x = np.array([part.mean() for part in np.array_split(np.asarray(seconds, float) / 60, BLOCKS)])
        y = np.array([part.mean() for part in np.array_split(np.asarray(values, float), BLOCKS)])
        apart = x - x.mean()
        slope = float(apart @ y / (apart @ apart))
        left = y - y.mean() - slope * apart
        error = STUDENT * float(np.sqrt(left @ left / (BLOCKS - 2) / (apart @ apart)))
        return cls(slope, slope - error, slope + error)
