"""The planes that rotary position embeddings turn, read off what models' code does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from families import COMMON, FAMILIES, build
from torch import Tensor

from kvcompress.planes import Planes, planes_of
from kvcompress.rope import Rope

#: Families whose keys are rotated as they are; those of deepseek_v3 are of a latent.
ROTATED = sorted(set(FAMILIES) - {"gpt2", "deepseek_v3"})
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
#: The factor by which YaRN grows cosines and sines: 0.1 ln(32) + 1.
GROWN = 1.3465735902799727


def rope_of(config: transformers.PreTrainedConfig) -> Rope:
    config = config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = Rope.of(config, width)
    assert rope is not None
    return rope


def named(name: str, **fields: Any) -> transformers.PreTrainedConfig:
    return getattr(transformers, f"{name}Config")(**{**COMMON, **fields})


def pairs(planes: Planes) -> list[tuple[int, int]]:
    """(first, second) dimension of every plane that turns."""
    first, second = planes.order.tolist()[: len(planes.order) // 2], planes.order.tolist()[len(planes.order) // 2 :]
    turning = zip(first, second, planes.frequencies.tolist(), strict=True)
    return sorted((a, b) for a, b, frequency in turning if frequency)


def same_turns(planes: Planes, rotation: Any, width: int) -> None:
    """The angles are the very products that models form, so what is left is rounding of cosines, sines and two products
    of numbers up to 4: 2^-21 each.
    """
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(2, 3, 8, width, generator=generator)
    positions = torch.randint(0, 1 << 20, (2, 8), generator=generator)
    assert (planes.apply(key, positions) - rotation.apply(key, positions)).abs().max() < 4e-6


@pytest.mark.parametrize("family", ROTATED)
def test_of_families(family: str) -> None:
    rope = rope_of(build(family).config)
    planes = rope.planes
    assert planes is not None
    width = len(planes.order)
    assert sorted(planes.order.tolist()) == list(range(width))
    assert (planes.order.dtype, planes.frequencies.dtype, planes.amplitudes.dtype) == (
        torch.int32,
        torch.float32,
        torch.float32,
    )
    assert planes.frequencies.shape == planes.amplitudes.shape == (width // 2,)
    same_turns(planes, rope, width)


def test_halves() -> None:
    planes = rope_of(named("Llama")).planes
    assert planes is not None
    assert planes.order.tolist() == list(range(16))
    assert torch.equal(planes.frequencies, 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16))
    assert planes.amplitudes.eq(1).all()


@pytest.mark.parametrize(("name", "turning"), [("Cohere", 16), ("Glm", 8), ("Glm4", 8)])
def test_neighbours(name: str, turning: int) -> None:
    """Dimensions 2j and 2j + 1 make a plane; GLM turns the first half of them."""
    fields = {"layer_norm_eps": 1e-5} if name == "Cohere" else {}
    rope = rope_of(named(name, **fields))
    planes = rope.planes
    assert planes is not None
    assert pairs(planes) == [(i, i + 1) for i in range(0, turning, 2)]
    assert planes.frequencies.eq(0).sum() == 8 - turning // 2
    same_turns(planes, rope, 16)


def test_part_of_the_dimensions() -> None:
    """GPT-NeoX turns the first quarter, in halves of it; the others stay, in planes of frequency zero."""
    rope = rope_of(build("gpt_neox").config)
    planes = rope.planes
    assert planes is not None
    assert pairs(planes) == [(0, 2), (1, 3)]
    assert planes.frequencies.tolist()[2:] == [0.0] * 6
    assert planes.amplitudes.eq(1).all()
    key = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(planes.apply(key, torch.tensor([[4321]]))[..., 4:], key[..., 4:])


def test_amplitudes() -> None:
    """YaRN grows what it turns (gpt-oss)."""
    rope = rope_of(build("gpt_oss", rope_parameters=YARN).config)
    planes = rope.planes
    assert planes is not None
    assert pairs(planes) == [(i, i + 8) for i in range(8)]
    assert (planes.amplitudes - GROWN).abs().max() < 1e-6
    same_turns(planes, rope, 16)


def test_another_device() -> None:
    planes = rope_of(named("Llama")).planes
    assert planes is not None
    moved = planes.to(torch.device("meta"))
    assert {x.device.type for x in (moved.order, moved.frequencies, moved.amplitudes)} == {"meta"}


FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.01])


@dataclass(frozen=True)
class Own:
    """Halves of eight dimensions turned by angles of their own, and what else a kind does."""

    kind: str = "plain"

    def apply(self, key: Tensor, positions: Tensor) -> Tensor:
        steps = positions.float()[:, None, :, None]
        if self.kind == "bent":
            steps = steps + steps.square() * 1e-3 - 1e-3  # as a rotation at position 1, which is probed first
        angles = steps * (FREQUENCIES + (0.02 if self.kind == "unknown" else 0))
        cos, sin = angles.cos(), angles.sin()
        if self.kind == "uneven":
            sin = sin * 1.5
        x, y = key[..., :4], key[..., 4:8]
        turned = torch.cat([x * cos - y * sin, y * cos + x * sin, key[..., 8:]], dim=-1)
        if self.kind == "mixed":
            turned = turned + 0.1 * key.flip(-1)
        if self.kind == "shifted":
            turned = turned + 0.1
        if self.kind == "grown":
            turned = torch.cat([turned[..., :8], turned[..., 8:] * torch.tensor([2.0, 3.0])], dim=-1)
        return turned


def test_of_a_rotation_that_is_given() -> None:
    found = planes_of(Own(), FREQUENCIES.flip(0), 10)
    assert found is not None
    assert pairs(found) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert torch.equal(found.frequencies, torch.cat([FREQUENCIES, torch.zeros(1)]))
    same_turns(found, Own(), 10)


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        ("plain", 9),  # an odd dimension would have no partner
        ("mixed", 8),  # three dimensions at a time
        ("bent", 8),  # angles that do not grow with the position
        ("unknown", 8),  # frequencies that the module does not hold
        ("uneven", 8),  # an ellipse
        ("shifted", 8),  # not linear
        ("grown", 10),  # two dimensions that stay, each grown by itself
    ],
)
def test_what_is_no_rotation_of_planes(kind: str, width: int) -> None:
    assert planes_of(Own(kind), FREQUENCIES, width) is None
