"""The states of rows survive being named, divided among ranks and put together again, to the bit."""

from __future__ import annotations

import pytest
import torch

from infctx.model.state import ModelState
from infctx.training.row_states import join_rows, num_rows, split_rows

LAYERS, HEADS, SIZE, CHANNELS = 3, 2, 4, 8


def groups_of(rows: int, num_groups: int, *, dtype: torch.dtype = torch.float32) -> list[ModelState]:
    """Random bits, and some of the numbers that are easily lost."""

    def bits(*shape: int) -> torch.Tensor:
        integer = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
        limits = torch.iinfo(integer)
        values = torch.randint(limits.min, limits.max, shape, dtype=integer).view(dtype)
        values[0, 0].view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=dtype)
        return values

    return [
        ModelState(bits(LAYERS, rows, HEADS, SIZE, SIZE), bits(LAYERS, rows, CHANNELS), bits(LAYERS, rows, CHANNELS))
        for _ in range(num_groups)
    ]


def assert_same_bits(found: list[ModelState], expected: list[ModelState]) -> None:
    for one, other in zip(found, expected, strict=True):
        for left, right in zip(one, other, strict=True):
            assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())
            assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def test_names_and_shapes() -> None:
    states = groups_of(2, 2)
    tensors = split_rows(states, 12)
    assert set(tensors) == {f"{row}.{name}" for row in (12, 13, 14, 15) for name in ("wkv", "att_shift", "ffn_shift")}
    assert tensors["13.wkv"].shape == (LAYERS, 1, HEADS, SIZE, SIZE)
    assert tensors["15.ffn_shift"].shape == (LAYERS, 1, CHANNELS)
    # Row 14 is the first of the second group, row 15 the second.
    same = [(tensors["14.att_shift"], states[1].att_shift[:, :1]), (tensors["15.wkv"], states[1].wkv[:, 1:])]
    assert all(torch.equal(one.view(torch.int32), other.view(torch.int32)) for one, other in same)
    assert num_rows(tensors) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_saved_by_some_ranks_and_loaded_by_others(ranks: int, dtype: torch.dtype) -> None:
    """8 rows in all: rank × rows in a group × groups."""
    num_groups = 8 // (2 * ranks)
    of_rank = [groups_of(2, num_groups, dtype=dtype) for _ in range(ranks)]
    tensors = {}
    for rank, states in enumerate(of_rank):
        tensors.update(split_rows(states, rank * 2 * num_groups))
    assert num_rows(tensors) == 8
    as_they_were = {"rows_per_group": 2, "num_groups": num_groups, "device": "cpu"}
    for rank, states in enumerate(of_rank):
        assert_same_bits(join_rows(tensors, first_row=rank * 2 * num_groups, **as_they_were), states)
    # All eight in one group, and one by one, on one rank.
    (whole,) = join_rows(tensors, first_row=0, rows_per_group=8, num_groups=1, device="cpu")
    expected = ModelState(
        *(torch.cat([state[part] for states in of_rank for state in states], dim=1) for part in range(3))
    )
    assert_same_bits([whole], [expected])
    singles = join_rows(tensors, first_row=0, rows_per_group=1, num_groups=8, device="cpu")
    assert_same_bits(singles, [ModelState(*(t[:, i : i + 1].contiguous() for t in expected)) for i in range(8)])


def test_no_rows() -> None:
    assert split_rows([], 0) == {}
    assert num_rows({}) == 0
    assert join_rows({}, first_row=0, rows_per_group=2, num_groups=0, device="cpu") == []


def test_a_row_that_is_not_there_is_not_made_up() -> None:
    tensors = split_rows(groups_of(2, 1), 0)
    with pytest.raises(KeyError, match=r"2\.wkv"):
        join_rows(tensors, first_row=1, rows_per_group=2, num_groups=1, device="cpu")
