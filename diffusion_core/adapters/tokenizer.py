"""A `tokenizer.json` of the `tokenizers` library: the only door to it, and it is an extra."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_core.errors import ConfigError, IntegrityError

NAME = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class FileTokenizer:
    """The tokenizer that a `tokenizer.json` describes; padding and truncation that it may ask for are left out."""

    inner: Any
    text: str

    @property
    def size(self) -> int:
        """How many different tokens there are, those that mark the ends included."""
        size: int = self.inner.get_vocab_size()
        return size

    def ids(self, text: str, length: int) -> list[int]:
        """The tokens of a text, at most `length` of them: a long text loses its tail, not the mark of its end."""
        self.inner.enable_truncation(length)
        ids: list[int] = self.inner.encode(text).ids
        return ids

    def to_json(self) -> str:
        """The file as it was read."""
        return self.text


def read_tokenizer(path: Path) -> FileTokenizer:
    """The tokenizer of a file; raises ConfigError if the library is missing, IntegrityError for a torn file."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(f"{path} needs the extra 'text': pip install 'inkwell[text]'") from None
    try:
        text = path.read_bytes().decode()
        inner = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more particular
        raise IntegrityError(f"{path} cannot be read as a tokenizer ({error})") from error
    inner.no_padding()
    return FileTokenizer(inner, text)
