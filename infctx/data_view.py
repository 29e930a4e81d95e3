"""What a person sees of the data: the ledger, and documents with trained tokens in colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from infctx.data.document import Document
from infctx.data.tokenizer import END_OF_TEXT, Tokenizer

SHOWN_TOKENS = 400


def print_data(documents: Sequence[Document], tokenizer: Tokenizer, account: Mapping[str, Any]) -> None:
    """Print the beginning of each document and the ledger on stdout."""
    console = Console(highlight=False)
    for document in documents:
        counts = f"{len(document):,} tokens, {document.num_trained_tokens:,} trained"
        console.print(Text(document.origin, style="bold"), counts, markup=False)
        console.print(_coloured(document, tokenizer))
        console.print()
    tokens = account["tokens"]
    console.print(f"documents {account['documents']:,}   rejected rows {len(account['rejected_rows']):,}")
    console.print(
        f"tokens in {tokens['in']:,} = trained {tokens['trained']:,} + masked {tokens['masked']:,} "
        f"+ dropped {tokens['dropped']:,}"
    )
    held_out = account["held_out"]
    console.print(f"held out besides: {held_out['tokens']:,} tokens of {held_out['documents']:,} documents")
    for row in account["rejected_rows"][:10]:
        console.print(f"  {row['file']}:{row['line']}: {row['reason']}", style="yellow", markup=False)


def _coloured(document: Document, tokenizer: Tokenizer) -> Text:
    """Green where a token is trained, dim where it is only read."""
    text = Text()
    ids, weights = document.tokens[:SHOWN_TOKENS].tolist(), document.weights[:SHOWN_TOKENS].tolist()
    begin = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or (weights[i] > 0) != (weights[begin] > 0):
            piece = tokenizer.decode([token for token in ids[begin:i] if token != END_OF_TEXT])
            # A terminal would obey control characters.
            piece = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
            end = "⏹" if END_OF_TEXT in ids[begin:i] else ""
            text.append(piece + end, style="green" if weights[begin] > 0 else "dim")
            begin = i
    if len(document) > SHOWN_TOKENS:
        text.append(f" … {len(document) - SHOWN_TOKENS:,} more tokens", style="italic")
    return text
