"""How a run is spread over ranks, and what part of a tensor a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from infctx.recipe.run_section import Strategy
from infctx.recipe.schema import Recipe

Offload = Literal["none", "optimizer", "all"]
# As the machines that long training is done on have them.
DEVICES_PER_NODE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A way to spread a run.

    ranks: processes, one device each. devices_per_node: how many of them share a machine. strategy: never auto.
    time_parallel: ranks that share each chunk. offload: what waits in host memory.
    """

    ranks: int = 1
    devices_per_node: int = DEVICES_PER_NODE
    strategy: Strategy = "single"
    offload: Offload = "none"
    time_parallel: int = 1

    @property
    def num_nodes(self) -> int:
        """Machines, the last of which may have idle devices."""
        return -(-self.ranks // self.devices_per_node)

    @property
    def groups(self) -> int:
        """Sets of ranks that compute rows of their own: data parallelism."""
        return self.ranks // self.time_parallel

    @property
    def shards_parameters(self) -> bool:
        """Whether weights are divided among all ranks, those that share a chunk among them."""
        return self.strategy in ("fsdp", "deepspeed_3")

    @property
    def shards_gradients(self) -> bool:
        """Whether a rank holds only its part of the gradient between two chunks."""
        return self.strategy in ("fsdp", "deepspeed_2", "deepspeed_3")

    @property
    def shards_moments(self) -> bool:
        """Whether a rank holds only its part of the optimizer's moments."""
        return self.shards_gradients or self.strategy == "deepspeed_1"

    def elements_held(self, shape: torch.Size, *, is_sharded: bool) -> int:
        """Elements of a tensor on the rank that holds most of it.

        FSDP2 cuts the first axis, so that a tensor of fewer rows than ranks is divided among as many as it has rows;
        DeepSpeed cuts the elements as they lie.
        """
        whole = shape.numel()
        if not is_sharded:
            return whole
        if self.strategy == "fsdp" and len(shape) > 0:
            return -(-shape[0] // self.ranks) * (whole // max(1, shape[0]))
        return -(-whole // self.ranks)


def spread_of(recipe: Recipe, *, ranks: int | None = None) -> Spread:
    """What a recipe says of it.

    Args:
        ranks: plan for so many in place of run.devices × run.num_nodes; None = those, where auto is one device.
    """
    run = recipe.run
    devices = 1 if run.devices == "auto" else run.devices
    num_ranks = devices * run.num_nodes if ranks is None else ranks
    per_node = devices if ranks is None and run.num_nodes > 1 else DEVICES_PER_NODE
    strategy = run.strategy
    if strategy == "auto":
        strategy = "single" if num_ranks == 1 else "ddp"
    return Spread(
        ranks=num_ranks,
        devices_per_node=per_node,
        strategy=strategy,
        offload=run.offload,
        time_parallel=run.time_parallel,
    )
