"""What a person sees of a benchmark, and its JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from infctx.bench.gates import Gate
from infctx.bench.pairs import median_interval
from infctx.bench.wkv6_suite import QUIET, Row

# What is measured of a row, null where there is none.
NUMBERS = (
    "ratio",
    "ratio_interval",
    "ours_ms",
    "other_ms",
    "ours_ns_per_token_head",
    "other_ns_per_token_head",
    "a_a_ratio",
    "a_a_ratio_interval",
)


def gate_facts(gate: Gate) -> dict[str, Any]:
    """A gate as JSON has it; an error that is no number is null."""
    facts: dict[str, Any] = rounded({**asdict(gate), "is_passed": gate.is_passed})
    return facts


def row_facts(row: Row) -> dict[str, Any]:
    """A row as JSON has it: a ratio is other / ours, above 1 where ours is faster."""
    case, other = row.comparison.case, row.comparison.other
    times, numbers = row.times, dict.fromkeys(NUMBERS)
    token_heads = case.rows * case.tokens * case.heads
    if times is not None:
        for name, seconds in (("ours", times.ours), ("other", times.other)):
            if seconds:
                numbers[f"{name}_ms"] = median(seconds) * 1e3
                numbers[f"{name}_ns_per_token_head"] = median(seconds) * 1e9 / token_heads
        for name, ratios in (("ratio", times.ratios), ("a_a_ratio", times.ratios_of_ours)):
            if ratios:
                numbers[name], numbers[f"{name}_interval"] = median(ratios), median_interval(ratios)
    facts: dict[str, Any] = rounded(
        {
            "dtype": case.dtype,
            "tokens": case.tokens,
            "pass": row.comparison.which,
            "ours": row.comparison.ours.name,
            "other": other and other.name,
            **numbers,
            "is_noisy": row.is_noisy,
            "pairs": 0 if times is None else times.num_pairs,
            "reason": row.reason,
        }
    )
    return facts


def row_text(row: Row) -> str:
    """A row in a line."""
    facts = row_facts(row)
    what = f"{facts['dtype']}, {facts['tokens']:,} tokens, {facts['pass']}: {facts['ours']} "
    what += "alone: " if facts["other"] is None else f"against {facts['other']}: "
    if row.times is None:
        return what + "no ratio"
    return what + (f"{facts['ours_ms']:.3g} ms" if facts["ratio"] is None else _ratio(facts))


def print_gates(console: Console, gates: Sequence[Gate]) -> None:
    """Print which side may be compared, and how exact it is at usual and at extreme decays."""
    table = Table(title="Largest error / largest value, against float64", title_justify="left", show_edge=False)
    for column in ("side", "dtype", "gate", "usual decays", "extreme decays"):
        table.add_column(column, overflow="fold")
    for gate in gates:
        table.add_row(
            gate.side,
            gate.dtype,
            "passed" if gate.is_passed else "FAILED" if gate.errors else "not run",
            _worst(gate.errors, gate.bounds),
            _worst(gate.extreme_errors, gate.extreme_bounds) + ("" if gate.extreme_reason is None else ", WRONG"),
        )
    console.print(table)
    for gate in gates:
        if gate.reason is not None:
            console.print(f"{gate.side}, {gate.dtype}: {gate.reason}", markup=False)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Print the ratios; where there is none, why."""
    if not rows:
        return
    title = "Median of the pairs' ratios, other / ours, with its 95 % interval: above 1 ours is faster"
    table = Table(title=title, title_justify="left", show_edge=False)
    for column in ("ours", "other", "dtype", "tokens", "pass"):
        table.add_column(column, overflow="fold")
    for column in ("ms", "ns/token/head", "ratio", "A/A", "pairs"):
        table.add_column(column, justify="right")
    for row in rows:
        facts = row_facts(row)
        names = facts["ours"], facts["other"] or "–", facts["dtype"], f"{facts['tokens']:,}", facts["pass"]
        table.add_row(*names, *_numbers(row, facts))
    console.print(table)
    if any(row.is_noisy for row in rows):
        console.print(
            f"~ A/A (ours / ours) not within {QUIET[0]} to {QUIET[1]}: the machine was not quiet, measure again."
        )
    for reason in dict.fromkeys(row.reason for row in rows if row.reason is not None):
        console.print(f"No ratio: {reason}", markup=False)


def _numbers(row: Row, facts: dict[str, Any]) -> list[str]:
    if row.times is None:
        return ["–", "–", "none", "–", "0"]
    both = [
        " / ".join(_short(facts[f"{side}_{unit}"]) for side in ("ours", "other") if facts[f"{side}_{unit}"] is not None)
        for unit in ("ms", "ns_per_token_head")
    ]
    return [*both, "–" if facts["ratio"] is None else _ratio(facts), f"{facts['a_a_ratio']:.3f}", str(facts["pairs"])]


def _ratio(facts: dict[str, Any]) -> str:
    """The ratio and its interval; ~ where the machine was not quiet."""
    interval = facts["ratio_interval"]
    spread = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{'~' if facts['is_noisy'] else ''}{facts['ratio']:.2f}{spread}"


def _short(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"


def _worst(errors: dict[str, float], bounds: dict[str, float]) -> str:
    """The tensor that is nearest to its bound, or furthest beyond it."""
    if not errors:
        return "–"
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name] / bounds[name])
    return f"{errors[worst]:.1e} {worst}"


def rounded(value: Any) -> Any:
    """Numbers to four digits, which is more than a clock has; JSON has no infinity and no NaN."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, tuple | list):
        return [rounded(item) for item in value]
    return {key: rounded(item) for key, item in value.items()} if isinstance(value, dict) else value
