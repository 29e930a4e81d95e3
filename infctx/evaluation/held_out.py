"""The documents that a model is measured on: files that a command names, or what a run held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infctx.checkpoint.model_file import ModelFile
from infctx.data.document_set import DocumentSet
from infctx.data.load import LoadedData, default_workers, load_sets
from infctx.data.tokenizer import Tokenizer
from infctx.errors import DataError, InfctxError
from infctx.model.finch import Finch
from infctx.recipe.data_section import DataSection
from infctx.recipe.load import RECIPE_FILE, load_recipe
from infctx.recipe.schema import Recipe
from infctx.run_data import Say, choose_tokenizer, open_data, set_spec

# What training leaves out or cuts is measured all the same.
_WHOLE = {"sets": None, "exclude": [], "format": "auto", "rechunk_tokens": None, "on_duplicate": "keep"}
_WHOLE |= {"min_tokens": None, "max_tokens": None, "on_bad_row": "stop", "on_empty_row": None}
_WHOLE |= {"validation": None, "validation_tail": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model that is measured.

    Attributes:
        label: what people know it by.
        model: in evaluation mode, where it is to run.
        tokenizer: its name, as its file or run records it; None where nothing does.
        recipe: of a run.
    """

    label: str
    model: Finch
    tokenizer: str | None
    recipe: Recipe | None = None

    @property
    def as_file(self) -> ModelFile:
        """What the data package asks of a model file."""
        return ModelFile(self.model, self.tokenizer, "")

    def choose_tokenizer(self, name: str = "auto") -> Tokenizer:
        """The tokenizer of that name, or the one that the recipe, the file or the vocabulary names.

        Raises: RecipeError, DataError: see `run_data.choose_tokenizer`.
        """
        if name == "auto" and self.recipe is not None:
            name = self.recipe.data.tokenizer
        return choose_tokenizer(name, self.as_file)


def recipe_of(path: Path) -> Recipe | None:
    """The recipe of a run folder; None for anything else."""
    return load_recipe(path / RECIPE_FILE) if (path / RECIPE_FILE).is_file() else None


def documents_of_run(source: Source, *, say: Say = lambda line: None) -> DocumentSet:
    """What the run held out.

    Raises: InfctxError: it held out nothing, or is none.
    """
    if source.recipe is None:
        raise InfctxError(f"{source.label} is a model and no run: give the documents to measure it on with --data.")
    held_out = open_data(source.recipe, model_file=source.as_file, say=say).validation
    if held_out is None:
        raise InfctxError(f"{source.label} held out no documents (data.validation): give some with --data.")
    return held_out


def documents_of_files(
    paths: Sequence[str],
    source: Source,
    *,
    tokenizer: Tokenizer,
    template: str | None = None,
    option: str = "--data",
) -> DocumentSet:
    """Every document of some files, whole, rendered as the run's recipe says or by a template of another name.

    Args:
        paths: files, globs or URLs, of any kind that training reads.
        template: a built-in one; None = the recipe's, or text.
        option: what named the files, for messages.
    Raises:
        DataError: names file and row: a template that does not fit, nothing to predict, ids beyond the vocabulary.
    """
    section = source.recipe.data if source.recipe is not None else DataSection(path=list(paths))
    changed: dict[str, object] = {**_WHOLE, "path": list(paths)}
    if template is not None:
        changed |= {
            "template": template,
            "weight_field": None,
            "fields": {},
            "roles": {},
            "weights": {},
            "train_turns": "all",
        }
    alone = section.model_copy(update=changed)
    _, one = alone.sources()[0]
    try:
        loaded: LoadedData = load_sets(
            [set_spec("evaluation", one)],
            tokenizer=tokenizer,
            vocab_size=source.model.config.vocab_size,
            cache="auto",
            cache_root=Path.home() / ".cache" / "infctx" / "data",
            workers=default_workers(),
        )
    except DataError as error:
        # The keys of a recipe that messages name are options here.
        told = str(error).replace("data.template=", "--template ").replace("data.path=", f"{option} ")
        told = told.replace("data.tokenizer=", "--tokenizer ").replace("data.tokenizer", "--tokenizer")
        told = told.replace(" Set data.on_bad_row=skip to skip and count such rows.", "")
        raise DataError(told) from error
    documents = loaded.documents
    if not documents.num_trained.any():
        raise DataError(f"{option} {' '.join(paths)}: nothing to predict: no token of it has a weight above 0.")
    return documents
