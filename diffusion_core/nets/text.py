"""Text encoders: what a request says -> the condition a network was trained with; training and serving share them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffusion_core.errors import ConfigError, suggest
from diffusion_core.nets.byte_text import ByteEncoder
from diffusion_core.nets.clip_text import ClipEncoder
from diffusion_core.nets.t5_text import T5Encoder
from diffusion_core.nets.text_encoder import Encoded, TextEncoder
from diffusion_core.spec import Blueprint

__all__ = ["ClassNames", "Encoded", "TextEncoder", "TextSpec"]


class TextSpec(Blueprint):
    """A text encoder not yet built; `clip` and `t5` also need a tokenizer, which lies beside their weights."""

    known: ClassVar[Mapping[str, type]] = {"bytes": ByteEncoder, "clip": ClipEncoder, "t5": T5Encoder}


@dataclass(frozen=True)
class ClassNames:
    """The simplest text encoder: a text is one of the class names, as in "7"."""

    names: tuple[str, ...]

    def label(self, text: str) -> int:
        """The class that a text names, surrounding blanks and case aside; raises ConfigError with the nearest name."""
        wanted = text.strip().casefold()
        for index, name in enumerate(self.names):
            if name.casefold() == wanted:
                return index
        raise ConfigError(f"prompt is {text!r}; {suggest(wanted, self.names)}")
