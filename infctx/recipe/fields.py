"""What the sections of a recipe are made of: counts, numbers, texts, and how a section refuses."""

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

_NUMBER_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def number_from_text(value: object) -> object:
    """Read `1e-5` as a number: YAML 1.1 readers hand it over as text."""
    if isinstance(value, str) and _NUMBER_TEXT.fullmatch(value):
        return float(value)
    return value


def tuple_from_list(value: object) -> object:
    """YAML and JSON have lists only; strict validation would refuse them for a tuple."""
    return tuple(value) if isinstance(value, list) else value


# Far above any run, and low enough that products of two counts still fit the 64-bit integers of torch.
Count = Annotated[int, Field(ge=1, le=2_000_000_000)]
# Of things that each take memory or time before a run begins.
FewCount = Annotated[int, Field(ge=1, le=65_536)]
CountOrZero = Annotated[int, Field(ge=0, le=2_000_000_000)]
Number = Annotated[float, BeforeValidator(number_from_text), Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
Fraction = Annotated[Number, Field(gt=0, lt=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]


def refuse(problems: list[tuple[str, str]]) -> None:
    """Raise every (dotted key, problem) as one validation error, if there is any."""
    if problems:
        text = "; ".join(f"{key}: {problem}" for key, problem in problems)
        # The braces of a message would be read as fields of the template.
        raise PydanticCustomError("recipe", "{text}", {"text": text, "problems": problems})


class Section(BaseModel):
    """A frozen part of a recipe that refuses keys it does not know."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
