"""Several devices, one context: the pages of every row are dealt out to the ranks of a process group.

Every rank runs the model on the same tokens, so all see the same keys and values and learn the same from them. Page `i`
of a row is coded and kept by rank `i mod world` alone; sinks, recent tokens and the chunk under way are few, and every
rank's. A rank attends its own pages, and everybody the exact tokens, whose log-sum-exp `e` is then the same everywhere;
one all-reduce brings the pages' partial results (mean m_r, log-sum-exp l_r) together::

    w_r = exp(l_r - e - HEADROOM)      (sum of w_r m_r, sum of w_r)      float64 [.., D + 1]

It gives all ranks the same bits, so all draw the same token from the same seed. float64 holds w_r where l_r is at most
1200 above e and at least 108 below, where a rank's pages have less than e^-108 of the exact tokens' weight, which
float32 does not show. Above 1200 w_r is clamped: the exact tokens weigh nothing there, and all that is lost is how two
ranks compare that are both so far ahead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

HEADROOM = 600.0  # nats; exp(600) times any sum of float32 numbers is far from float64's end, and so is exp(-600 - 108)
#: Stands for the log-sum-exp of exact tokens where a query sees none: scores from -608 to 700 can be told apart then.
UNSEEN = -500.0


class ContextGroup:
    """One rank's view of the group that a context is dealt out to. `calls`, `payload`: collectives and their bytes.

    A copy, deep ones included, is the same group.
    """

    def __init__(self, process_group: dist.ProcessGroup):
        self.process_group = process_group
        self.rank, self.world = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.calls, self.payload = 0, 0

    @classmethod
    def of(cls, group: Group | None) -> ContextGroup | None:
        """The group of a ProcessGroup, or of a DeviceMesh of one dimension; None for None.

        Raises TypeError for anything else, a group that this process is not in included, ValueError for a mesh of
        several dimensions.
        """
        if group is None:
            return None
        if isinstance(group, ContextGroup):
            return cls(group.process_group)
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"a context is dealt out along one dimension of a mesh, got one of {group.ndim} dimensions "
                    f"{group.mesh_dim_names}; give mesh[NAME]"
                )
            return cls(group.get_group())
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group must be a torch.distributed ProcessGroup that this process is in, such as dist.group.WORLD, or "
                f"a DeviceMesh of one dimension, got {group!r}"
            )
        return cls(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextGroup:
        return self

    def keeps(self, page: int) -> bool:
        """Whether this rank codes and keeps page number `page` of a row."""
        return page % self.world == self.rank

    @property
    def columns(self) -> slice:
        """Those of a page table that are this rank's."""
        return slice(self.rank, None, self.world)

    def combine(self, mean: Tensor, log: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' partial results as one: means float32 [.., D] and log-sum-exps [.., 1]; see the module.

        mean, log: this rank's. exact: log-sum-exps [.., 1] of what all ranks attend. Every rank must call this with
        tensors of one shape. Raises RuntimeError where another rank does not take part.
        """
        exact = exact.double().masked_fill(exact == -torch.inf, UNSEEN)
        weight = torch.exp((log.double() - exact).clamp(max=2 * HEADROOM) - HEADROOM)
        payload = torch.cat([mean, torch.ones_like(log)], dim=-1).double().mul_(weight)
        payload.masked_fill_(weight == 0, 0.0)  # a mean of nothing may be anything
        self._all_reduce(payload)
        summed, weight = payload[..., :-1], payload[..., -1:]
        mean = summed / weight.masked_fill(weight == 0, 1.0)
        return mean.float(), (weight.log() + HEADROOM + exact).float()

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks of tensors of one shape, in their dtype, added in float32."""
        added = x.float()
        self._all_reduce(added)
        return added.to(x.dtype)

    def agree(self, facts: Mapping[str, int], key: Tensor) -> None:
        """Raises ValueError, on every rank, where ranks state different facts or were given different tokens.

        key: those of the first layer, [B, H, Q, D], which tell tokens and positions apart. Takes one small collective,
        whose result the host waits for. Raises RuntimeError where another rank does not take part.
        """
        stated = torch.tensor(list(facts.values()), dtype=torch.int64, device=key.device)
        own = torch.cat([stated, _fingerprint(key).unsqueeze(0)])
        found = [torch.empty_like(own) for _ in range(self.world)]
        with self._collective(own):
            dist.all_gather(found, own, group=self.process_group)
            values = torch.stack(found).tolist()
        names = [*facts, "tokens"]
        apart = {
            name: [rank for rank, each in enumerate(values) if each[i] != values[0][i]] for i, name in enumerate(names)
        }
        if any(apart.values()):
            said = "; ".join(f"{name}: rank {', '.join(map(str, ranks))}" for name, ranks in apart.items() if ranks)
            raise ValueError(
                f"all ranks of a context must be given the same, but some differ from rank 0 ({said}); where tokens "
                "are sampled, give all ranks the same seed"
            )

    def _all_reduce(self, x: Tensor) -> None:
        with self._collective(x):
            dist.all_reduce(x, group=self.process_group)

    @contextmanager
    def _collective(self, x: Tensor) -> Iterator[None]:
        self.calls += 1
        self.payload += x.nbytes
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of a context of {self.world} waited for the others in vain: one of them has ended, "
                f"or left the forward pass with an error ({str(error).splitlines()[0]})"
            ) from error


#: What a context can be dealt out to: the ranks of a process group, or of a mesh of one dimension.
Group: TypeAlias = dist.ProcessGroup | DeviceMesh | ContextGroup


def digest(text: str) -> int:
    """A number that tells texts apart, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _fingerprint(key: Tensor) -> Tensor:
    """An int64 number of the bits of some dimensions of the first head of keys [B, H, Q, D], on their device."""
    bits = key.detach()[:, 0, :, :8].float().contiguous().view(torch.int32).flatten().long()
    places = torch.arange(1, len(bits) + 1, device=key.device) * -0x61C8864680B583EB  # the golden ratio of 2^64, odd
    return (bits * (places ^ (places >> 29))).sum()  # modulo 2^64, so in whatever order it is added
