"""A document: its token ids, what each is worth as a target, and where it came from."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infctx.data.tokenizer import TokenIds


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Document:
    """One document, never changed after it is made.

    Attributes:
        tokens: ids [n], n >= 1; uint16 where every id fits, else int32.
        weights: float32 [n], the weight of each token as a target. weights[0] is 0: nothing predicts the first token.
        origin: "file.jsonl:12".
        set_index: of the set of a mixture that it comes from.
    """

    tokens: TokenIds
    weights: npt.NDArray[np.float32]
    origin: str
    set_index: int = 0

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 1, f"{self.origin}: tokens of shape {self.tokens.shape}"
        assert len(self.tokens) >= 1, f"{self.origin}: no tokens"
        assert self.weights.shape == self.tokens.shape, f"{self.origin}: weights of shape {self.weights.shape}"
        assert self.weights[0] == 0, f"{self.origin}: the first token has weight {self.weights[0]}"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_trained_tokens(self) -> int:
        """The number of tokens that are targets with a weight above 0."""
        return int(np.count_nonzero(self.weights > 0))


def smallest_ids(ids: TokenIds) -> TokenIds:
    """Store ids as uint16 where every id fits, else as int32: the corpus is held in memory."""
    return ids.astype(np.uint16 if int(ids.max(initial=0)) <= np.iinfo(np.uint16).max else np.int32)
