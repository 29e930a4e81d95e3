"""infctx model upgrade, grow, vocabulary, merge: other models out of models that are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infctx.cli_model import ModelPath, model_app
from infctx.cli_output import LARGEST_SEED, AsJson, answer, say
from infctx.errors import DataError, InfctxError

if TYPE_CHECKING:
    from infctx.data.tokenizer import Tokenizer
    from infctx.model.tensors import ModelTensors
    from infctx.surgery.vocabulary import AddedTokens

__all__ = ["model_app"]

Output = Annotated[Path, typer.Option(help="The file to write; its name says the format: .pth, .safetensors.")]
KeptDtype = Annotated[str, typer.Option(help="keep (each tensor as it is), fp32, fp16 or bf16.")]
Force = Annotated[bool, typer.Option(help="Replace an output that exists.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the random values.")]


@model_app.command("upgrade", epilog="Example: infctx model upgrade RWKV-5-World-3B.pth --output finch-3b.safetensors")
def model_upgrade(
    model: ModelPath,
    output: Output,
    to: Annotated[str, typer.Option(help="finch, finch-c2 or goldfinch.")] = "finch",
    lerp_rank: Annotated[int | None, typer.Option(min=1, help="Of an Eagle's mixes; 32, or 64 at 4096.")] = None,
    decay_rank: Annotated[int | None, typer.Option(min=1, help="Of an Eagle's decay; 64, or 128 at 4096.")] = None,
    ratio: Annotated[
        int | None, typer.Option(min=2, help="For goldfinch: layers to layers that attend; 6 by default.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="For goldfinch: keep (the last layers become GOLD) or add (GOLD behind all, the same function)."
        ),
    ] = None,
    seed: Seed = 0,
    dtype: KeptDtype = "keep",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Turn an Eagle into the Finch that computes the same; or a Finch into a Finch-C2 or a GoldFinch, to be trained on.

    An Eagle's mixes are kept in float32: rounding them again would change what the model computes.
    """
    from infctx.surgery.fresh import origins_of
    from infctx.surgery.upgrade_path import upgrade

    source = _opened([model], output, dtype=dtype, force=force)[0]
    result = upgrade(source, to=to, lerp_rank=lerp_rank, decay_rank=decay_rank, ratio=ratio, layers=layers, seed=seed)
    same_as = source if to == "finch" or layers == "add" else None
    facts = _write(result, output, dtype=dtype, force=force, source=same_as)
    kept, changed, fresh = origins_of(result, source)
    say(f"Kept as they are: {kept:,} parameters; computed from the source's: {changed:,}; new: {fresh:,}.")
    if same_as is None:
        facts |= _difference(source, output)
    origins = {"kept_parameters": kept, "changed_parameters": changed, "fresh_parameters": fresh}
    answer({**facts, **origins}, as_json)


@model_app.command("grow", epilog="Example: infctx model grow finch-3b.pth --layers 48 --output deeper.pth")
def model_grow(
    model: ModelPath,
    output: Output,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the result.")] = None,
    how: Annotated[
        str,
        typer.Option(
            help="interleave: copies behind their originals that add nothing yet, the same function; stack: all layers "
            "once more, behind; scaled: as interleave, adding --scale times what the originals add."
        ),
    ] = "interleave",
    scale: Annotated[float | None, typer.Option(help="For scaled: above 0, at most 1.")] = None,
    source_layers: Annotated[
        str | None, typer.Option(help="Which layer each layer of the result is made of, as 0,1,1,2.")
    ] = None,
    lerp_rank: Annotated[int | None, typer.Option(min=1, help="Rank of the mixes; more, the same function.")] = None,
    decay_rank: Annotated[int | None, typer.Option(min=1, help="Rank of the decay; more, the same function.")] = None,
    seed: Seed = 0,
    dtype: KeptDtype = "keep",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Add layers that are copies of others, or widen the low-rank parts of a Finch."""
    from infctx.surgery.grow import grow_depth, grow_ranks, is_exact

    chosen = None if source_layers is None else _numbers(source_layers, option="--source-layers")
    num_layers = len(chosen) if layers is None and chosen is not None else layers
    if num_layers is None and lerp_rank is None and decay_rank is None:
        raise InfctxError("nothing to grow: give --layers, --lerp-rank or --decay-rank.")
    source = result = _opened([model], output, dtype=dtype, force=force)[0]
    if num_layers is not None:
        result = grow_depth(result, num_layers=num_layers, how=how, scale=scale, layers=chosen)
    elif how != "interleave" or scale is not None:
        raise InfctxError("--how and --scale: say how layers are added; give --layers with them.")
    if lerp_rank is not None or decay_rank is not None:
        result = grow_ranks(result, lerp_rank=lerp_rank, decay_rank=decay_rank, seed=seed)
    is_same = num_layers is None or is_exact(how)
    facts = _write(result, output, dtype=dtype, force=force, source=source if is_same else None)
    if not is_same:
        say("It does not compute what the source computes; train it on.")
    answer(facts, as_json)


@model_app.command(
    "vocabulary", epilog="Example: infctx model vocabulary m.pth --token '<call>' --output m2.safetensors"
)
def model_vocabulary(
    model: ModelPath,
    output: Output,
    size: Annotated[int | None, typer.Option(min=1, help="Rows of embedding and head in the result.")] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Allow a smaller size: the last rows are lost.")] = False,
    token: Annotated[list[str] | None, typer.Option(help="A text that becomes a token; again for more.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="A file of such texts, one a line.")] = None,
    first_id: Annotated[
        int | None, typer.Option(min=0, help="Id of the first new token; 65530 takes World's unused rows first.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Of the model, where it does not say.")] = None,
    vocabulary_file: Annotated[
        Path | None, typer.Option(help="Write World's vocabulary with the new tokens, for programs that read one.")
    ] = None,
    seed: Seed = 0,
    dtype: KeptDtype = "keep",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Resize embedding and head, or add rows for new tokens; the logits of the old ids stay what they are.

    infctx's own tokenizers do not learn the new tokens: give training data as binidx, made by a program that reads the
    vocabulary file.
    """
    from infctx.surgery.vocabulary import add_tokens, resize_vocabulary

    texts = [*(token or []), *(_lines(tokens) if tokens is not None else [])]
    if (size is None) == (not texts):
        raise InfctxError("give either --size or new tokens (--token, --tokens).")
    if texts and drop:
        raise InfctxError("--drop: goes with --size; new tokens drop nothing.")
    if size is not None and (first_id is not None or vocabulary_file is not None or tokenizer is not None):
        raise InfctxError("--first-id, --tokenizer and --vocabulary-file: go with new tokens, not with --size.")
    source = _opened([model], output, dtype=dtype, force=force)[0]
    if size is not None:
        result = resize_vocabulary(source, size, drops_rows=drop, seed=seed)
        facts = _write(result, output, dtype=dtype, force=force)
        kept = min(size, source.config.vocab_size)
        answer({**facts, **_difference_of_old_ids(source, output, kept)}, as_json)
        return
    known = _tokenizer_of(source, tokenizer)
    if vocabulary_file is not None:
        from infctx.export.sources import refuse_same_place
        from infctx.export.vocabulary_file import check_vocabulary_file

        refuse_same_place([model, output], vocabulary_file)
        check_vocabulary_file(vocabulary_file, tokenizer=known, force=force)
    added = add_tokens(source, texts, tokenizer=known, first_id=first_id)
    facts = _write(added.model, output, dtype=dtype, force=force)
    facts |= _difference_of_old_ids(source, output, min(added.ids.values()))
    _tell_tokens(added, known.name, vocabulary_file)
    answer({**facts, "ids": added.ids, "replaced_rows": added.replaced}, as_json)


@model_app.command("merge", epilog="Example: infctx model merge a.pth b.pth --weight 0.7 --weight 0.3 --output ab.pth")
def model_merge(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Model files of the same sizes.")],
    output: Output,
    method: Annotated[str, typer.Option(help="linear, slerp (of two), or task (adds to --base).")] = "linear",
    weight: Annotated[list[float] | None, typer.Option(help="One for each model, in order; 1 each by default.")] = None,
    base: Annotated[Path | None, typer.Option(help="What the models were tuned from, for task.")] = None,
    normalize: Annotated[bool, typer.Option(help="Divide the weights of linear by their sum.")] = True,
    dtype: Annotated[str, typer.Option(help="keep (as in the first model), fp32, fp16 or bf16.")] = "keep",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Merge models tensor by tensor, in float32."""
    import torch

    from infctx.export.options import DTYPES
    from infctx.surgery.merge import merge_models

    paths = [*models, base] if base is not None else models
    opened = _opened(paths, output, dtype=dtype, force=force)
    result = merge_models(
        opened[: len(models)],
        method=method,
        weights=[1.0] * len(models) if weight is None else weight,
        base=None if base is None else opened[-1],
        # What is to be written in float32 is not rounded to a source's dtype on the way.
        dtype=wanted if isinstance(wanted := DTYPES[dtype], torch.dtype) else None,
        is_normalised=normalize,
    )
    answer(_write(result, output, dtype=dtype, force=force), as_json)


def _opened(paths: Sequence[Path], output: Path, *, dtype: str, force: bool) -> list[ModelTensors]:
    """The sources, when it is sure that the output can be written."""
    from infctx.checkpoint.model_file import open_model
    from infctx.export.catalog import check_output
    from infctx.export.options import DTYPES
    from infctx.export.sources import refuse_same_place

    if dtype not in DTYPES:
        raise InfctxError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    if output.suffix not in (".pth", ".safetensors"):
        raise InfctxError(
            f"{output}: expected a name that ends in .pth or .safetensors. infctx model convert writes other formats."
        )
    refuse_same_place(paths, output)
    check_output(output, format=output.suffix[1:], force=force)
    return [open_model(path, is_streamed=True) for path in paths]


def _write(
    result: ModelTensors,
    output: Path,
    *,
    dtype: str,
    force: bool,
    source: ModelTensors | None = None,
) -> dict[str, Any]:
    """Write, read back, compare and tell; source: what computes the same, None where nothing does.

    Returns:
        Facts for programs.
    """
    from infctx.cli_export import with_bar
    from infctx.export.options import DTYPES, ExportOptions
    from infctx.export.proved import export_model
    from infctx.export.verify import probe_logits

    options, format = ExportOptions(dtype=DTYPES[dtype]), output.suffix[1:]
    expected = None if source is None else probe_logits(source)
    written = with_bar(
        result,
        lambda watched: export_model(watched, output, format=format, options=options, expected=expected, force=force),
    )
    for note in written.notes:
        say(note)
    name, num_bytes = result.config.name, written.num_bytes
    say(f"Wrote {output}: {name}, {result.num_parameters:,} parameters ({dtype} dtype, {num_bytes:,} bytes).")
    facts = {"path": str(output), "version": result.config.version, "parameters": result.num_parameters}
    if source is None:
        say("Read back: its logits are those of what was to be written.")
        return facts
    say(
        f"Read back: largest logit difference {written.max_logit_difference:.2e} against the source, in float32 "
        f"(the logits' standard deviation is {written.logit_std:.2g})."
    )
    return {**facts, "max_logit_difference": written.max_logit_difference}


def _difference(source: ModelTensors, output: Path) -> dict[str, Any]:
    """How far the logits of a model that does not compute the same are from its source's."""
    import torch

    from infctx.checkpoint.model_file import open_model
    from infctx.export.verify import probe_logits

    before, after = probe_logits(source), probe_logits(open_model(output, is_streamed=True))
    difference = float((after - before).abs().max())
    cosine = float(torch.nn.functional.cosine_similarity(before, after, dim=-1).mean())
    say(
        f"It does not compute what the source computes; train it on. Against the source, on random ids: largest logit "
        f"difference {difference:.2g} (the logits' standard deviation is {float(before.std()):.2g}), mean cosine "
        f"{cosine:.3f}."
    )
    return {"max_logit_difference": difference, "logit_cosine": cosine}


def _difference_of_old_ids(source: ModelTensors, output: Path, num_ids: int) -> dict[str, Any]:
    """How far the logits of the ids that stay are from what they were."""
    from infctx.checkpoint.model_file import open_model
    from infctx.export.verify import probe_logits

    before, after = (
        probe_logits(model, num_ids=num_ids)[:, :num_ids] for model in (source, open_model(output, is_streamed=True))
    )
    difference = float((after - before).abs().max())
    say(f"Largest difference of the logits of the first {num_ids:,} ids: {difference:.2e} against the source.")
    return {"max_logit_difference": difference}


def _tell_tokens(added: AddedTokens, tokenizer: str, vocabulary_file: Path | None) -> None:
    from infctx.export.vocabulary_file import write_vocabulary_file

    if vocabulary_file is not None:
        write_vocabulary_file(vocabulary_file, added.ids)
        say(f"Wrote {vocabulary_file}.")
    say(
        f"New ids {min(added.ids.values())} to {max(added.ids.values())}, {added.replaced} of them in rows that were "
        f"there. infctx's own tokenizer {tokenizer} does not make them: train on ids (binidx) of another program."
    )


def _tokenizer_of(source: ModelTensors, name: str | None) -> Tokenizer:
    from infctx.data.tokenizer import tokenizer_by_name, tokenizer_for_vocab

    return tokenizer_by_name(name or source.tokenizer or tokenizer_for_vocab(source.config.vocab_size))


def _lines(path: Path) -> list[str]:
    """The lines of a file of tokens; spaces in them count."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--tokens {path}: cannot be read: {error}.") from error
    return [line for line in text.split("\n") if line]


def _numbers(text: str, *, option: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InfctxError(f"{option} {text}: expected numbers with commas between them, as 0,1,1,2.") from None
