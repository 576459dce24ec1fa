"""What must be true of a prepared data set, as data: each `Claim` is one expectation on one measured table.

What cannot be right in any data set (a doubled key, content in two splits) stops the pipeline. What is a matter of
judgement has a limit, and `warnings` names the rules whose failure is only told.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusion_core.errors import ConfigError, suggest
from diffusion_core.images import MODES
from pipelines.data.duplicates import MOST
from pipelines.data.index import NO_LABEL, PictureRow
from pipelines.data.shards import BLOCK

PRESENT = "ExpectColumnValuesToNotBeNull"
ABSENT = "ExpectColumnValuesToBeNull"
UNIQUE = "ExpectColumnValuesToBeUnique"
WITHIN = "ExpectColumnValuesToBeBetween"
MEMBER = "ExpectColumnValuesToBeInSet"
MATCH = "ExpectColumnValuesToMatchRegex"
NO_MATCH = "ExpectColumnValuesToNotMatchRegex"
EQUAL = "ExpectColumnPairValuesToBeEqual"
AT_LEAST = "ExpectColumnPairValuesAToBeGreaterThanB"
ROWS = "ExpectTableRowCountToBeBetween"

SPLITS = ("train", "val")
OPTIONAL = ("caption", "licence", "source")  # columns that may be empty
FORMS = {"key": "[0-9a-f]{16}(-[1-9][0-9]*)?", "sha256": "[0-9a-f]{64}", "phash": "[0-9a-f]{16}"}
NO_CAPTION = r"^(?i:\s*(nan|none|null|n/a)?\s*)$"
RULES = ("labels", "class_balance", "val_balance", "captions", "contrast", "near_leak", "drift")


@dataclass(frozen=True)
class NearLeak:
    """Pictures whose perceptual hashes (64 bits) differ by at most `distance` bits are near-duplicates.

    At most `max_percent` of the pictures in val may have one in train. As many bits of such a hash are set as not, so
    distances are even.
    """

    distance: int = 4
    max_percent: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.distance <= MOST:
            raise ConfigError(f"distance {self.distance}: a number of bits in 0..{MOST} is wanted")
        _percent("max_percent", self.max_percent)


@dataclass(frozen=True)
class Drift:
    """How far the pictures may have moved from the reference: a population stability index of the labels, and
    Kolmogorov-Smirnov distances, in [0, 1], of the sizes in pixels and bytes and of the captions' lengths.
    """

    label: float = 0.1
    width: float = 0.1
    height: float = 0.1
    size: float = 0.1
    caption_length: float = 0.1

    def __post_init__(self) -> None:
        for name, bound in vars(self).items():
            if bound < 0:
                raise ConfigError(f"{name} {bound}: a bound of at least 0 is wanted")


@dataclass(frozen=True)
class Limits:
    """Each class has `min_class_percent` of its split at least.

    Where any picture has a class `min_label_percent` have one, and where any has a caption `min_caption_percent`, of
    `caption_length` characters (least, most). A rule among the `warnings` warns and does not stop.
    """

    min_class_percent: float = 1.0
    min_label_percent: float = 100.0
    min_caption_percent: float = 100.0
    caption_length: tuple[int, int] = (1, 1000)
    near_leak: NearLeak | None = field(default_factory=NearLeak)
    drift: Drift = field(default_factory=Drift)
    warnings: tuple[str, ...] = ("val_balance", "contrast")

    def __post_init__(self) -> None:
        _percent("min_class_percent", self.min_class_percent)
        _percent("min_label_percent", self.min_label_percent)
        _percent("min_caption_percent", self.min_caption_percent)
        least, most = self.caption_length
        if not 1 <= least <= most:
            raise ConfigError(f"caption_length [{least}, {most}]: 1 <= least <= most is wanted")
        for name in self.warnings:
            if name not in RULES:
                raise ConfigError(f"warnings: '{name}' is no rule that may be one; {suggest(name, RULES)}")


@dataclass(frozen=True)
class Claim:
    """One expectation: on which columns of which table, the sentence that must hold, its class and its arguments.

    `rule` is its name among those that may be warnings.
    """

    table: str
    columns: tuple[str, ...]
    text: str
    expectation: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rule: str | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """Columns and arguments as Great Expectations names them."""
        names = ("column",) if len(self.columns) == 1 else ("column_A", "column_B")[: len(self.columns)]
        return {**dict(zip(names, self.columns, strict=True)), **self.arguments}

    def severity(self, limits: Limits) -> Literal["critical", "warning"]:
        """Whether its failure stops the pipeline."""
        return "warning" if self.rule in limits.warnings else "critical"


def of_columns() -> list[Claim]:
    """What is claimed of the tables' columns; nothing else can be asked of a table with others."""
    return [Claim("columns", ("found", "declared"), "every column is there with its type, and no other", EQUAL)]


def of_data(about: Mapping[str, Any], limits: Limits, *, compared: bool) -> list[Claim]:
    """Everything else claimed of a data set whose manifest says `about`; `compared` with a reference or not."""
    claims = [*_of_pictures(about), *_of_decoded(about)]
    claims.append(Claim("exchange", ("read", "declared"), "the webdataset package reads every picture as it is", EQUAL))
    claims.append(Claim("counts", ("found", "declared"), "everything is there as often as declared", EQUAL))
    if about["captions"]:
        claims += _of_captions(limits)
    if about["classes"]:
        claims += _of_classes(limits)
    if limits.near_leak:
        claims.append(_of_twins(limits.near_leak))
    if compared:
        text = "no distribution is farther from the reference's than its bound"
        claims.append(Claim("drift", ("bound", "found"), text, AT_LEAST, {"or_equal": True}, "drift"))
    return claims


def _of_pictures(about: Mapping[str, Any]) -> Iterator[Claim]:
    yield Claim("pictures", (), "there are pictures", ROWS, {"min_value": 1})
    for column in PictureRow._fields:
        if column not in OPTIONAL:
            yield Claim("pictures", (column,), f"no {column} is missing", PRESENT)
    yield Claim("pictures", ("garbled",), "every text is UTF-8", ABSENT)
    for column, form in FORMS.items():
        yield Claim("pictures", (column,), f"every {column} has the form {form}", MATCH, {"regex": f"^{form}$"})
    yield Claim("pictures", ("key",), "every key is unique", UNIQUE)
    yield Claim("pictures", ("original",), "every content that is kept once is there once", UNIQUE)
    yield Claim("pictures", ("key_head", "sha256_head"), "every key is the head of its hash", EQUAL)
    yield Claim("pictures", ("leaked",), "no content is in two splits", ABSENT)
    yield Claim("pictures", ("displaced",), "rows stand by split, size and content", ABSENT)
    splits = [split for split in SPLITS if about["counts"].get(split)]
    yield Claim("pictures", ("split",), f"every split is one of {', '.join(splits)}", MEMBER, {"value_set": splits})
    shapes = [f"{height}x{width}" for height, width in about["shapes"]]
    text = f"every height x width is one of {', '.join(shapes)}"
    yield Claim("pictures", ("shape",), text, MEMBER, {"value_set": shapes})
    most = len(about["classes"]) - 1
    text = f"every label is in 0..{most}, or -1 for none" if about["classes"] else "every label is -1, for none"
    yield Claim("pictures", ("label",), text, WITHIN, {"min_value": NO_LABEL, "max_value": most})
    yield Claim("pictures", ("offset",), "every picture lies behind a tar header", WITHIN, {"min_value": BLOCK})
    yield Claim("pictures", ("size",), "every picture has bytes", WITHIN, {"min_value": 1})
    yield Claim("pictures", ("space",), "every picture ends inside its shard", WITHIN, {"min_value": 0})


def _of_captions(limits: Limits) -> Iterator[Claim]:
    percent, (least, most) = limits.min_caption_percent, limits.caption_length
    share = {"mostly": percent / 100}
    yield Claim(
        "pictures", ("caption",), f"at least {percent:g} % of the pictures have a caption", PRESENT, share, "captions"
    )
    text = "no caption is empty or a placeholder (nan, none, null, n/a)"
    yield Claim("pictures", ("caption",), text, NO_MATCH, {"regex": NO_CAPTION}, "captions")
    text, between = f"every caption has {least} to {most} characters", {"min_value": least, "max_value": most}
    yield Claim("pictures", ("caption_length",), text, WITHIN, between, "captions")


def _of_decoded(about: Mapping[str, Any]) -> Iterator[Claim]:
    mode = MODES[about["channels"]]
    seen = {"ignore_row_if": "either_value_is_missing"}  # why there is nothing to compare stands in `error`
    yield Claim("decoded", ("error",), "every picture drawn decodes", ABSENT)
    yield Claim("decoded", ("sha256", "declared"), "every picture drawn has its hash", EQUAL, seen)
    yield Claim("decoded", ("mode",), f"every picture drawn is a PNG of mode {mode}", MEMBER, {"value_set": [mode]})
    yield Claim("decoded", ("shape", "declared_shape"), "every picture drawn has its height x width", EQUAL, seen)
    text = "no picture drawn is of one colour"
    yield Claim("decoded", ("contrast",), text, WITHIN, {"min_value": 1}, "contrast")


def _of_classes(limits: Limits) -> Iterator[Claim]:
    text, share = (
        f"at least {limits.min_label_percent:g} % of the pictures have a class",
        limits.min_label_percent / 100,
    )
    yield Claim("pictures", ("class",), text, PRESENT, {"mostly": share}, "labels")
    for split, rule in zip(SPLITS, ("class_balance", "val_balance"), strict=True):
        text = f"every class has at least {limits.min_class_percent:g} % of {split}"
        yield Claim("classes", (split,), text, WITHIN, {"min_value": limits.min_class_percent}, rule)


def _of_twins(leak: NearLeak) -> Claim:
    text = f"at most {leak.max_percent:g} % of val have a near-duplicate in train (within {leak.distance} bits)"
    return Claim("val", ("twin",), text, ABSENT, {"mostly": (100 - leak.max_percent) / 100}, "near_leak")


def _percent(name: str, value: float) -> None:
    if not 0 <= value <= 100:
        raise ConfigError(f"{name} {value}: a number in [0, 100] is wanted")
