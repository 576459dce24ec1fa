"""How long one encoded picture may be, whatever source it comes from."""

from diffusion_core.errors import ConfigError

MAX_BYTES = 64 * 1024 * 1024


def check(max_bytes: int) -> None:
    """Raises ConfigError for a limit that no picture keeps."""
    if max_bytes < 1:
        raise ConfigError(f"max_bytes {max_bytes}: at least 1 is wanted")


def too_large(origin: str, max_bytes: int) -> tuple[str, str]:
    """The fault of a picture beyond the limit."""
    return "too_large", f"{origin} has more than {max_bytes:,} bytes"
