"""The request and the answer of `POST /v1/images/generations`; the limits live in the types.

The form is OpenAI's Images API with `label`, `seed`, `steps` and `guidance` beside it. Reading is strict: no text
for a number, no unknown field, no NaN, no lone surrogate, no key twice; `null` always means the default. Whether a
prompt is free text or the name of a class is the model's to say.
"""

import json
import unicodedata
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from diffusion_core.errors import InkwellError, suggest

MAX_BODY = 64 * 1024  # bytes
MAX_SEED = 2**63 - 1
SYNONYMS = {"num_inference_steps": "steps", "guidance_scale": "guidance"}


class RequestError(InkwellError):
    """A request that is refused; `param` names the field at fault, `code` is a word for programs."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


class UnknownModelError(RequestError):
    """A model this server does not have."""


class BodyTooLargeError(RequestError):
    """A body of more than MAX_BODY bytes."""


class MediaTypeError(RequestError):
    """A body that is not declared as JSON."""


class NotReadyError(RequestError):
    """No verified model is in service."""


def both(name: str, other: str) -> str:
    """The sentence about two fields of which one may be given."""
    return f"'{name}' and '{other}' say the same thing; give one"


def _printable(text: str) -> str:
    if any(unicodedata.category(char) == "Cc" for char in text):
        raise PydanticCustomError("text", "control characters are not allowed")
    return text


Text = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)]
Steps = Annotated[int, Field(ge=1, le=250)]
Guidance = Annotated[float, Field(ge=0, le=20)]


class Generation(BaseModel):
    """What one request asks for, before it is held against the model in service."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, hide_input_in_errors=True)

    model: Text | None = Field(None, description="name or name@alias; default: the model in service")
    prompt: Text | None = Field(None, description='what to draw; of a model without text, a class by name, such as "7"')
    label: Annotated[int, Field(ge=0)] | None = Field(
        None, description="a class by number; with a prompt if the model reads text"
    )
    n: Annotated[int, Field(ge=1, le=16)] | None = Field(None, description="how many pictures; default 1")
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(None, description="picture i has seed + i")
    steps: Steps | None = Field(None, description="solver steps; default: the model's")
    num_inference_steps: Steps | None = Field(None, description="another name of `steps`")
    guidance: Guidance | None = Field(None, description="guidance scale, 1 is none; default: the model's")
    guidance_scale: Guidance | None = Field(None, description="another name of `guidance`")
    response_format: Literal["b64_json"] | None = None
    size: Annotated[str, Field(max_length=16)] | None = Field(None, description='the model\'s size, or "auto"')

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        for other, name in SYNONYMS.items():
            if getattr(self, other) is not None and getattr(self, name) is not None:
                raise PydanticCustomError("both", both(name, other), {"name": other})
        if self.prompt is None and self.label is None:
            raise PydanticCustomError(
                "neither", "say what to draw: 'prompt', a text or a class's name, or 'label'", {"name": "prompt"}
            )
        return self

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a JSON body; raises RequestError with one sentence for whatever is wrong with it."""
        try:
            value = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        except RecursionError:
            raise RequestError("the body is nested too deeply", code="invalid_json") from None
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
        if not isinstance(value, dict):
            raise RequestError(f"the body is {_shown(value)}; a JSON object is wanted", code="invalid_json")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise _refusal(error.errors(include_url=False)[0], cls.model_fields) from None


class Picture(BaseModel):
    """One picture: PNG in base64, and the seed that draws it again."""

    b64_json: str
    seed: int


class ModelName(BaseModel):
    """Which weights drew the pictures."""

    name: str
    version: str
    digest: str


class Answer(BaseModel):
    """The body of a 200: OpenAI's `created` and `data`, and what is needed to draw the same bytes again.

    `label` is left out if no class was asked for, `prompt` if no text was read.
    """

    created: int
    data: list[Picture]
    model: ModelName
    label: int | None
    prompt: str | None
    steps: int
    guidance: float
    size: str
    output_format: Literal["png"] = "png"


def _refusal(error: ErrorDetails, known: Iterable[str]) -> RequestError:
    """One of pydantic's findings as a sentence that names the field, what was got and what is allowed."""
    if error["type"] == "string_unicode" and not error["loc"]:  # a name that is no text
        field, unknown = error["input"], True
    else:
        field = str(error["loc"][0]) if error["loc"] else error["ctx"]["name"]
        unknown = error["type"] == "extra_forbidden"
    if unknown:
        return RequestError(f"{_shown(field)} is unknown; {suggest(field, known)}", field, "unknown_field")
    if not error["loc"]:
        return RequestError(error["msg"], field)
    surrogate = error["type"] == "string_unicode"
    message = "lone surrogates are not allowed" if surrogate else error["msg"].removeprefix("Input ")
    return RequestError(f"'{field}' is {_shown(error['input'])}: {message}", field)


def _shown(value: Any) -> str:
    """A value as an error may repeat it: ASCII, and never longer than a line."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # an integer too long to print
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"{_shown(twice)} is given twice", twice, "duplicate_field")
    return value


def _no_constant(name: str) -> float:
    raise RequestError(f"{name} is no JSON number", code="invalid_json")
