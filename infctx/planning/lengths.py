"""What grows with the length of a document, and how long one may be."""

from __future__ import annotations

from dataclasses import dataclass

from infctx.planning.devices import Place
from infctx.planning.from_recipe import Planner
from infctx.planning.recipe_plan import RecipePlan, short_of

LENGTHS = (4_096, 16_384, 65_536, 262_144, 1_048_576, 4_194_304, 10_485_760)


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthPlan:
    """What documents of one length need.

    plan: with such a document as the longest. seconds: of one document. short_of: where there is no room.
    """

    tokens: int
    plan: RecipePlan
    seconds: float
    short_of: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Longest:
    """The longest document that there is room for.

    tokens: None = of any length. bound: what there is too little of for a longer one; None where nothing is.
    by_place: the same with boundary states in each place that they may be in.
    """

    tokens: int | None
    bound: Place | None
    by_place: dict[Place, int]


def plans_by_length(planner: Planner) -> list[LengthPlan]:
    """Plans for documents of `LENGTHS`, nothing else changed."""
    rows = []
    for tokens in LENGTHS:
        plan = planner.plan(tokens)
        rows.append(
            LengthPlan(
                tokens=tokens,
                plan=plan,
                seconds=planner.time_of(tokens, plan.chunk).seconds_per_document,
                short_of=tuple(short_of(plan.needs, planner.target.room)),
            )
        )
    return rows


def longest_document(planner: Planner, plan: RecipePlan) -> Longest:
    """How long a document may be; only the states at the chunk borders grow with it, and what attention has cached.

    Args:
        plan: of any length, by the same planner.
    """
    if planner.config.n_attention:
        return _longest_with_cache(planner)
    bptt, room, kind = planner.recipe.bptt, planner.target.room, planner.target.kind
    if bptt.window != "document":
        return Longest(tokens=None, bound=None, by_place={})
    needs = plan.needs_without_boundaries
    if (short := short_of(needs, room)) != []:
        # It does not run at all.
        return Longest(tokens=0, bound=short[0], by_place={})
    sharers = {"device": plan.sharers if kind == "cpu" else 1, "host": plan.sharers, "disk": plan.sharers}
    by_place: dict[Place, int] = {}
    for place in _places(planner):
        if (there := room.of(place)) is not None:
            states = (there - (needs.of(place) or 0)) // (plan.memory.one_state * sharers[place])
            by_place[place] = _chunks_for(states, bptt.thin_boundaries) * bptt.chunk_tokens
    if not by_place:
        return Longest(tokens=None, bound=None, by_place={})
    bound = max(by_place, key=lambda place: by_place[place])
    return Longest(tokens=by_place[bound], bound=bound, by_place=by_place)


def _longest_with_cache(planner: Planner) -> Longest:
    """By trying: where the cache is follows from its size."""
    chunk = planner.recipe.bptt.chunk_tokens

    def short(num_chunks: int) -> list[Place]:
        return short_of(planner.plan(num_chunks * chunk).needs, planner.target.room)

    fitting, too_long = 0, LENGTHS[-1] // chunk + 1
    if not short(too_long):
        # Longer ones than anybody has are not looked for.
        return Longest(tokens=None, bound=None, by_place={})
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        fitting, too_long = (fitting, middle) if short(middle) else (middle, too_long)
    bound = short(too_long)[0]
    return Longest(tokens=fitting * chunk, bound=bound, by_place={bound: fitting * chunk} if fitting else {})


def _places(planner: Planner) -> tuple[Place, ...]:
    """Where boundary states may wait. On a CPU host memory is the device's."""
    wanted, is_cpu = planner.recipe.bptt.boundaries, planner.target.kind == "cpu"
    if wanted == "auto":
        return ("device", "disk") if is_cpu else ("device", "host", "disk")
    return ("device",) if is_cpu and wanted == "host" else (wanted,)


def _chunks_for(num_states: int, is_thinned: bool) -> int:
    """The largest window that keeps no more states than these."""
    if not is_thinned:
        return max(0, num_states - 1)
    # A window of s² chunks keeps 2·s of them.
    return (num_states // 2) ** 2
