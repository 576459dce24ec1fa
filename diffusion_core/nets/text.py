"""Text encoders: what a request says -> the condition a network was trained with; training and serving share them."""

from dataclasses import dataclass

from diffusion_core.errors import ConfigError, suggest


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
