"""What all text encoders share: texts -> a fixed number of tokens each, and which of them are real.

A text's tokens depend on that text alone: rows are padded to one length, and no real token sees a pad.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from diffusion_core.errors import ConfigError, DataError


class Tokenizer(Protocol):
    """Text -> token numbers."""

    @property
    def size(self) -> int:
        """How many different tokens there are."""
        ...

    def ids(self, text: str, length: int) -> list[int]:
        """The tokens of a text, at most `length` of them with those that mark its ends."""
        ...

    def to_json(self) -> str:
        """All of it, as a `tokenizer.json` holds it."""
        ...


class Encoded(NamedTuple):
    """Texts as a network reads them: `text` (B, L, D) float32, zero for pads, and `mask` (B, L), True for real ones."""

    text: Tensor
    mask: Tensor


class TextEncoder(nn.Module, ABC):
    """Text -> `length` tokens of `width` numbers; kinds with a vocabulary of `vocabulary` tokens need a `tokenizer`."""

    width: int
    length: int
    vocabulary: int
    tokenizer: Tokenizer | None = None

    def speaking(self, tokenizer: Tokenizer) -> Self:
        """This encoder with a tokenizer; raises ConfigError for one of more tokens, or that gives "" no token."""
        if tokenizer.size > self.vocabulary:
            raise ConfigError(
                f"the tokenizer has {tokenizer.size} tokens; this encoder has vectors for {self.vocabulary}"
            )
        if not tokenizer.ids("", self.length):
            raise ConfigError("the tokenizer makes no token of an empty text; one that marks a text's end is wanted")
        self.tokenizer = tokenizer
        return self

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The tokens of texts, padded to `length`; what does not fit is cut off.

        Raises DataError for a text that UTF-8 cannot hold, ConfigError if the tokenizer is missing.
        """
        device = next(self.parameters()).device
        numbers = torch.zeros(len(texts), self.length, dtype=torch.int64)
        mask = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for row, text in enumerate(texts):
            found = self.ids(_whole(text))
            numbers[row, : len(found)] = torch.tensor(found)
            mask[row, : len(found)] = True
        mask = mask.to(device)
        tokens: Tensor = self(numbers.to(device), mask)
        return Encoded(tokens.float().masked_fill(~mask[..., None], 0), mask)

    def ids(self, text: str) -> list[int]:
        """The token numbers of a text, from 1 to `length` of them."""
        if self.tokenizer is None:
            raise ConfigError(f"{type(self).__name__} has no tokenizer; one read from a folder has")
        return self.tokenizer.ids(text, self.length)

    @abstractmethod
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token numbers (B, L) and which are real (B, L), the first of each row at least -> (B, L, D)."""


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"text {ascii(text)} is not valid Unicode ({error.reason})") from None
    return text
