"""Bundles: what is saved is what is loaded, altered bytes are refused, and a picture depends on its seed alone."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusion_core import bundle, manifest
from diffusion_core.bundle import Bundle, DenoiserSpec
from diffusion_core.codec import Pixel
from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.grid import Grid
from diffusion_core.multistep import Multistep
from diffusion_core.nets.text import TextSpec
from diffusion_core.renoise import Ancestral, Full
from diffusion_core.sampler import Sampling, generate
from diffusion_core.solver import Heun
from diffusion_core.spec import build
from diffusion_core.target import FLOW, X0
from diffusion_core.vae import CodecSpec
from tests.core.oracle import one_of_each

NET = {"kind": "dit", "channels": 2, "size": 4, "classes": 3, "width": 32, "depth": 2, "heads": 2}
DENOISER = {"net": NET, "schedule": {"kind": "shifted", "inner": {"kind": "cosine"}}, "target": {"kind": "v"}}
DENOISER |= {"scale": {"kind": "unit_variance"}, "label": {"kind": "time"}, "first": 0.98}
SAMPLINGS = {
    "first order": Sampling(steps=3, guidance=1.5),
    "heun": Sampling(steps=2, solver=Heun(FLOW()), guidance=1.0),
    "2m": Sampling(steps=4, solver=Multistep(X0(), "log_snr", 2), grid=one_of_each(Grid)["log_snr"], guidance=0.0),
    "ancestral": Sampling(steps=3, renoise=Ancestral(1.0)),
    "full": Sampling(steps=2, renoise=Full(), guidance=3.0, allowed_steps=(1, 2)),
}


def make(sampling=SAMPLINGS["first order"]):
    torch.manual_seed(0)
    codec_spec = CodecSpec.read({"kind": "kl_vae", "channels": 1, "latent": 2, "widths": [8, 8]}, "codec")
    denoiser_spec = build(DenoiserSpec, DENOISER, "denoiser")
    denoiser, codec = denoiser_spec.build().eval(), codec_spec.build().eval()
    for weight in denoiser.parameters():
        nn.init.normal_(weight, std=0.1)
    return Bundle(codec, codec_spec, denoiser, denoiser_spec, sampling, ("a", "b", "c"), (1, 8, 8), {"name": "test"})


def make_with_text():
    """The same with a network that reads text too, and its encoder."""
    torch.manual_seed(0)
    made, text_spec = make(), TextSpec.read({"kind": "bytes", "width": 8, "length": 12, "heads": 2}, "text")
    described = DENOISER | {"net": NET | {"text": 8}}
    denoiser_spec = build(DenoiserSpec, described, "denoiser")
    denoiser = denoiser_spec.build().eval()
    for weight in denoiser.parameters():
        nn.init.normal_(weight, std=0.1)
    text = text_spec.build().eval().requires_grad_(False)
    return replace(made, denoiser=denoiser, denoiser_spec=denoiser_spec, text=text, text_spec=text_spec)


def pictures(made, seeds, labels=None, sampling=None):
    labels = torch.as_tensor([seed % 3 for seed in seeds] if labels is None else labels)
    return generate(
        made.denoiser, made.codec, sampling or made.sampling, made.latent_shape, list(seeds), {"label": labels}
    )


@pytest.fixture
def saved(tmp_path):
    bundle.save(make(), tmp_path)
    manifest.seal(tmp_path, "bundle", {})
    return tmp_path


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_round_trip_is_bit_equal(sampling, tmp_path):
    made = make(SAMPLINGS[sampling])
    bundle.save(made, tmp_path)
    manifest.seal(tmp_path, "bundle", {})
    loaded = bundle.load(tmp_path)
    for part in ("sampling", "classes", "image_shape", "about", "codec_spec", "denoiser_spec", "latent_shape"):
        assert getattr(loaded, part) == getattr(made, part)
    assert not loaded.denoiser.training and not loaded.codec.training
    assert not any(p.requires_grad for module in (loaded.codec, loaded.denoiser) for p in module.parameters())
    assert torch.equal(pictures(loaded, range(4)), pictures(made, range(4)))
    bundle.save(loaded, tmp_path / "again")
    for name in ("bundle.json", "codec.safetensors", "denoiser.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", ["bundle.json", "codec.safetensors", "denoiser.safetensors"])
def test_an_altered_byte_is_refused_by_name(saved, name):
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        bundle.load(saved)


def edited(folder, **more):
    raw = json.loads((folder / "bundle.json").read_text()) | more
    (folder / "bundle.json").write_text(json.dumps(raw))
    manifest.seal(folder, "bundle", {})


def test_what_is_not_a_bundle_of_ours_is_refused(saved):
    edited(saved, format=99)
    with pytest.raises(IntegrityError, match="format 99; this version reads format 1"):
        bundle.load(saved)
    edited(saved, format=1, sampling={"steps": 3, "stpes": 4})
    with pytest.raises(ConfigError, match=r"bundle.json: sampling.stpes is unknown.*did you mean 'steps'"):
        bundle.load(saved)
    edited(saved, sampling={"steps": 3}, denoiser=DENOISER | {"net": NET | {"width": 64}})
    with pytest.raises(IntegrityError, match="denoiser.safetensors: 'net.blocks.0.join.bias' has shape"):
        bundle.load(saved)
    edited(saved, denoiser=DENOISER | {"net": {"kind": "os.system"}})
    with pytest.raises(ConfigError, match="allowed: dit, "):
        bundle.load(saved)
    (saved / "bundle.json").write_text("{")
    manifest.seal(saved, "bundle", {})
    with pytest.raises(IntegrityError, match="bundle.json cannot be read"):
        bundle.load(saved)


@pytest.mark.parametrize("raw", ["[]", "1", "{}", '{"format": 1}'])
def test_json_that_is_no_bundle_is_an_integrity_error(saved, raw):
    (saved / "bundle.json").write_text(raw)
    manifest.seal(saved, "bundle", {})
    with pytest.raises(IntegrityError, match="bundle.json"):
        bundle.load(saved)


def test_a_text_encoder_travels_in_the_bundle(tmp_path):
    made = make_with_text()
    bundle.save(made, tmp_path)
    manifest.seal(tmp_path, "bundle", {})
    raw = json.loads((tmp_path / "bundle.json").read_text())
    assert raw["format"] == 1 and raw["text"] == bundle.text_digest(tmp_path / "text")
    loaded = bundle.load(tmp_path)
    assert loaded.text_spec == made.text_spec and not any(p.requires_grad for p in loaded.text.parameters())
    labels, texts = torch.tensor([0, -1, 2]), ["a cat", "a dog", None]
    asked, again = made.condition(labels, texts), loaded.condition(labels, texts)
    assert all(torch.equal(asked[name], again[name]) for name in ("label", "text", "mask"))

    def draw(bundle, cond):
        return generate(bundle.denoiser, bundle.codec, bundle.sampling, bundle.latent_shape, [1, 1, 1], cond)

    assert torch.equal(draw(loaded, again), draw(made, asked))
    other = draw(made, made.condition(labels, ["a dog", "a dog", None]))
    assert (other[0] - draw(made, asked)[0]).abs().max() > 1e-3
    assert torch.equal(other[1:], draw(made, asked)[1:])
    bundle.save(make(), tmp_path / "without")
    assert "text" not in json.loads((tmp_path / "without" / "bundle.json").read_text())
    assert not (tmp_path / "without" / "text").exists()
    data = bytearray((tmp_path / "text" / "text.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "text" / "text.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"text/text.safetensors"):
        bundle.load(tmp_path)


def test_a_text_alone_in_company_and_repeated_has_the_same_tokens():
    made = make_with_text()
    alone = made.condition(torch.tensor([0]), ["a cat"])["text"]
    company = made.condition(torch.arange(5), ["a dog", "a cat", None, "a cat", "x" * 99])["text"]
    assert torch.equal(company[1], alone[0]) and torch.equal(company[3], alone[0])
    with pytest.raises(ConfigError, match="this model has no text encoder"):
        make().condition(torch.tensor([0]), ["a cat"])


def test_the_digest_of_a_codec_is_over_spec_and_weights_only(tmp_path):
    made = make()
    bundle.save_codec(made.codec, made.codec_spec, tmp_path)
    before = bundle.codec_digest(tmp_path)
    manifest.seal(tmp_path, "codec", {"psnr": 30})
    (tmp_path / "reconstruction.png").write_bytes(b"a new page")
    assert bundle.codec_digest(tmp_path) == before
    with torch.no_grad():
        next(made.codec.parameters()).view(-1)[0] += 1e-3
    bundle.save_codec(made.codec, made.codec_spec, tmp_path)
    after = bundle.codec_digest(tmp_path)
    raw = json.loads((tmp_path / "codec.json").read_text())
    raw["codec"]["widths"] = [8, 16]
    (tmp_path / "codec.json").write_text(json.dumps(raw))
    assert len({before, after, bundle.codec_digest(tmp_path)}) == 3
    (tmp_path / "codec.safetensors").unlink()
    with pytest.raises(IntegrityError, match="codec.safetensors is missing"):
        bundle.codec_digest(tmp_path)


def test_a_codec_alone_round_trips(tmp_path):
    made = make()
    bundle.save_codec(made.codec, made.codec_spec, tmp_path)
    codec, codec_spec = bundle.load_codec(tmp_path)
    assert codec_spec == made.codec_spec
    assert all(torch.equal(a, b) for a, b in zip(codec.parameters(), made.codec.parameters(), strict=True))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_picture_depends_on_its_seed_and_label_not_on_its_batch(sampling):
    """Batches of 1 to 64, neighbours changed, order changed: equal to 1e-5 (other kernels serve other batch sizes)."""
    made = make(SAMPLINGS[sampling])
    seeds = [7, 2**40, 3, *range(100, 161)]
    whole = pictures(made, seeds)
    for size in (1, 2, 3, 5, 8, 13, 32, 63):
        torch.testing.assert_close(pictures(made, seeds[:size]), whole[:size], rtol=0, atol=1e-5)
    turned = pictures(made, seeds[::-1])
    torch.testing.assert_close(turned.flip(0), whole, rtol=0, atol=1e-5)
    assert torch.equal(pictures(made, seeds), whole)  # and the same batch again is the same bits
    first = pictures(made, [7, 7, 8], [0, 1, 0], replace(made.sampling, guidance=2.0))
    assert (first[0] - first[1]).abs().max() > 1e-3 and (first[0] - first[2]).abs().max() > 1e-3


def test_defaults_change_within_what_the_model_can_do():
    sampling = SAMPLINGS["full"]
    assert sampling.changed(steps=1).steps == 1 and sampling.changed(guidance=0.0).guidance == 0
    assert sampling.changed() == sampling
    with pytest.raises(ConfigError, match=r"steps 3: one of \[1, 2\] is wanted"):
        sampling.changed(steps=3)
    with pytest.raises(ConfigError, match="guidance -1"):
        sampling.changed(guidance=-1.0)
    assert {name: one.calls for name, one in SAMPLINGS.items()} == {
        "first order": 6,
        "heun": 3,
        "2m": 8,
        "ancestral": 3,
        "full": 4,
    }


def test_a_denoiser_that_does_not_fit_its_codec_is_refused_when_it_is_put_together():
    fits, shape = make(), (3, 8, 8)
    with pytest.raises(ConfigError, match="the denoiser takes 2 channels; the codec 'pixel' makes 3 of pictures of 3"):
        Bundle(Pixel(), CodecSpec("pixel"), fits.denoiser, fits.denoiser_spec, fits.sampling, fits.classes, shape)


def test_a_learned_variance_is_a_second_answer_of_the_network():
    denoiser = build(DenoiserSpec, DENOISER | {"variance": "learned"}, "denoiser").build()
    for weight in denoiser.parameters():
        nn.init.normal_(weight, std=0.1)
    x = torch.randn(2, 2, 4, 4)
    pair = denoiser(x, torch.tensor(0.5), None)
    assert pair.x0.shape == pair.spread.shape == x.shape and pair.spread.std() > 0
    assert make().denoiser(x, torch.tensor(0.5), None).spread is None
