"""A recipe's opened data, ready to be looked at."""

from __future__ import annotations

from infctx.data.tokenizer import tokenizer_by_name
from infctx.data_view.opened import DataToView
from infctx.recipe.schema import Recipe
from infctx.run_data import RunData, sampled_rows, step_source


def view_of(recipe: Recipe, data: RunData) -> DataToView:
    """Put together what is shown of a resolved recipe's data."""
    return DataToView(
        training=data.training,
        validation=data.validation,
        loaded=data.loaded,
        account=data.account(),
        tokenizer=tokenizer_by_name(data.tokenizer),
        source=step_source(recipe, data),
        order=data.order,
        chunk_tokens=recipe.bptt.chunk_tokens,
        pack_tokens=recipe.data.pack_tokens,
        samples=list(sampled_rows(recipe.data)),
    )
