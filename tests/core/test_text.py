"""Text encoders without a folder: bytes of any script, each text by itself, specs and refusals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusion_core import bundle
from diffusion_core.denoiser import without_condition
from diffusion_core.errors import ConfigError, DataError
from diffusion_core.nets.byte_text import ByteEncoder
from diffusion_core.nets.clip_text import ClipEncoder, quick_gelu
from diffusion_core.nets.t5_text import T5Encoder
from diffusion_core.nets.text import TextEncoder, TextSpec

SMALL = {"width": 16, "length": 10, "depth": 2, "heads": 2}
CLIP = {"vocabulary": 9, "width": 8, "depth": 1, "heads": 2, "inner": 12, "length": 6}
T5 = {"vocabulary": 9, "width": 8, "depth": 1, "heads": 2, "head_width": 4, "inner": 12, "length": 6}
TEXTS = ["a cat", "a dog", "", "Ελλάδα", "日本の猫", "👩‍🚀", "a text of more than ten bytes"]


class Letters:
    """A tokenizer of one token a letter, behind one for the start."""

    size = 9

    def ids(self, text: str, length: int) -> list[int]:
        return [0, *(1 + ord(letter) % 8 for letter in text)][:length]

    def to_json(self) -> str:
        return "{}"


def encoder(**more) -> ByteEncoder:
    made = ByteEncoder(**SMALL | more)
    return made.eval().requires_grad_(False)


def reference(ours: ByteEncoder, text: str) -> torch.Tensor:
    """One text without pads, through torch's own layers of the same weights."""
    ids = torch.tensor([256, *text.encode()][: ours.length])
    place = torch.arange(len(ids))[:, None] * 10_000 ** (-torch.arange(0, ours.width, 2) / ours.width)
    tokens = F.embedding(ids, ours.tokens.weight) + torch.cat((place.sin(), place.cos()), 1)
    for block in ours.blocks:
        theirs = nn.TransformerEncoderLayer(
            ours.width, block.heads, block.widen.out_features, 0.0, "gelu", batch_first=True, norm_first=True
        )
        theirs.self_attn.in_proj_weight.data, theirs.self_attn.in_proj_bias.data = block.mix.weight, block.mix.bias
        pairs = ((theirs.self_attn.out_proj, block.join), (theirs.linear1, block.widen), (theirs.linear2, block.narrow))
        for layer, own in (*pairs, (theirs.norm1, block.norm1), (theirs.norm2, block.norm2)):
            layer.weight.data, layer.bias.data = own.weight, own.bias
        with torch.no_grad():
            tokens = theirs.train()(tokens[None])[0]  # train: the fused path of eval knows no exact GELU
    return F.layer_norm(tokens, tokens.shape[-1:], ours.norm.weight, ours.norm.bias)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_go_through_torchs_own_transformer(text):
    ours = encoder()
    tokens, mask = ours.encode([text])
    count = min(1 + len(text.encode()), 10)
    assert mask.tolist() == [[True] * count + [False] * (10 - count)]
    assert not tokens[0, count:].any()
    torch.testing.assert_close(tokens[0, :count], reference(ours, text), rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=6))
def test_any_text_is_encoded_and_by_itself(texts):
    ours = encoder()
    together = ours.encode(texts)
    assert together.text.shape == (len(texts), 10, 16) and together.text.isfinite().all()
    for row, text in enumerate(texts):
        alone = ours.encode([text])
        assert torch.equal(alone.mask[0], together.mask[row])
        torch.testing.assert_close(alone.text[0], together.text[row], rtol=0, atol=1e-5)
    assert torch.equal(ours.encode(texts).text, together.text)


def test_texts_are_told_apart_up_to_the_length_and_no_further():
    ours = encoder()
    text, _ = ours.encode(["a cat sat and ate", "a cat sat and ran", "a cat", "tac a", "a cat "])
    assert torch.equal(text[0], text[1])  # the same first nine bytes
    for a, b in ((0, 2), (2, 3), (2, 4)):
        assert (text[a] - text[b]).abs().max() > 0.1


def test_weights_are_those_of_the_seed_and_leave_no_trace():
    torch.manual_seed(1)
    first = encoder().state_dict()
    torch.manual_seed(2)
    again, other = encoder().state_dict(), encoder(seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tokens.weight"], other["tokens.weight"])


def test_it_is_trainable_as_any_module():
    ours = ByteEncoder(**SMALL)
    ours.encode(["a cat", ""]).text.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in ours.parameters())


@pytest.mark.parametrize(("kind", "made"), [("clip", ClipEncoder(**CLIP)), ("t5", T5Encoder(**T5))])
def test_pads_are_seen_by_no_real_token(kind, made):
    made.requires_grad_(False).eval().speaking(Letters())
    ids, mask = torch.tensor([[0, 3, 4, 0, 0, 0], [0, 3, 4, 7, 5, 1]]), torch.tensor([[True] * 3 + [False] * 3] * 2)
    a, b = made(ids, mask)
    torch.testing.assert_close(a[:3], b[:3], rtol=0, atol=1e-6)
    assert made.encode(["abc" * 9]).mask.all()


def test_clip_looks_back_and_t5_looks_both_ways():
    a, b = torch.tensor([[0, 1, 2, 3, 4, 5]]), torch.tensor([[0, 1, 2, 3, 4, 6]])
    real = torch.ones(1, 6, dtype=torch.bool)
    clip, t5 = ClipEncoder(**CLIP).eval(), T5Encoder(**T5).eval()
    assert torch.equal(clip(a, real)[:, :5], clip(b, real)[:, :5])
    assert not torch.equal(clip(a, real)[:, 5], clip(b, real)[:, 5])
    assert (t5(a, real)[:, 0] - t5(b, real)[:, 0]).abs().max() > 1e-4


def test_quick_gelu_is_near_gelu():
    x = torch.linspace(-6, 6, 101)
    assert (quick_gelu(x) - F.gelu(x)).abs().max() < 0.0204  # known distance of the approximation


def test_an_encoder_without_its_tokenizer_or_a_text_beyond_utf8_is_refused():
    with pytest.raises(ConfigError, match="ClipEncoder has no tokenizer"):
        ClipEncoder(**CLIP).encode(["a"])
    with pytest.raises(DataError, match=r"text 'a\\ud800' is not valid Unicode"):
        encoder().encode(["a", "a\ud800"])
    with pytest.raises(ConfigError, match="9 tokens; this encoder has vectors for 8"):
        T5Encoder(**T5 | {"vocabulary": 8}).speaking(Letters())


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"kind": "byte"}, "kind is 'byte'; allowed: bytes, clip, t5; did you mean 'bytes'"),
        ({"kind": "bytes", "heads": 3}, "width 128, heads 3"),
        ({"kind": "bytes", "width": 7, "heads": 7}, "width 7, expand 4, seed 0: even"),
        ({"kind": "bytes", "length": 0}, "length 0"),
        ({"kind": "bytes", "lenght": 8}, "did you mean 'length'"),
        ({"kind": "clip"}, "clip lacks vocabulary, width, depth, heads, inner"),
        ({"kind": "clip", **CLIP, "activation": "relu"}, "activation is 'relu'; allowed: gelu, quick_gelu"),
        ({"kind": "t5", **T5, "inner": 0}, "inner 0"),
        ({"kind": "t5", **T5, "buckets": 8, "farthest": 2}, "buckets 8, farthest 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(spec, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TextSpec.read(spec, "text").build()


def test_saved_alone_it_round_trips_and_its_name_is_its_content(tmp_path):
    spec = TextSpec.read({"kind": "bytes", **SMALL}, "text")
    ours: TextEncoder = spec.build()
    bundle.save_text(ours, spec, tmp_path / "a")
    loaded = bundle.load_text(tmp_path / "a")
    assert bundle.text_spec(tmp_path / "a") == spec
    assert torch.equal(loaded.encode(TEXTS).text, ours.encode(TEXTS).text)
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    bundle.save_text(loaded, spec, tmp_path / "b")
    assert bundle.text_digest(tmp_path / "a") == bundle.text_digest(tmp_path / "b")
    bundle.save_text(encoder(seed=1), spec.extended(seed=1), tmp_path / "c")
    assert bundle.text_digest(tmp_path / "c") != bundle.text_digest(tmp_path / "a")


def test_no_text_is_the_condition_that_training_drops_to():
    """What a bundle says for "no text" is what `without_condition` makes of any text."""
    spec = TextSpec.read({"kind": "bytes", **SMALL}, "text")
    made = bundle.Bundle.__new__(bundle.Bundle)
    made.text = spec.build()
    labels = torch.tensor([-1, -1, -1])
    asked = made.condition(labels, ["a cat", None, ""])
    dropped = without_condition(asked)
    for name in ("label", "text", "mask"):
        assert torch.equal(asked[name][1], dropped[name][1])
        assert torch.equal(made.condition(labels)[name], dropped[name])
    assert (asked["text"][2] != 0).any(), "an empty text is a text"
