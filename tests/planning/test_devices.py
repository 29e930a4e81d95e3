"""Devices by name, and what of this machine is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infctx.cli_plan import _NAMED
from infctx.errors import RecipeError
from infctx.planning.devices import (
    CATALOG,
    Room,
    cpu_flops_per_second,
    device_here,
    device_named,
    device_names,
    free_disk_bytes,
)
from infctx.planning.recipe_plan import short_of


def test_devices_are_found_however_they_are_written() -> None:
    assert device_named("RTX_3090").memory_bytes == 24 * 10**9
    assert device_named("a100 40gb").name == "a100-40gb"
    assert device_named("cpu").is_here
    assert sorted(_NAMED.split(", ")) == sorted(device_names())
    assert all(spec.memory_bytes and spec.flops_per_second and spec.bytes_per_second for spec in CATALOG)


@pytest.mark.parametrize(("wrong", "nearest"), [("rtx-3091", "rtx-3090"), ("H10", "h100"), ("a100", "a100-40gb")])
def test_an_unknown_device_is_refused_with_the_nearest_and_all(wrong: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f"--device {wrong}.*Did you mean {nearest}") as refused:
        device_named(wrong)
    assert all(name in str(refused.value) for name in device_names())


def test_this_machine(tmp_path: Path) -> None:
    assert device_here().kind == ("cuda" if torch.cuda.is_available() else "cpu")
    assert free_disk_bytes(tmp_path / "not" / "there") > 0
    assert cpu_flops_per_second(seconds=0.01) > 1e8


def test_what_is_short() -> None:
    room = Room(device=100, host=None, disk=10)
    assert short_of(Room(device=100, host=10**9, disk=10), room) == []
    assert short_of(Room(device=101, host=0, disk=11), room) == ["device", "disk"]
    assert short_of(Room(device=109, host=0, disk=12), room, tolerance=0.1) == ["disk"]
    assert short_of(Room(device=95, host=0, disk=1), room, tolerance=-0.1) == ["device"]
