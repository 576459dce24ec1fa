"""Text encoders from folders: the outputs of another implementation with its weights; what does not fit is refused.

The folders under fixtures/text hold tiny models of random weights and were written by transformers 5.23 (torch 2.13):
a `CLIPTextModel`, a `CLIPModel` with its vision tower, a `T5EncoderModel` and a `T5ForConditionalGeneration`, each
with a tokenizer trained on six sentences by tokenizers 0.23 (byte-level BPE, Unigram). expected.safetensors holds what
that library made of texts.json, padded and cut to the encoder's length: which tokens are real, the last hidden states
of those (`text`) and those one block earlier behind the same norm (`penultimate`). buckets.safetensors holds the
buckets of its T5 for distances from -299 to 299.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_core import bundle
from diffusion_core.adapters.text import TextSource, read_text
from diffusion_core.adapters.tokenizer import read_tokenizer
from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.manifest import hash_file
from diffusion_core.nets.t5_text import buckets_of
from diffusion_core.nets.text import TextSpec

FIXTURES = Path(__file__).parent / "fixtures" / "text"
TEXTS = json.loads((FIXTURES / "texts.json").read_text())
LENGTHS = {"clip": None, "clip_with_vision": None, "t5": 64, "t5_with_decoder": 64}
SOURCES = {"kind": "pretrained", "path": str(FIXTURES / "t5")}


def copied(name, tmp_path):
    return shutil.copytree(FIXTURES / name, tmp_path / name)


def configured(folder, **options):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def resaved(folder, change):
    tensors = load_file(folder / "model.safetensors")
    kept = {new: tensor for name, tensor in tensors.items() if (new := change(name)) is not None}
    save_file(kept, folder / "model.safetensors")


@pytest.mark.parametrize("name", LENGTHS)
def test_outputs_are_those_of_the_peer(name):
    spec, encoder = read_text(FIXTURES / name, length=LENGTHS[name])
    expected = load_file(FIXTURES / name / "expected.safetensors")
    text, mask = encoder.encode(TEXTS)
    assert text.dtype == torch.float32 and text.shape == (6, encoder.length, encoder.width)
    assert torch.equal(mask, expected["mask"])
    assert not text[~mask].any()
    torch.testing.assert_close(text[mask], expected["text"], rtol=1e-5, atol=1e-5)
    assert TextSpec.read(spec.spec(), "text") == spec
    assert not encoder.training and not any(weight.requires_grad for weight in encoder.parameters())


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_the_block_before_the_last_is_that_of_the_peer(name):
    _, encoder = read_text(FIXTURES / name, length=LENGTHS[name], penultimate=True)
    expected = load_file(FIXTURES / name / "expected.safetensors")
    text, mask = encoder.encode(TEXTS)
    torch.testing.assert_close(text[mask], expected["penultimate"], rtol=1e-5, atol=1e-5)


def test_names_of_older_files_are_read_too(tmp_path):
    """Until transformers 5 there was a prefix, and numbers of places and T5's vectors stood there twice."""
    clip, t5 = copied("clip", tmp_path), copied("t5", tmp_path)
    resaved(clip, lambda name: f"text_model.{name}")
    numbers = {"text_model.embeddings.position_ids": torch.arange(40)[None]}
    save_file(load_file(clip / "model.safetensors") | numbers, clip / "model.safetensors")
    twice = load_file(t5 / "model.safetensors")
    twice["encoder.embed_tokens.weight"] = twice["shared.weight"].clone()
    save_file(twice, t5 / "model.safetensors")
    for folder in (clip, t5):
        ours, theirs = (read_text(place, length=20)[1].encode(TEXTS) for place in (folder, FIXTURES / folder.name))
        assert torch.equal(ours.text, theirs.text)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (64, 256)])
def test_distances_fall_into_the_peers_buckets(buckets, farthest):
    wanted = load_file(FIXTURES / "buckets.safetensors")[f"{buckets}-{farthest}"].long()
    found = buckets_of(300, buckets, farthest)
    torch.testing.assert_close(found[0], wanted[299:])  # how far ahead
    torch.testing.assert_close(found[:, 0], wanted[:300].flip(0))  # how far behind


@pytest.mark.parametrize("name", LENGTHS)
def test_fewer_tokens_are_the_beginning_of_more(name):
    """CLIP's tokens see only those before them, so that a text that fits has the same tokens in a shorter encoder."""
    short, long = (read_text(FIXTURES / name, length=length)[1].encode(TEXTS[:1]) for length in (16, 30))
    assert int(short.mask.sum()) == int(long.mask.sum())
    torch.testing.assert_close(short.text, long.text[:, :16], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LENGTHS)
def test_a_text_depends_on_itself_alone(name):
    _, encoder = read_text(FIXTURES / name, length=32)
    together = encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        alone = encoder.encode([text])
        assert torch.equal(alone.mask[0], together.mask[row])
        torch.testing.assert_close(alone.text[0], together.text[row], rtol=1e-5, atol=1e-6)
    backwards = encoder.encode(TEXTS[::-1])
    torch.testing.assert_close(backwards.text.flip(0), together.text, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LENGTHS)
def test_a_folder_becomes_one_of_ours_with_everything_in_it(name, tmp_path):
    spec, encoder = read_text(FIXTURES / name, length=24)
    bundle.save_text(encoder, spec, tmp_path / "text")
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == [
        *("text.json", "text.safetensors", "tokenizer.json"),
    ]
    loaded = bundle.load_text(tmp_path / "text")
    assert torch.equal(loaded.encode(TEXTS).text, encoder.encode(TEXTS).text)
    bundle.save_text(loaded, bundle.text_spec(tmp_path / "text"), tmp_path / "again")
    assert bundle.text_digest(tmp_path / "again") == bundle.text_digest(tmp_path / "text")


@pytest.mark.parametrize("name", ["text.json", "text.safetensors", "tokenizer.json"])
def test_the_digest_is_over_spec_weights_and_tokenizer(name, tmp_path):
    bundle.save_text(*reversed(read_text(FIXTURES / "t5")), tmp_path)
    before = bundle.text_digest(tmp_path)
    (tmp_path / "manifest.json").write_text("beside it")
    assert bundle.text_digest(tmp_path) == before
    data = (tmp_path / name).read_bytes()
    changed = data.replace(b'"heads": 3', b'"heads": 6') if name == "text.json" else data[:-2] + b"\n" + data[-1:]
    assert changed != data
    (tmp_path / name).write_bytes(changed)
    assert bundle.text_digest(tmp_path) != before


def test_params_name_a_folder_or_describe_an_encoder_of_our_own():
    spec, encoder = TextSource.read(SOURCES | {"length": 12, "sha256": None}, "text").made()
    assert (spec.kind, encoder.length) == ("t5", 12) and encoder.encode(["a cat"]).mask.sum() > 1
    spec, encoder = TextSource.read({"kind": "bytes", "width": 8, "heads": 2}, "text").made()
    assert type(spec) is TextSpec and encoder.width == 8 and not encoder.training
    with pytest.raises(ConfigError, match="text.kind is 't5'; allowed: bytes, pretrained"):
        TextSource.read({"kind": "t5"}, "text")


def test_the_digest_of_the_weights_is_checked():
    digest = hash_file(FIXTURES / "clip" / "model.safetensors")
    read_text(FIXTURES / "clip", digest.upper())
    with pytest.raises(IntegrityError, match=f"has SHA-256 {digest}; 00 is wanted"):
        read_text(FIXTURES / "clip", "00")


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("clip", {"model_type": "clap"}, "model_type is 'clap'; allowed: clip, clip_text_model, t5; did you mean"),
        ("clip", {"model_type": None}, "model_type is None"),
        ("clip", {"hidden_act": "relu"}, "hidden_act is 'relu'; allowed: gelu, quick_gelu"),
        ("clip", {"num_attention_heads": 5}, "heads 5.*heads must divide width"),
        ("clip", {"hidden_size": "12"}, "hidden_size is '12'"),
        ("t5", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'; allowed: gated-gelu, relu"),
        ("t5", {"vocab_size": 10}, "the tokenizer has 48 tokens|size mismatch"),
        ("t5", {"relative_attention_num_buckets": 7}, "buckets 7"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(name, options, sentence, tmp_path):
    folder = copied(name, tmp_path)
    configured(folder, **options)
    with pytest.raises((ConfigError, IntegrityError), match=sentence):
        read_text(folder)


@pytest.mark.parametrize("length", [0, 41])
def test_clip_has_no_more_tokens_than_it_was_trained_with(length):
    with pytest.raises(ConfigError, match=f"length {length}: from 1 to 40"):
        read_text(FIXTURES / "clip", length=length)


@pytest.mark.parametrize("name", LENGTHS)
def test_weights_must_fit_to_the_last_tensor(name, tmp_path):
    folder, last = (
        copied(name, tmp_path),
        {"c": "final_layer_norm.bias", "t": "encoder.final_layer_norm.weight"}[name[0]],
    )
    resaved(folder, lambda key: None if key.endswith(last) else key)
    with pytest.raises(IntegrityError, match="model.safetensors does not fit its config.json: it lacks norm."):
        read_text(folder)
    shutil.copy(FIXTURES / name / "model.safetensors", folder)
    more = load_file(folder / "model.safetensors") | {"encoder.extra": torch.zeros(1)}
    save_file(more, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match="holds the unknown encoder.extra"):
        read_text(folder)
    configured(folder, num_hidden_layers=3, num_layers=3, text_config={"num_hidden_layers": 3})
    with pytest.raises(IntegrityError, match="lacks|size mismatch"):
        read_text(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(missing, tmp_path):
    folder = copied("t5", tmp_path)
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=f"t5 lacks {missing}; it holds "):
        read_text(folder)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"version": "1.0", "model": {"type": "Wordy"}}'])
def test_a_tokenizer_that_cannot_be_read_is_refused(data, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(IntegrityError, match="tokenizer.json cannot be read as a tokenizer"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_of_too_many_tokens_or_without_an_end_is_refused(tmp_path):
    folder = copied("t5", tmp_path)
    shutil.copy(FIXTURES / "clip" / "tokenizer.json", folder)
    with pytest.raises(ConfigError, match="the tokenizer has 349 tokens; this encoder has vectors for 54"):
        read_text(folder)
    bare = json.loads((FIXTURES / "t5" / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    with pytest.raises(ConfigError, match="no token of an empty text"):
        read_text(folder)


def test_padding_that_a_file_asks_for_is_ours_to_do(tmp_path):
    folder = copied("t5", tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    raw["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert read_text(folder)[1].encode([""]).mask.sum() == 1


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"needs the extra 'text': pip install 'inkwell\[text\]'"):
        read_text(FIXTURES / "t5")
