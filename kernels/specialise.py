"""The types of a launch of the attention kernels, for their `variants()`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

#: Strides of these tensors are multiples of 16 elements at the widths that models have.
_ALIGNED = ("query_", "key_", "value_", "out_", "mean_")


def specialised(
    names: Sequence[str], pointers: Mapping[str, str], constants: Collection[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """(signature, aligned) as `Variant` takes them: pointers as given, inner and unit floats, all others integers."""
    floats = {"inner": "fp32", "unit": "fp32"}
    types = dict.fromkeys(constants, "constexpr")
    signature = {name: {**floats, **pointers, **types}.get(name, "i32") for name in names}
    aligned = [n for n in names if n not in constants and (n in pointers or n.startswith(_ALIGNED))]
    return signature, tuple(aligned)
