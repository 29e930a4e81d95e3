"""Which rank a process is, and where rank 0 is, as torchrun, srun, our launcher or a person has put it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from infctx.errors import RecipeError

# (torchrun, our launcher and people; srun)
_NAMES = {"rank": ("RANK", "SLURM_PROCID"), "ranks": ("WORLD_SIZE", "SLURM_NTASKS")}
_LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """One rank among all."""

    rank: int
    ranks: int
    local_rank: int
    address: str
    """Of rank 0's machine."""
    port: int
    is_store_there: bool
    """Whether a store listens at address and port already; else rank 0 starts it."""


def place_of(environ: Mapping[str, str]) -> RankPlace:
    """The place of this process.

    Raises:
        RecipeError: something is missing, or no number.
    """
    slurm = int("LOCAL_RANK" not in environ and "SLURM_PROCID" in environ)
    address = environ.get("MASTER_ADDR")
    port = environ.get("MASTER_PORT")
    if slurm:
        address = address or first_host(environ.get("SLURM_NODELIST", ""))
        port = port or str(15000 + int(environ.get("SLURM_JOB_ID", "0")[-4:]))
    found = {
        **{name: environ.get(names[slurm]) for name, names in _NAMES.items()},
        "local rank": environ.get(_LOCAL_RANK[slurm]),
        "port of rank 0": port,
    }
    wrong = [f"{name} ({value})" for name, value in found.items() if value is None or not value.isdecimal()]
    if wrong or not address:
        missing = ", ".join([*wrong, *([] if address else ["address of rank 0"])])
        raise RecipeError(
            f"This process was started as one of several, but its environment does not say: {missing}. Start it with "
            "torchrun, with srun, or with neither; by hand it needs RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT."
        )
    rank, ranks, local_rank, port_number = (int(value) for value in found.values() if value is not None)
    return RankPlace(
        rank=rank,
        ranks=ranks,
        local_rank=local_rank,
        address=address,
        port=port_number,
        is_store_there=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def first_host(nodes: str) -> str:
    """The first of the machines of a SLURM list, as gpu[003-007,9],login1: gpu003."""
    found = re.match(r"\s*([^\s,\[]*)(?:\[([^\],-]+)[^\]]*\]([^\s,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""
