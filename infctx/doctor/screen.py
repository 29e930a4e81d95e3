"""What the doctor tells, on one screen: 24 lines of 80 columns where nothing is broken."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

WIDTH = 80
LABEL = 8

Facts = Mapping[str, Any]
Style = Callable[[str, str], str]


def doctor_screen(facts: Facts, *, style: Style = lambda text, kind: text) -> list[str]:
    """The screen, a line each.

    Args: style: gives a text the looks of a kind: "good", "missing", "bad", "label". It changes no width.
    """
    versions = facts["versions"]
    lines = [f"infctx {versions['infctx']}, Python {versions['python']}, torch {versions.get('torch') or 'missing'}"]
    for label, sentence in _about_the_machine(facts):
        lines += _labelled(label, sentence, style)
    packages = facts["packages"]
    core = [f"{name} {one['version']}" for name, one in packages.items() if one["is_core"] and one["state"] == "usable"]
    lines += _labelled("core", ", ".join(one for one in core if not one.startswith(("torch ", "packaging "))), style)
    lines.append(style("optional", "label"))
    lines += [_optional_line(name, one, style) for name, one in packages.items() if not one["is_core"]]
    lines += _about_wrong_gradients(facts["silently_wrong"], style)
    for problem in facts["problems"]:
        sign = "broken " if problem["is_core"] else "mend   "
        text = textwrap.wrap(f"{problem['what']}. Do: {problem['do']}", WIDTH - LABEL)
        lines += [style(sign, "bad") + " " + text[0], *(" " * LABEL + rest for rest in text[1:])]
    is_broken = any(problem["is_core"] for problem in facts["problems"])
    verdict = "Something that infctx needs is missing or broken." if is_broken else "All that infctx needs is here."
    return [*lines, style(verdict, "bad" if is_broken else "good")]


def _labelled(label: str, sentence: str, style: Style) -> list[str]:
    first, *rest = textwrap.wrap(sentence, WIDTH - LABEL - 1, break_on_hyphens=False) or [""]
    return [style(f"{label:<{LABEL}}", "label") + f" {first}", *(" " * (LABEL + 1) + line for line in rest)]


def _about_the_machine(facts: Facts) -> list[tuple[str, str]]:
    machine, backends = facts["machine"], facts["backends"]
    threads = "" if machine["threads"] is None else f", {_counted(machine['threads'], 'thread')}"
    instructions = "".join(f", {name}" for name in machine["instructions"])
    told = [
        ("CPU", f"{machine['cpu'][:44]}, {_counted(machine['cores'], 'core')}{threads}{instructions}"),
        (
            "memory",
            f"{_size(machine['free_memory_bytes'])} of {_size(machine['memory_bytes'])} free; disk "
            f"{_size(machine['free_disk_bytes'])} free here",
        ),
    ]
    for device in facts["devices"]:
        free, total = _size(device["free_memory_bytes"]), _size(device["memory_bytes"])
        sentence = f"{device['model'][:30]}, {free} of {total} free, compute capability {device['compute_capability']}"
        told.append((device["name"], sentence))
    if not facts["devices"]:
        told.append(("GPU", "none"))
    if backends["wkv6"]:
        usable = [name for name, one in backends["wkv6"].items() if one["is_usable"]]
        # Reasons of a compiler can be pages long; what to install is said below.
        reasons = [
            f"{name}: {one['why_not'].splitlines()[0].partition(' (')[0][:60]}"
            for name, one in backends["wkv6"].items()
            if one["why_not"]
        ]
        unbuilt = "" if backends["is_built"] else " (built when it is first used, within a minute)"
        others = [name for name in usable if name != backends["chosen"]]
        not_here = f"; not {'; not '.join(reasons)}" if reasons else ""
        told.append(("WKV6", f"{backends['chosen']}{unbuilt}, also {', '.join(others)}{not_here}"))
    return told


def _optional_line(name: str, package: Mapping[str, Any], style: Style) -> str:
    if package["state"] == "missing":
        state, kind = f"missing: {package['install']}", "missing"
    elif package["state"] == "usable":
        state, kind = str(package["version"]), "good"
    else:
        state, kind = f"{package['version']}, {package['state']}, see below", "bad"
    brings = package["brings"]
    return f"  {name:<13} " + style(f"{state:<11}", kind) + f"  {brings}"[: WIDTH - 16 - max(11, len(state))]


def _about_wrong_gradients(combinations: list[str], style: Style) -> list[str]:
    """infctx does none of these; people's own scripts may."""
    if not combinations:
        return []
    version = combinations[0].partition(",")[0]
    told = [f"  {one.partition(', ')[2]}"[:WIDTH] for one in combinations]
    return [style(f"{version} gives wrong gradients without a word (not in infctx) with", "label"), *told]


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "?"
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes < 1e11 else f"{num_bytes / 1e9:,.0f} GB"
