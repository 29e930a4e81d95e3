"""The commands that write models in other formats: `infctx export` and `infctx model convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infctx.cli_output import AsJson, answer, say
from infctx.errors import InfctxError

if TYPE_CHECKING:
    from torch import Tensor

    from infctx.export.options import ExportOptions
    from infctx.export.proved import Exported
    from infctx.model.tensors import ModelTensors

# Above this much, reading a model takes long enough for a bar.
_BYTES_WITH_BAR = 500_000_000

Format = Annotated[
    str | None,
    typer.Option(help="pth, safetensors, hf, fla or gguf; without, what the output's name ends in."),
]
Dtype = Annotated[str, typer.Option(help="fp32, fp16, bf16, q8_0 (gguf only), or keep: as it is stored.")]
ShardSize = Annotated[
    float, typer.Option(min=0.000001, help="Most of one file of a folder of safetensors, in GB (10^9 bytes).")
]
Code = Annotated[
    Path | None,
    typer.Option(help="hf: a folder with modeling_rwkv6.py and configuration_rwkv6.py, to be carried along."),
]
Alpha = Annotated[float | None, typer.Option(help="alpha of a LoRA; RWKV-PEFT's files do not hold it.")]
Start = Annotated[Path | None, typer.Option("--init", help="The second file of a PiSSA, init_pissa.pth.")]
Force = Annotated[bool, typer.Option(help="Replace an output that exists.")]


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder or a model.")],
    output: Annotated[Path, typer.Option(help="The file or folder to write.")],
    format: Format = None,
    dtype: Dtype = "bf16",
    adapter: Annotated[
        Path | None,
        typer.Option(help="Merge this onto a model: a .pth of RWKV-PEFT, a folder in peft's layout, or a run."),
    ] = None,
    alpha: Alpha = None,
    start: Start = None,
    onto: Annotated[
        str | None,
        typer.Option(
            help="After training on a quantised base: trained adds the adapter to the base it was trained on "
            "(the default), original to the weights of the file."
        ),
    ] = None,
    last_weights: Annotated[
        bool, typer.Option("--last-weights", help="Of a run that averages its weights, take the last ones instead.")
    ] = False,
    shard_size: ShardSize = 5.0,
    code: Code = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Merge the adapter, write the model, read it back and compare.

    The formats: pth and safetensors under the official names (safetensors without a suffix becomes a folder of shards),
    hf as the RWKV models on the Hugging Face hub, fla for flash-linear-attention, gguf for llama.cpp.
    """
    from infctx.export.catalog import check_output, format_of
    from infctx.trained import open_for_export

    options = _options(dtype, shard_size, code)
    chosen = format_of(output, format)
    check_output(output, format=chosen, force=force)
    if adapter is None and (alpha is not None or start is not None):
        raise InfctxError("--alpha and --init tell of an --adapter; there is none.")
    if onto not in (None, "trained", "original"):
        raise InfctxError(f"--onto {onto}: expected trained or original.")
    opened = open_for_export(source, adapter=adapter, alpha=alpha, start=start, last_weights=last_weights, onto=onto)
    for line in opened.notes:
        say(line)
    facts: dict[str, object] = {"averaged_weights": opened.is_averaged}
    if opened.difference is not None:
        facts["onto"] = opened.onto
        facts["merge_weight_difference"], facts["merge_logit_difference"] = opened.difference
    written = _write(opened.source, output, chosen, options, force=force, dtype=dtype, expected=opened.logits)
    answer(written | facts, as_json)


def convert(
    source: Annotated[Path, typer.Argument(metavar="MODEL", help="A model of any format.")],
    output: Annotated[Path, typer.Option(help="The file or folder to write.")],
    format: Format = None,
    dtype: Dtype = "keep",
    shard_size: ShardSize = 5.0,
    code: Code = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a model in another format, one tensor in memory at a time, read it back and compare."""
    from infctx.checkpoint.model_file import open_model
    from infctx.export.catalog import check_output, format_of

    options = _options(dtype, shard_size, code)
    chosen = format_of(output, format)
    check_output(output, format=chosen, force=force)
    opened = open_model(source, is_streamed=True)
    answer(_write(opened, output, chosen, options, force=force, dtype=dtype), as_json)


def _options(dtype: str, shard_size: float, code: Path | None) -> ExportOptions:
    from infctx.export.options import DTYPES, ExportOptions

    if dtype not in DTYPES:
        raise InfctxError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    return ExportOptions(dtype=DTYPES[dtype], shard_bytes=int(shard_size * 1e9), code=code)


def _write(
    source: ModelTensors,
    output: Path,
    format: str,
    options: ExportOptions,
    *,
    force: bool,
    dtype: str,
    expected: Tensor | None = None,
) -> dict[str, object]:
    """Write, prove and tell; returns what a program is told."""
    from infctx.export.proved import export_model

    def write(watched: ModelTensors) -> Exported:
        return export_model(watched, output, format=format, options=options, expected=expected, force=force)

    written = with_bar(source, write)
    for note in written.notes:
        say(note)
    say(f"Wrote {output} ({format}, {dtype}, {written.num_bytes:,} bytes).")
    say(
        f"Read back: largest logit difference {written.max_logit_difference:.2e} against the source "
        f"(the logits' standard deviation is {written.logit_std:.2g})."
    )
    facts = {"path": str(output), "format": format, "max_logit_difference": written.max_logit_difference}
    writing, proving = written.seconds
    seconds = {"writing": round(writing, 2), "proving": round(proving, 2)}
    return {**facts, "bytes": written.num_bytes, "seconds": seconds, "notes": list(written.notes)}


def with_bar(source: ModelTensors, write: Callable[[ModelTensors], Exported]) -> Exported:
    """Show how many of the source's bytes have been read, where that takes a while: once to compute, once to write."""
    from dataclasses import replace

    total = 2 * sum(tensor.num_bytes for tensor in source.tensors.values())
    if total < _BYTES_WITH_BAR:
        return write(source)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=total)
        watched = {
            name: tensor._replace(read=_counted(tensor.read, lambda size=tensor.num_bytes: bar.advance(task, size)))
            for name, tensor in source.tensors.items()
        }
        return write(replace(source, tensors=watched))


def _counted(read: Callable[[], object], count: Callable[[], None]) -> Callable[[], object]:
    def read_and_count() -> object:
        tensor = read()
        count()
        return tensor

    return read_and_count
