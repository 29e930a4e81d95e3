"""infctx model new, infctx model info: make and inspect models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from infctx.cli_output import LARGEST_SEED, AsJson, answer, leave, say, shown
from infctx.errors import InfctxError
from infctx.exit_codes import EXIT_USER

model_app = typer.Typer(help="Make, inspect and rework models.", no_args_is_help=True, rich_markup_mode=None)

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A model file or folder.")]


@model_app.command("new", epilog="Example: infctx model new --layers 6 --channels 128 --vocab 257 --output tiny.pth")
def model_new(
    output: Annotated[Path, typer.Option(help="The file to write, .pth or .safetensors.")],
    layers: Annotated[int, typer.Option(min=2, help="Layers, at least 2.")],
    channels: Annotated[int, typer.Option(min=1, help="Channels; a multiple of the head size.")],
    vocab: Annotated[int, typer.Option(min=2, help="Vocabulary: 65536 for World, 257 for bytes.")] = 65536,
    version: Annotated[
        str,
        typer.Option(
            help="6 (Finch), 5.2 (Eagle), 6c2 (Finch-C2), goldfinch (the last third of the layers attend), or gptalpha "
            "(all attend)."
        ),
    ] = "6",
    head_size: Annotated[int, typer.Option(min=1, help="Channels of one head.")] = 64,
    ffn: Annotated[int | None, typer.Option(min=1, help="Feed-forward width; 3.5 × channels by default.")] = None,
    lerp_rank: Annotated[int | None, typer.Option(min=1, help="Rank of Finch's mixes; 32, or 64 at 4096.")] = None,
    decay_rank: Annotated[int | None, typer.Option(min=1, help="Rank of Finch's decay; 64, or 128 at 4096.")] = None,
    ratio: Annotated[
        int | None, typer.Option(min=2, help="Of a goldfinch: layers to layers that attend; 3 by default.")
    ] = None,
    front: Annotated[str | None, typer.Option(help="Of a goldfinch: what the other layers are, 6c2 or 6.")] = None,
    rope: Annotated[
        bool | None,
        typer.Option("--rope/--no-rope", help="Rotary positions in attention; by default in a gptalpha alone."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the initial weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    force: Annotated[bool, typer.Option(help="Replace an output that exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a model with fresh weights, to train from scratch."""
    import torch

    from infctx.data.tokenizer import TOKENIZER_OF_VOCAB_SIZE
    from infctx.export.catalog import check_output, save_model
    from infctx.model.finch import Finch
    from infctx.model.init import initialise_, new_config

    if dtype not in ("fp32", "bf16"):
        raise InfctxError(f"--dtype {dtype}: expected fp32 or bf16.")
    format = "safetensors" if output.suffix == ".safetensors" else "pth"
    check_output(output, format=format, force=force)
    config = new_config(
        version=version,
        n_layer=layers,
        n_embd=channels,
        vocab_size=vocab,
        head_size=head_size,
        dim_ffn=ffn,
        lerp_rank=lerp_rank,
        decay_rank=decay_rank,
        ratio=ratio,
        front=front,
        uses_rope=rope,
    )
    model = Finch(config)
    initialise_(model, seed=seed)
    tokenizer = TOKENIZER_OF_VOCAB_SIZE.get(vocab)
    save_model(
        model, output, format=format, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16, tokenizer=tokenizer
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"Wrote {output}: {count:,} parameters.")
    answer({"path": str(output), "parameters": count}, as_json)


@model_app.command("info", epilog="Example: infctx model info RWKV-x060-World-1B6.pth --tensors 'blocks.0.*'")
def model_info(
    path: ModelPath,
    tensors: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="List the tensors whose names match, as '*' or 'blocks.0.*'.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Read every value; name tensors with NaN, infinity.")] = False,
    hash: Annotated[bool, typer.Option("--hash", help="SHA-256 of the file, or of each file of the folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Version, sizes and contents of a model, read from its tensors."""
    from infctx.checkpoint.file_facts import file_facts, file_hashes
    from infctx.checkpoint.model_file import fingerprint, open_model
    from infctx.surgery.info import find_bad_tensors, model_facts, tensor_table

    model = open_model(path)
    facts: dict[str, Any] = {"path": str(path), **file_facts(path)._asdict(), **model_facts(model)}
    facts["fingerprint"] = fingerprint(model)
    table = None if tensors is None else tensor_table(model, tensors)
    if hash:
        facts["sha256"] = file_hashes(path)
    bad = list(find_bad_tensors(open_model(path, is_streamed=True))) if check else []
    if check:
        facts["bad_tensors"] = [found._asdict() for found in bad]
    if not as_json:
        print("\n".join(f"{key:<15} {shown(value)}" for key, value in facts.items() if key != "bad_tensors"))
        for row in table or []:
            print(f"{row['name']:<40} {row['dtype']!s:<10} {row['shape']}")
        if check and not bad:
            print(f"{'check':<15} every value is a finite number")
    answer(facts if table is None else {**facts, "tensors": table}, as_json)
    if bad:
        named = "\n".join(f"  {name}: {nan:,} NaN, {infinite:,} infinite" for name, nan, infinite in bad)
        leave(EXIT_USER, f"Error: {path}: {len(bad)} tensors hold values that are no finite numbers:\n{named}")
