"""A plan in words, at most 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infctx.planning.devices import UNCERTAIN_SHARE, DeviceSpec, Place
from infctx.planning.lengths import LengthPlan, Longest
from infctx.planning.memory import CACHE
from infctx.planning.probe import Probe
from infctx.planning.recipe_plan import RecipePlan, short_of
from infctx.planning.settings import FEWER_TRAINED, ORDER, Fitting
from infctx.surgery.info import released_name
from infctx.training.cache_place import cache_bytes

WIDTH = 80
# Resident in a process that has imported what a run imports: 586 MB measured on Linux, with torch for CPUs.
LIBRARY_BYTES = 0.6e9
_PLACES: tuple[Place, ...] = ("device", "host", "disk")
_IN_WORDS = {"device": "the device's memory", "host": "host memory", "disk": "the disk"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that `infctx plan` found.

    recipe: path of the recipe, with what was set behind it. lengths: by length of document. fitting: settings for the
    room that was told; None where nothing fits or none was told. is_rate_measured: whether times rest on a measured
    rate of this machine.
    """

    recipe: str
    plan: RecipePlan
    device: DeviceSpec
    lengths: Sequence[LengthPlan]
    longest: Longest
    fitting: Fitting | None
    probe: Probe | None = None


def report_in_words(report: Report) -> list[str]:
    """The report as lines for people."""
    plan = report.plan
    lines = [*_headline(report), "", *_table(plan), "", *_verdict(report), "", *_length_lines(report)]
    if report.probe is not None:
        lines += ["", *probe_lines(report.probe)]
    return lines


def _headline(report: Report) -> list[str]:
    plan, config, spread = report.plan, report.plan.config, report.plan.spread
    name = released_name(config) or config.name
    shared = f", {spread.time_parallel} share each chunk" if spread.time_parallel > 1 else ""
    offload = f", offload {spread.offload}" if spread.offload != "none" else ""
    machines = f" on {spread.num_nodes} machines" if spread.num_nodes > 1 else ""
    activations = "recomputed layer by layer" if plan.chunk.is_recomputed else "kept"
    return [
        f"model      {name}, {plan.num_parameters:,} parameters, {plan.num_trained:,} trained",
        f"device     {device_in_words(report.device, plan)}, {plan.precision}",
        f"ranks      {spread.ranks}{machines}, {spread.strategy}{offload}{shared}",
        f"chunk      {plan.chunk.tokens_at_once(spread):,} tokens at once, activations {activations}",
        f"documents  {plan.document_tokens:,} tokens; {plan.chunk.boundary_states:,} boundary states, "
        f"{gigabytes(plan.memory.one_state)} each",
        *([f"cache      {_cache_in_words(plan)}"] if config.n_attention else []),
    ]


def _cache_in_words(plan: RecipePlan) -> str:
    each = cache_bytes(plan.config, rows=1, num_tokens=1)
    place = "host memory" if plan.chunk.cache.on_host else "memory" if plan.target.kind == "cpu" else "the device"
    return f"{each:,} bytes of each token, and as much for the gradient, in {place}".replace("in the d", "on the d")


def device_in_words(device: DeviceSpec, plan: RecipePlan) -> str:
    """Its name and its memory."""
    room = plan.target.room.device
    if room is None:
        return device.name
    return f"{device.name}, {gigabytes(room)}" + (" free here now" if device.is_here else "")


def _table(plan: RecipePlan) -> list[str]:
    """Parts by place."""
    columns: dict[Place, Mapping[str, int]] = {
        "device": plan.memory.device,
        "host": plan.memory.host,
        "disk": plan.disk,
    }
    parts = sorted(
        {part for column in columns.values() for part in column},
        key=lambda part: -max(column.get(part, 0) for column in columns.values()),
    )
    is_cpu = plan.target.kind == "cpu"
    titles = ["memory" if is_cpu else "device", *([] if is_cpu else ["host"]), "disk"]
    places: list[Place] = ["device", *([] if is_cpu else ["host"]), "disk"]  # type: ignore[list-item]
    lines = [f"{'of each rank':<30}" + "".join(f"{title:>14}" for title in titles)]
    for part in parts:
        cells = [gigabytes(columns[place][part]) if part in columns[place] else "" for place in places]
        label = f"cache of {plan.chunk.cache.window_tokens:,} tokens" if part == CACHE else part
        lines.append(f"  {label:<28}" + "".join(f"{cell:>14}" for cell in cells).rstrip())
    sums = [gigabytes(sum(columns[place].values())) for place in places]
    lines.append(f"  {'together':<28}" + "".join(f"{cell:>14}" for cell in sums))
    if plan.sharers > 1 and plan.needs != plan.target.room:
        needs = [gigabytes(plan.needs.of(place) or 0) for place in places]
        lines.append(f"  {'of all ranks of a machine':<28}" + "".join(f"{cell:>14}" for cell in needs))
    rooms = [plan.target.room.of(place) for place in places]
    if any(room is not None for room in rooms):
        cells = ["not told" if room is None else gigabytes(room) for room in rooms]
        lines.append(f"  {'there is':<28}" + "".join(f"{cell:>14}" for cell in cells))
    if plan.memory_if_recomputed is not None:
        again = gigabytes(plan.memory_if_recomputed.device_bytes)
        lines.append(f"With bptt.activations=recompute the device would hold {again}.")
    return lines


def _verdict(report: Report) -> list[str]:
    plan = report.plan
    if plan.fits is None:
        return ["Whether it fits: give --memory, as 24GB, or --device."]
    lines = []
    if plan.fits:
        is_close = bool(short_of(plan.needs, plan.target.room, tolerance=-UNCERTAIN_SHARE))
        lines.append("It fits." + (f" With less than {UNCERTAIN_SHARE:.0%} left: it may not." if is_close else ""))
    else:
        missing = " and of ".join(_IN_WORDS[place] for place in short_of(plan.needs, plan.target.room))
        lines.append(f"It does NOT fit: there is too little of {missing}.")
    if plan.target.kind == "cuda":
        lines += wrapped("None of this was measured on a GPU. Gaps between tensors are not counted: leave some room.")
    else:
        lines += wrapped(f"Not counted: Python and its libraries, {gigabytes(LIBRARY_BYTES)}, which every process has.")
    return lines + _settings_lines(report)


def _settings_lines(report: Report) -> list[str]:
    order = "; ".join(f"{number} {what}" for number, what in enumerate(ORDER, start=1))
    tried = wrapped(f"Tried in this order, and taken back where not needed: {order}.")
    fitting = report.fitting
    if fitting is None:
        return [
            *tried,
            *wrapped(f"None of it is enough. Train fewer weights ({FEWER_TRAINED}), or use more devices."),
        ]
    if not fitting.settings:
        return []
    needs = fitting.plan.needs
    sizes = ", ".join(f"{place} {gigabytes(needs.of(place) or 0)}" for place in _PLACES if needs.of(place))
    lines = [*tried, f"Settings that fit ({sizes}):", f"  {command(report.recipe, fitting)}"]
    if {"optimizer.name", "model.quantize"} & fitting.settings.keys():
        others = [value for value in fitting.overrides if value.endswith(("8bit", "int8", "nf4"))]
        lines += wrapped(f"{' and '.join(others)} changes the result a little.") if others else []
    return lines


def command(recipe: str, fitting: Fitting) -> str:
    """The command that trains with these settings."""
    return " ".join(["infctx train", recipe, *fitting.overrides])


def _length_lines(report: Report) -> list[str]:
    plan, is_cpu = report.plan, report.plan.target.kind == "cpu"
    titles = ["memory" if is_cpu else "device", *([] if is_cpu else ["host"]), "disk"]
    sizes_title = "".join(f"{title:>12}" for title in titles)
    lines = [f"{'document':>11}{'fits':>5}{sizes_title}{'states on':>11}{'time of one':>14}"]
    for row in report.lengths:
        needs, place = row.plan.needs, row.plan.chunk.boundaries
        sizes = [needs.device, *([] if is_cpu else [needs.host]), needs.disk]
        fits = "?" if plan.fits is None else "no" if row.short_of else "yes"
        cells = "".join(f"{gigabytes(size or 0):>12}" for size in sizes)
        where = "memory" if is_cpu and place != "disk" else place
        lines.append(f"{row.tokens:>11,}{fits:>5}{cells}{where:>11}{duration(row.seconds):>14}")
    return [*lines, *wrapped(_longest_in_words(report)), *wrapped(_time_in_words(report))]


def _longest_in_words(report: Report) -> str:
    longest, is_cpu = report.longest, report.plan.target.kind == "cpu"
    if report.plan.config.n_attention:
        return _longest_with_cache_in_words(report)
    if report.plan.chunk.boundary_states <= 1 or (longest.tokens is None and not longest.by_place):
        return "The longest document: any. The window does not grow with it, and nothing else does."
    if longest.tokens == 0 and not longest.by_place:
        return f"The longest document: none, for there is too little of {_IN_WORDS[longest.bound or 'device']}."
    places = {"device": "in memory" if is_cpu else "on the device", "host": "in host memory", "disk": "on disk"}
    each = ", ".join(f"{tokens:,} with them {places[place]}" for place, tokens in longest.by_place.items())
    return (
        f"The longest document: {longest.tokens:,} tokens, bounded by {_IN_WORDS[longest.bound or 'device']}. Nothing "
        f"grows with it but the states between chunks: {each}."
    )


def _longest_with_cache_in_words(report: Report) -> str:
    longest = report.longest
    grows = "With it grows what its layers with attention have cached, also where a window of chunks is short"
    if longest.tokens is None:
        return f"The longest document: beyond {report.lengths[-1].tokens:,} tokens. {grows}."
    if longest.tokens == 0:
        return f"The longest document: none, for there is too little of {_IN_WORDS[longest.bound or 'device']}."
    return (
        f"The longest document: {longest.tokens:,} tokens, bounded by {_IN_WORDS[longest.bound or 'device']}. {grows}."
    )


def _time_in_words(report: Report) -> str:
    plan, machine = report.plan, report.plan.target.machine
    step = plan.step_time.seconds
    rate = f"{machine.flops_per_second / 1e12:.3g} TFLOP/s"
    if plan.target.kind == "cpu":
        source = f"from {rate}, of matrix products measured here just now; right to about 30 %"
    else:
        source = f"by a model that was not measured on a GPU, assuming {rate} of each device in training"
    if plan.spread.ranks > 1:
        source += (
            f", links of {machine.in_node_bytes_per_second / 1e9:g} GB/s in a machine and "
            f"{machine.between_nodes_bytes_per_second / 1e9:g} GB/s between machines"
        )
    run = "" if plan.run_seconds is None else f", the run {duration(plan.run_seconds)}"
    return (
        f"A step of {plan.step_time.documents:,} × {plan.step_tokens:,} tokens takes about {duration(step)}{run}, "
        f"{source}. How long the documents are says --tokens: they are not read.{_attention_in_words(report)}"
    )


def _attention_in_words(report: Report) -> str:
    """What grows with the square of a document."""
    plan = report.plan
    if not plan.config.n_attention:
        return ""
    again = ", whose keys are made again for every chunk," if plan.config.version == "goldfinch" else ""
    longest = max(plan.times)
    return (
        f" Attention{again} is {plan.step_time.attention_share:.0%} of that arithmetic, and with documents of "
        f"{longest:,} tokens {plan.times[longest].attention_share:.0%}: it grows with the square of the length."
    )


def probe_lines(probe: Probe) -> list[str]:
    """What a probe step took beside the plan of it."""
    what = f"{probe.num_chunks} chunks of {probe.chunk_tokens:,} tokens"
    lines = [
        f"Measured here, one step of {what}, {'' if probe.has_own_weights else 'random weights, '}on {probe.device}:",
        f"  {'tensors, planned':<28}{gigabytes(probe.planned_bytes):>14}",
    ]
    for name, measured, planned in (
        ("allocated on the device", probe.device_bytes, probe.planned_bytes),
        ("tensors alive", probe.live_bytes, probe.planned_bytes),
        ("resident, without gaps", probe.resident_bytes, probe.planned_resident_bytes),
    ):
        if measured:
            lines.append(f"  {name:<28}{gigabytes(measured):>14}, the plan is {planned / measured - 1:+.1%} off")
    lines.append(f"  {'time':<28}{duration(probe.seconds):>14}, {probe.tokens_per_second:,.0f} tokens/s")
    if probe.device == "cpu":
        lines.append("Not measured on a GPU: there is none here.")
        lines += wrapped(
            "A run has more resident: the C library's heap keeps what is freed between two chunks for some seconds."
        )
    return lines


def wrapped(text: str) -> list[str]:
    """A sentence or two in lines of at most 80 columns."""
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def gigabytes(num_bytes: int) -> str:
    """Bytes for people: GB, of small sizes MB."""
    if num_bytes == 0:
        return "0"
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"


def duration(seconds: float) -> str:
    """Seconds for people, in the unit that fits."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1000:,.0f} ms"
