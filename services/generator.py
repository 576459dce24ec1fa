"""One model in memory: orders in, PNG bytes out; the same order and weights give the same bytes in any company.

A matrix product may round differently for another number of rows, which is enough to turn a pixel. So pictures
are drawn in chunks of one fixed size, the last one filled up; within a chunk neither place nor neighbours matter.
A prompt is encoded by itself, by the encoder that made the captions' tokens the model was trained with.
"""

import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusion_core.denoiser import NULL
from diffusion_core.errors import ConfigError, InkwellError, suggest
from diffusion_core.images import encode_png, to_pixels
from diffusion_core.nets.text import ClassNames
from diffusion_core.sampler import generate
from services.registry import Model
from services.schema import MAX_SEED, Generation, RequestError, UnknownModelError, both

DRAWN_SEEDS = 2**48  # seeds we choose stay whole numbers in clients that only know doubles


@dataclass(frozen=True)
class Order:
    """One picture to draw, of class `label` (-1: of none) and of `prompt` if the model reads text.

    Orders of equal `key` may be drawn together.
    """

    seed: int
    label: int
    steps: int
    guidance: float
    prompt: str | None = None

    @property
    def key(self) -> tuple[int, float]:
        """What a chunk shares."""
        return self.steps, self.guidance


class Generator:
    """A verified model that draws `chunk` pictures at a time; raises nothing for orders made by `orders`."""

    def __init__(self, model: Model, chunk: int) -> None:
        self.model, self.chunk = model, chunk
        self.names = ClassNames(model.bundle.classes)

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT of a picture."""
        _, height, width = self.model.bundle.image_shape
        return f"{width}x{height}"

    @property
    def step_choices(self) -> tuple[int, ...]:
        """The step counts this model was made for; of one made for any, its default."""
        sampling = self.model.bundle.sampling
        return sampling.allowed_steps or (sampling.steps,)

    def warm_up(self) -> None:
        """Draw once with every step count, with and without guidance, so that no request pays for a first call."""
        label = 0 if self.names.names else NULL
        prompt = None if self.model.bundle.text is None else ""
        for steps in self.step_choices:
            for guidance in {1.0, 2.0, self.model.bundle.sampling.guidance}:
                self.draw([Order(0, label, steps, guidance, prompt)])

    def orders(self, request: Generation) -> list[Order]:
        """The pictures a request asks of this model; raises RequestError naming the field that does not fit it."""
        if request.model not in (None, self.model.name, self.model.reference):
            hint = suggest(request.model, (self.model.name, self.model.reference))
            raise UnknownModelError(f"model {ascii(request.model)} is unknown; {hint}", "model", "model_not_found")
        if request.size not in (None, "auto", self.size):
            hint = suggest(request.size, ("auto", self.size))
            raise RequestError(f"size {ascii(request.size)} is not drawn here; {hint}", "size")
        count, (label, prompt) = request.n or 1, self._asked(request)
        seed = secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed
        if seed + count - 1 > MAX_SEED:
            raise RequestError(f"seed {seed} and n {count}: the last picture's seed is above {MAX_SEED}", "seed")
        steps = request.num_inference_steps if request.steps is None else request.steps
        guidance = request.guidance_scale if request.guidance is None else request.guidance
        try:
            sampling = self.model.bundle.sampling.changed(steps=steps, guidance=guidance)
        except ConfigError as error:
            raise RequestError(str(error), "steps") from None
        return [Order(seed + i, label, sampling.steps, sampling.guidance, prompt) for i in range(count)]

    def draw(self, orders: Sequence[Order]) -> list[bytes]:
        """PNG bytes of every order, in its place; what drew a picture stands in the file's metadata."""
        places: dict[tuple[int, float], list[int]] = defaultdict(list)
        for place, order in enumerate(orders):
            places[order.key].append(place)
        drawn: dict[int, bytes] = {}
        for alike in places.values():
            for start in range(0, len(alike), self.chunk):
                chunk = alike[start : start + self.chunk]
                drawn |= zip(chunk, self._draw_chunk([orders[place] for place in chunk]), strict=True)
        return [drawn[place] for place in range(len(orders))]

    def _draw_chunk(self, orders: Sequence[Order]) -> list[bytes]:
        bundle, first = self.model.bundle, orders[0]
        filled = [*orders, *[first] * (self.chunk - len(orders))]
        pictures = generate(
            bundle.denoiser,
            bundle.codec,
            bundle.sampling.changed(steps=first.steps, guidance=first.guidance),
            bundle.latent_shape,
            [order.seed for order in filled],
            bundle.condition(
                torch.tensor([order.label for order in filled]),
                None if bundle.text is None else [order.prompt for order in filled],
            ),
        )
        if not torch.isfinite(pictures).all():
            raise InkwellError(f"{self.model.reference} drew numbers that are not finite")
        pixels = to_pixels(pictures)
        return [encode_png(pixels[row], self._text(order)) for row, order in enumerate(orders)]

    def _text(self, order: Order) -> dict[str, str]:
        said = {"model": self.model.reference, "digest": self.model.digest}
        if order.label != NULL:
            said["class"] = self.names.names[order.label]
        if order.prompt is not None:
            said["prompt"] = escaped(order.prompt)
        return said | {"seed": str(order.seed), "steps": str(order.steps), "guidance": str(order.guidance)}

    def _asked(self, request: Generation) -> tuple[int, str | None]:
        """The class, -1 for none, and the text to be read, none for a model that reads none."""
        if self.model.bundle.text is not None:
            return self._label(request), request.prompt
        if request.prompt is None:
            return self._label(request), None
        if request.label is not None:
            raise RequestError(both("label", "prompt"), "prompt")
        try:
            return self.names.label(request.prompt), None
        except ConfigError as error:
            raise RequestError(str(error), "prompt") from None

    def _label(self, request: Generation) -> int:
        if request.label is None:
            return NULL
        if request.label >= (count := len(self.names.names)):
            wanted = f"a class from 0 to {count - 1}" if count else "a prompt, as this model knows no classes,"
            raise RequestError(f"label is {request.label}; {wanted} is wanted", "label")
        return request.label


def escaped(text: str) -> str:
    r"""A text as it stands in a picture's metadata: what cannot be seen is written out, as in \u200b for no space."""
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode() for char in text
    )
