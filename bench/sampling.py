"""Samples, what is made of them, and waiting for what a sample ends with."""

from __future__ import annotations

import math
import os
import select
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Samples = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. measured are the numbers shown, by who was measured; judged is what counts.

    limit_unit is the limit's, if it has another one than the numbers.
    """

    figure: str
    unit: str
    measured: Mapping[str, float]
    judged: float
    limit: float
    judged_as: str = "lumed"
    samples: Samples = field(default_factory=dict)
    limit_unit: str | None = None

    @property
    def met(self) -> bool:
        """Whether the target was met."""
        return self.judged <= self.limit


def median_row(
    figure: str, samples: Samples, limit: float, *, unit: str = "ms", less: str | None = None
) -> Row:
    """A row of medians; what counts is lumed's, or how much it exceeds that of `less`."""
    medians = {who: statistics.median(values) for who, values in samples.items() if values}
    judged = medians["lumed"] - (medians[less] if less else 0)
    words = f"lumed - {less}" if less else "lumed"
    return Row(figure, unit, medians, judged, limit, words, samples)


def ratio_row(
    figure: str, samples: Samples, of: str, limit: float, *, also: str | None = None
) -> Row:
    """A row of medians in seconds; what counts is lumed's as a part of that of `of`.

    also is shown beside the two.
    """
    kept = {who: samples[who] for who in ("lumed", of, also) if who is not None}
    medians = {who: statistics.median(values) / 1000 for who, values in kept.items()}
    ratio = medians["lumed"] / medians[of]
    return Row(figure, "s", medians, ratio, limit, "lumed / the first", kept, limit_unit="")


def percentile_row(figure: str, samples: Samples, percent: float, limit: float) -> Row:
    """A row of percentiles, in milliseconds."""
    values = {who: percentile(found, percent) for who, found in samples.items()}
    return Row(figure, "ms", values, values["lumed"], limit)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def ms_since(start: float) -> float:
    """Milliseconds since a time.perf_counter()."""
    return (time.perf_counter() - start) * 1000


def wait_for_bytes(file: Path, timeout_s: float = 30) -> None:
    """Return, within a millisecond, when the file holds something."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if os.stat(file).st_size:  # noqa: PTH116 - half the cost of Path.stat
                return
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing was written to {file} within {timeout_s:g} s")
        time.sleep(0.0005)


def wait_for_end(pid: int, timeout_s: float = 10) -> None:
    """Wait until a process (a child or not) has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([fd], [], [], timeout_s)[0]:
            raise TimeoutError(f"process {pid} did not end within {timeout_s:g} s")
    finally:
        os.close(fd)
