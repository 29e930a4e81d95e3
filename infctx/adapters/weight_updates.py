"""What an adapter does to one matrix, whatever file it came from. W is [out, in], r the rank.

Every formula is computed in float32, or in float64 where the weights are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.errors import CheckpointError

Shape = tuple[int, ...]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Part(NamedTuple):
    """One tensor of an update, and the shape a matrix asks of it; a size that is free is called r."""

    name: str
    tensor: Tensor
    expected: tuple[int | str, ...]

    @property
    def fits(self) -> bool:
        """Whether the sizes that are not free are right."""
        wanted, found = self.expected, self.tensor.shape
        return len(wanted) == len(found) and all(size in ("r", n) for size, n in zip(wanted, found, strict=True))


class Start(NamedTuple):
    """The product a PiSSA training began with, which its base was reduced by."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LowRank:
    """W + scale · up @ down, less the start's product; with a magnitude [out], each row is then brought to that length.

    scale: None until something tells alpha. length_axis: 0 where the lengths are of W's columns, as peft has them for
    embeddings. Source: LoRA, PiSSA and DoRA, as peft and RWKV-PEFT merge them.
    """

    down: Tensor
    up: Tensor
    scale: float | None
    start: Start | None = None
    magnitude: Tensor | None = None
    length_axis: int = 1

    @property
    def rank(self) -> int:
        """r, from the shapes."""
        return self.down.shape[0]

    def parts(self, shape: Shape) -> list[Part]:
        """The tensors, and what a matrix of this shape asks of them."""
        rows, columns = shape
        parts = [Part("lora_A", self.down, ("r", columns)), Part("lora_B", self.up, (rows, self.rank))]
        if self.start is not None:
            parts.append(Part("init_lora_A", self.start.down, ("r", columns)))
            parts.append(Part("init_lora_B", self.start.up, (rows, self.start.down.shape[0])))
        if self.magnitude is not None:
            parts.append(Part("lora_magnitude_vector", self.magnitude, (shape[1 - self.length_axis],)))
        return parts

    def merged_dtype(self, weight: torch.dtype) -> torch.dtype:
        """The dtype a matrix of this dtype is merged in."""
        return _wider(weight, self.up.dtype)

    def apply(self, weight: Tensor) -> Tensor:
        """The merged matrix."""
        assert self.scale is not None
        dtype = self.merged_dtype(weight.dtype)
        changed = (self.up.to(dtype) @ self.down.to(dtype)).mul_(self.scale).add_(weight.to(dtype))
        if self.start is not None:
            changed -= self.start.up.to(dtype) @ self.start.down.to(dtype)
        if self.magnitude is not None:
            changed *= (self.magnitude.to(dtype) / changed.norm(dim=self.length_axis)).unsqueeze(self.length_axis)
        return changed

    def plain(self) -> LowRank:
        """The same change without a start: of up to twice the rank, against the same base."""
        if self.start is None:
            return self
        assert self.scale is not None
        up = torch.cat([self.up * self.scale, -self.start.up.to(self.up.dtype)], dim=1)
        down = torch.cat([self.down, self.start.down.to(self.down.dtype)])
        return replace(self, up=up, down=down, scale=1.0, start=None)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SharedRows:
    """W[o, c] + rows[c mod r, o]: every block of r input channels gets the same change.

    is_repeated: rows are narrower than W, and repeated over its outputs. Source: DiSHA ("bone") of RWKV-PEFT, and MiSS
    of peft, which are one function in one layout; repeated, MiSS in its "mini" mode.
    """

    rows: Tensor
    is_repeated: bool = False

    @property
    def rank(self) -> int:
        """r, from the shape."""
        return self.rows.shape[0]

    def parts(self, shape: Shape) -> list[Part]:
        """The tensor, and what a matrix of this shape asks of it."""
        rank: int | str = "r" if self.rank <= shape[1] else f"at most {shape[1]}"
        width = self.rows.shape[1]
        is_divisor = self.is_repeated and shape[0] % width == 0
        return [
            Part("miss_block" if self.is_repeated else "disha", self.rows, (rank, width if is_divisor else shape[0]))
        ]

    def merged_dtype(self, weight: torch.dtype) -> torch.dtype:
        """The dtype a matrix of this dtype is merged in."""
        return _wider(weight, self.rows.dtype)

    def apply(self, weight: Tensor) -> Tensor:
        """The merged matrix."""
        dtype = self.merged_dtype(weight.dtype)
        channel = torch.arange(weight.shape[1]) % self.rank
        rows = self.rows.to(dtype).repeat(1, weight.shape[0] // self.rows.shape[1])
        return rows.t()[:, channel].add_(weight.to(dtype))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TileProduct:
    """W cut into r × r tiles, tile [a][b] + tile [a][b] @ tiles[b] + tiles[b]: one for each column of tiles.

    is_by_row: with tiles[a] instead, one for each row of tiles. That is another function, and the shapes of square
    matrices do not show which is meant. Source: by column, the "bat" mode of DiSHA in RWKV-PEFT; by row, the mode of
    that name of MiSS in peft.
    """

    tiles: Tensor
    is_by_row: bool = False

    @property
    def rank(self) -> int:
        """r, from the shape."""
        return self.tiles.shape[-1]

    def parts(self, shape: Shape) -> list[Part]:
        """The tensor, and what a matrix of this shape asks of it."""
        rows, columns = shape
        name, rank = ("miss_block" if self.is_by_row else "disha"), self.rank
        if rows % rank or columns % rank:
            return [Part(name, self.tiles, ("…", f"r that divides {rows} and {columns}", "r"))]
        return [Part(name, self.tiles, ((rows if self.is_by_row else columns) // rank, rank, rank))]

    def merged_dtype(self, weight: torch.dtype) -> torch.dtype:
        """The dtype a matrix of this dtype is merged in."""
        return _wider(weight, self.tiles.dtype)

    def apply(self, weight: Tensor) -> Tensor:
        """The merged matrix."""
        dtype = self.merged_dtype(weight.dtype)
        tiles, weight = self.tiles.to(dtype), weight.to(dtype)
        tiled = weight.reshape(-1, self.rank, weight.shape[1] // self.rank, self.rank)  # [out / r, r, in / r, r]
        if self.is_by_row:
            product, added = torch.einsum("apbq,aqs->apbs", tiled, tiles), tiles[:, :, None]
        else:
            product, added = torch.einsum("apbq,bqs->apbs", tiled, tiles), tiles.transpose(0, 1)[None]
        return product.add_(tiled).add_(added).reshape(weight.shape)


Update = LowRank | SharedRows | TileProduct


def check_numbers(name: str, tensor: Tensor, *, file: str) -> None:
    """Refuse a tensor that nothing can be computed with.

    Raises: CheckpointError: another dtype than a float of 16 bits or more, empty (rank 0), or not finite.
    """
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name}: expected a float dtype of 16 bits or more, found {str(tensor.dtype)[6:]}."
        )
    if tensor.numel() == 0:
        raise CheckpointError(
            f"{file}: tensor {name}: expected a rank of at least 1, found shape {list(tensor.shape)}."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{file}: tensor {name}: holds NaN or infinity; the training diverged. Take an earlier one."
        )


def _wider(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """float32, or float64 where one of them is."""
    return torch.float64 if torch.float64 in (one, other) else torch.float32
