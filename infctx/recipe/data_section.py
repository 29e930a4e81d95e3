"""The data section: files, rows to documents, mixtures, and what is held out."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from infctx.recipe.fields import Count, FewCount, Fraction, Number, Section, Text, number_from_text, refuse


class PieceSection(Section):
    """One piece of a template of one's own."""

    text: Text = Field(description="Text with {column} where a column of the row goes; {{ and }} are braces.")
    train: bool | Annotated[Number, Field(ge=0)] = Field(
        default=False, description="Whether its tokens are trained, or the weight they have as targets."
    )
    when: Text | None = Field(default=None, description="A column; where it is missing or empty the piece is left out.")


class TemplateSection(Section):
    """A template of one's own: pieces of text, one after another."""

    pieces: Annotated[list[PieceSection], Field(min_length=1)] = Field(
        description="The pieces; the end of text has the weight of the last one."
    )
    clean: bool = Field(
        default=False,
        description="Strip each column and make one newline of several, as in the World models' prompts, where an "
        "empty line ends a turn.",
    )


_Paths = Text | Annotated[list[Text], Field(min_length=1)]


class SourceSection(Section):
    """Files, how they are read, and what becomes of their rows."""

    path: _Paths | None = Field(
        default=None,
        description="Paths, globs or URLs (s3://…) of the documents; {stdlib} names the folder of Python's standard "
        "library, {torch} that of the installed torch.",
    )
    exclude: list[Text] = Field(default=[], description="Globs of paths to leave out of `path`.")
    format: Literal[
        "auto", "jsonl", "text", "csv", "tsv", "parquet", "binidx", "code", "code_repository", "huggingface"
    ] = Field(
        default="auto",
        description="What the files hold; auto: by their names, .gz and .zst aside. code: every file of a folder is a "
        "document; code_repository: every folder is one; huggingface: a set of the hub, or saved in a folder.",
    )
    split: Text = Field(default="train", description="Hugging Face: the split.")
    subset: Text | None = Field(default=None, description="Hugging Face: the configuration's name; null: the only one.")
    template: Literal["text", "completion", "instruct", "question", "chat"] | TemplateSection = Field(
        default="text",
        description="How a row becomes a document and which part of it is trained: text, all of it; completion, "
        "instruct, question and chat, the answers; or pieces of one's own.",
    )
    fields: dict[Text, Text] = Field(
        default={}, description="Column of the template: column in the file, where they have other names."
    )
    roles: dict[Text, Literal["system", "user", "assistant", "tool"]] = Field(
        default={}, description="Chat: role in the file: role it is; the usual names are known."
    )
    train_turns: Literal["all", "last"] = Field(
        default="all", description="Chat: train every answer of a conversation, or its last one only."
    )
    weights: dict[Text, Annotated[Number, Field(ge=0)]] = Field(
        default={}, description="Weight of the tokens of a column, or of a role in a chat; 0: read, not trained."
    )
    weight_field: Text | None = Field(
        default=None, description="Column with a number that multiplies the weights of its row."
    )
    weight: Annotated[Number, Field(gt=0)] = Field(
        default=1.0, description="Factor of the weights of all tokens of the set."
    )
    min_tokens: Count | None = Field(default=None, description="Shorter documents are left out and counted.")
    max_tokens: Annotated[Count, Field(ge=2)] | None = Field(
        default=None,
        description="Longest document, with its end of text; null: any, since chunks hold any length.",
    )
    on_long: Literal["stop", "skip", "cut", "split"] = Field(
        default="stop",
        description="At a document above max_tokens: stop; skip it; cut: keep its first max_tokens; split it into "
        "documents of max_tokens. What is lost is counted.",
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop", description="What to do at a row that cannot be read: stop, or skip it and count it."
    )
    on_empty_row: Literal["stop", "skip"] | None = Field(
        default=None,
        description="What to do at a row without text or without anything to train on; null: as on_bad_row.",
    )
    on_duplicate: Literal["keep", "skip", "stop"] = Field(
        default="keep", description="What to do at a document that is the same as an earlier one of its set."
    )
    rechunk_tokens: Annotated[Count, Field(ge=2)] | None = Field(
        default=None,
        description="Join all documents of the set and cut them every so many tokens, each piece a document from a "
        "fresh state, as in pretraining; null: documents as they are.",
    )


class SetSection(SourceSection):
    """One set of a mixture. What it does not say itself is as `data` says."""

    name: Text | None = Field(default=None, description="For the metrics; null: from its path.")
    share: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="Tokens of this set, in proportion to the shares of the other sets."
    )
    epochs: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="Passes over this set in one epoch of the run; may be a fraction. null: 1."
    )
    tokens: Annotated[int, Field(ge=1, lt=2**53)] | None = Field(
        default=None, description="Tokens of this set in one epoch of the run, in whole documents."
    )


SOURCE_KEYS = tuple(SourceSection.model_fields)
TEMPLATE_KEYS = ("template", "fields", "roles", "train_turns", "weights")
"""What belongs to a template: a set with a template of its own takes none of them from `data`."""


class DataSection(SourceSection):
    """The documents, how they are read, and which are held out."""

    sets: Annotated[list[SetSection], Field(min_length=1, max_length=255)] | None = Field(
        default=None, description="Several sets instead of one `path`, each with keys of its own."
    )
    tokenizer: Annotated[Text, Field(pattern=r"^(auto|world|bytes|neox|.*\.json)$")] = Field(
        default="auto",
        description="world, bytes, or the path of a tokenizer JSON (NeoX for Pile models); auto: what "
        "the model file records, else by its vocabulary size.",
    )
    mode: Literal["auto", "stream", "document"] = Field(
        default="auto",
        description="stream: documents back to back, the state runs on from step to step; document: each row of a step "
        "is one whole document from a fresh state; auto: document if and only if bptt.window is document.",
    )
    pack_tokens: Count | None = Field(
        default=None, description="Document mode: put short documents into one row up to this many tokens; null: never."
    )
    order: Literal["random", "file", "length", "bucket"] = Field(
        default="random",
        description="Order of the documents: random, another in each epoch; as in the files; by length, shortest "
        "first; bucket: random, and sorted by length within stretches, so that rows of a step are about as long.",
    )
    validation: Annotated[Fraction | Text | None, BeforeValidator(number_from_text)] = Field(
        default=None, description="Documents held out: a path, or a fraction of whole documents, 0 to 1 exclusive."
    )
    validation_tail: Fraction | None = Field(
        default=None, description="Held out instead: the last fraction of every document's tokens, 0 to 1 exclusive."
    )
    cache: Text = Field(
        default="auto",
        description="Where tokens are kept between runs: a folder; memory: nowhere; auto: large inputs in the user's "
        "cache folder, small ones nowhere.",
    )
    workers: FewCount | Literal["auto"] = Field(
        default="auto", description="Processes that tokenise into the cache; auto: one for each core. Changes no token."
    )

    @model_validator(mode="after")
    def _one_kind_of_validation(self) -> Self:
        if self.validation is not None and self.validation_tail is not None:
            refuse([("data.validation_tail", "cannot stand beside data.validation; keep one of the two")])
        return self

    @model_validator(mode="after")
    def _path_or_sets(self) -> Self:
        problems = []
        if self.sets is None and self.path is None:
            problems.append(("data.path", "missing: give it, or several sets as data.sets"))
        if self.sets is not None and self.path is not None:
            problems.append(("data.path", "cannot stand beside data.sets; give it in each set"))
        for number, one in enumerate(self.sets or []):
            said = [key for key in ("share", "epochs", "tokens") if getattr(one, key) is not None]
            if one.path is None:
                problems.append((f"data.sets[{number}]", "path is missing"))
            if len(said) > 1:
                problems.append((f"data.sets[{number}]", f"{' and '.join(said)} exclude each other; keep one of them"))
        with_share = [one.share is not None for one in self.sets or []]
        if any(with_share) and not all(with_share):
            problems.append(("data.sets", "only some have a share; give one to every set, or to none"))
        refuse(problems or self._problems_of_sources())
        return self

    def _problems_of_sources(self) -> list[tuple[str, str]]:
        problems: list[tuple[str, str]] = []
        for name, source in self.sources():
            where = "data" if self.sets is None else f"data.sets[{name}]"
            if source.on_long != "stop" and source.max_tokens is None:
                problems.append((f"{where}.on_long", "means nothing without max_tokens; set it, or remove on_long"))
            if (source.min_tokens or 0) > (source.max_tokens or 2_000_000_000):
                problems.append((f"{where}.min_tokens", f"{source.min_tokens} is above max_tokens {source.max_tokens}"))
        if self.sets is not None and len({name for name, _ in self.sources()}) < len(self.sets):
            problems.append(("data.sets", "two sets have the same name; give each its own"))
        return problems

    def sources(self) -> list[tuple[str, SetSection]]:
        """The sets by name, each with what `data` says where it says nothing itself."""
        if self.sets is None:
            return [("documents", SetSection.model_construct(**{key: getattr(self, key) for key in SOURCE_KEYS}))]
        found = []
        for one in self.sets:
            own = {*one.model_fields_set, *(TEMPLATE_KEYS if "template" in one.model_fields_set else ())}
            inherited = {key: getattr(self, key) for key in SOURCE_KEYS if key not in own}
            found.append((one.name or _name_of(one.path), one.model_copy(update=inherited)))
        return found


def _name_of(path: str | list[str] | None) -> str:
    """A set's name after its first path: the file or folder before anything with a wildcard."""
    first = path if isinstance(path, str) else (path or ["documents"])[0]
    parts = [part for part in first.split("/") if part and not set(part) & set("*?[")]
    return parts[-1].split(".")[0] or parts[-1] if parts else "documents"
