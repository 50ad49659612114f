"""Sizes in bytes and counts of tokens as people write them."""

from __future__ import annotations

import re

SIZE_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}


def parse_size(size: int | str) -> int:
    """Bytes of "80GB" or "79.6 GiB" (an int is bytes already): GB is 10^9, GiB 2^30; letter case does not matter.

    GPUs are sold by names such as "80GB"; such a card shows about 79 GiB, 5% more than "80GB" is here, which leaves
    room for the driver. Raises ValueError for anything else, or less than 0.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    units = {unit.lower(): factor for unit, factor in SIZE_UNITS.items()}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", size.strip().lower()) if isinstance(size, str) else None
    if match is None or match[2] not in units:
        known = ", ".join(SIZE_UNITS)
        raise ValueError(f"cannot read {size!r} as a size: expected a number and a unit ({known}), such as 80GB")
    return int(float(match[1]) * units[match[2]])


def parse_count(count: int | str) -> int:
    """Tokens of "128k" or "1M" (an int is tokens already): k is 1024 and M is 1024^2, as context lengths are given.

    Raises ValueError for anything else, or less than 1.
    """
    text = str(count).strip().lower() if isinstance(count, int | str) else ""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([km]?)", text)
    tokens = float(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2]] if match else 0
    if tokens < 1 or tokens != int(tokens):
        raise ValueError(f"cannot read {count!r} as a number of tokens: expected 1 or more, such as 131072, 128k or 1M")
    return int(tokens)
