"""infctx adapter: adapters of RWKV-PEFT and of peft, looked at and turned into each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infctx.cli_export import Alpha, Start
from infctx.cli_output import AsJson, answer, say, shown
from infctx.errors import InfctxError

adapter_app = typer.Typer(
    help="Turn adapters of RWKV-PEFT into peft's layout and back, and inspect them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@adapter_app.command(
    "import", epilog="Example: infctx adapter import rwkv-0.pth --base finch.pth --alpha 32 --output my_adapter"
)
def adapter_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .pth of RWKV-PEFT: LoRA, PiSSA, DiSHA or state.")],
    base: Annotated[Path, typer.Option(help="The model file it was trained on.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    alpha: Alpha = None,
    start: Start = None,
    force: Annotated[bool, typer.Option(help="Replace a folder that holds an adapter.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter of RWKV-PEFT as a folder in peft's layout; a tuned state as tensors alone."""
    from infctx.checkpoint.model_file import open_model
    from infctx.export.adapter_files import describe_adapter, read_adapter, write_adapter_folder

    changes = read_adapter(file, alpha=alpha, start=start)
    write_adapter_folder(changes, output, base=open_model(base), file=str(file), force=force)
    facts = describe_adapter(output)
    say(f"Wrote {output}: {facts['kind']}, {facts['parameters']:,} parameters.")
    answer(facts, as_json)


@adapter_app.command("export", epilog="Example: infctx adapter export runs/mine --output mine-lora.pth")
def adapter_export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_FOLDER", help="A run folder, or a folder in peft's layout.")
    ],
    output: Annotated[Path, typer.Option(help="The .pth to write; its note is NAME.json beside it.")],
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; by default bf16 for a state, else as trained.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as a .pth of RWKV-PEFT, and beside it a note with alpha, which that format does not hold."""
    import torch

    from infctx.export.adapter_files import note_path, read_adapter, write_rwkv_peft

    dtypes = {None: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if dtype not in dtypes:
        raise InfctxError(f"--dtype {dtype}: expected one of fp32, fp16, bf16.")
    note = write_rwkv_peft(read_adapter(source), output, dtype=dtypes[dtype], file=str(source), force=force)
    alpha = "" if note["alpha"] is None else f", alpha {note['alpha']:g}"
    say(f"Wrote {output} ({note['kind']}{alpha}) and {note_path(output)}.")
    answer({"path": str(output), "note": str(note_path(output)), **note}, as_json)


@adapter_app.command("info", epilog="Example: infctx adapter info rwkv-0.pth")
def adapter_info(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A .pth, a folder in peft's layout, or a run folder.")],
    as_json: AsJson = False,
) -> None:
    """Kind, ranks, matrices, and what was trained beside them."""
    from infctx.export.adapter_files import describe_adapter

    facts = describe_adapter(path)
    if not as_json:
        print("\n".join(f"{key:<17} {'unknown' if value is None else shown(value)}" for key, value in facts.items()))
        if facts["kind"] == "lora" and facts["alpha"] is None:
            say("A PiSSA looks the same: with its init_pissa.pth it is one.")
    answer(facts, as_json)
