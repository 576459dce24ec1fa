"""Transformers: attention by brute force, blocks against the peer library, pads that change nothing."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from torch import nn
from torch.profiler import ProfilerActivity, profile

from diffusion_core.errors import ConfigError
from diffusion_core.nets import mmdit, uvit
from diffusion_core.nets.blocks import CrossAttention, attend
from diffusion_core.nets.dit import Block, DiT
from diffusion_core.nets.mmdit import MMDiT
from diffusion_core.nets.tokens import patches, picture
from diffusion_core.nets.uvit import UViT

KINDS = [DiT, UViT, MMDiT]
SIZES = {"channels": 3, "size": 8, "classes": 5, "width": 16, "depth": 3, "heads": 2, "text": 6}
RNG = torch.Generator().manual_seed(0)
X = torch.randn(3, 3, 8, 8, generator=RNG)
C = torch.tensor([-1.0, 0.5, 2.0])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
COND = {"label": torch.tensor([0, 4, -1]), "text": torch.randn(3, 4, 6, generator=RNG), "mask": MASK}


def awake(kind, std=0.2, **sizes):
    """A network none of whose weights is zero."""
    torch.manual_seed(0)
    net = kind(**(SIZES | sizes))
    return randomized(net, std)


def randomized(module, std=0.2):
    for weight in module.parameters():
        nn.init.normal_(weight, std=std)
    return module


def said(net, **changed):
    with torch.no_grad():
        return net(X, C, COND | changed)


def by_hand(q, k, v, heads, mask=None):
    """softmax(qkᵀ/√d)v with a loop over heads and queries."""
    out, width = torch.zeros_like(q), q.shape[-1] // heads
    for b in range(len(q)):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            seen = slice(None) if mask is None else mask[b]
            for t in range(q.shape[1]):
                logits = torch.tensor([q[b, t, part] @ key for key in k[b, seen, part]]) / width**0.5
                weights = logits.exp() / logits.exp().sum()
                out[b, t, part] = (weights[:, None] * v[b, seen, part]).sum(0)
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [7, 3, 1])
def test_attention_is_the_softmax_written_out_whole_or_in_chunks_of_queries(masked, chunk):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 7, 8).double(), torch.randn(2, 5, 8).double(), torch.randn(2, 5, 8).double()
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]).bool() if masked else None
    found = [attend(part, k, v, 2, None if mask is None else mask[:, None, None]) for part in q.split(chunk, 1)]
    torch.testing.assert_close(torch.cat(found, 1), by_hand(q, k, v, 2, mask), rtol=1e-12, atol=1e-12)


def test_attention_never_holds_the_whole_matrix_of_weights():
    q = k = v = torch.randn(1, 1024, 16)

    def peak(run):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            run()
        return max(event.self_cpu_memory_usage for event in prof.events())

    matrix = 4 * 1024**2
    assert peak(lambda: (q @ k.transpose(1, 2) / 4).softmax(-1) @ v) >= matrix
    assert peak(lambda: attend(q, k, v, 1)) < matrix / 4


def test_attention_to_text_is_torchs_own():
    torch.manual_seed(2)
    ours = CrossAttention(16, 4, 6)
    theirs = nn.MultiheadAttention(16, 4, bias=True, kdim=6, vdim=6, batch_first=True)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.ask.weight)
        theirs.k_proj_weight.copy_(ours.answer.weight[:16])
        theirs.v_proj_weight.copy_(ours.answer.weight[16:])
        theirs.in_proj_bias.zero_()
        theirs.out_proj.load_state_dict(ours.join.state_dict())
        tokens, text, mask = torch.randn(2, 5, 16), COND["text"][:2], MASK[:2]
        wanted, _ = theirs(tokens, text, text, key_padding_mask=~mask)
        torch.testing.assert_close(ours(tokens, text, mask), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_the_joint_block_is_the_peers(last):
    """Against diffusers' block of Stable Diffusion 3.5, weights copied."""
    torch.manual_seed(3)
    ours = randomized(mmdit.Block(32, 4, 4, last))
    theirs = JointTransformerBlock(32, 4, 8, context_pre_only=last, qk_norm="rms_norm")
    state = {}
    for stream, tail, extra in ((ours.seen, "", "to_{}"), (ours.told, "_context", "add_{}_proj")):
        for name, part in zip("qkv", stream.mix.weight.chunk(3), strict=True):
            state[f"attn.{extra.format(name)}.weight"] = part
        for name, part in zip("qkv", stream.mix.bias.chunk(3), strict=True):
            state[f"attn.{extra.format(name)}.bias"] = part
        added = "added_" if tail else ""
        state[f"attn.norm_{added}q.weight"] = stream.query_norm.weight
        state[f"attn.norm_{added}k.weight"] = stream.key_norm.weight
        mute = last and tail
        renamed = {"steer": f"norm1{tail}.linear"}
        if not mute:
            renamed |= {"join": "attn.to_add_out" if tail else "attn.to_out.0"}
            renamed |= {"mlp.0": f"ff{tail}.net.0.proj", "mlp.2": f"ff{tail}.net.2"}
        for name, peers in renamed.items():
            for kind, value in stream.get_submodule(name).state_dict().items():
                turned = value.roll(32, 0) if mute and name == "steer" else value  # theirs says scale, then shift
                state[f"{peers}.{kind}"] = turned
    theirs.load_state_dict(state)
    seen, told, steer = torch.randn(2, 9, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    with torch.no_grad():
        told_wanted, seen_wanted = theirs(seen, told, steer)
        mask = torch.ones(2, 1, 1, 14, dtype=torch.bool)
        found, noted = ours(seen, told, torch.nn.functional.silu(steer), mask)
    torch.testing.assert_close(found, seen_wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(noted, told if last else told_wanted, rtol=1e-5, atol=1e-4)


def test_a_block_of_the_u_vit_is_the_peers_plain_one():
    torch.manual_seed(4)
    ours = randomized(uvit.Block(16, 2, 4))
    theirs = BasicTransformerBlock(16, 2, 8, activation_fn="gelu", attention_bias=False)
    state = {f"attn1.to_{n}.weight": w for n, w in zip("qkv", ours.mix.weight.chunk(3), strict=True)}
    names = {
        "norm1": "norm1",
        "norm2": "norm3",
        "join": "attn1.to_out.0",
        "mlp.0": "ff.net.0.proj",
        "mlp.2": "ff.net.2",
    }
    for name, peers in names.items():
        state |= {f"{peers}.{kind}": value for kind, value in ours.get_submodule(name).state_dict().items()}
    theirs.load_state_dict(state)
    tokens = torch.randn(2, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)


def test_the_last_deep_block_reads_what_the_first_shallow_one_said():
    net, heard, spoken = awake(UViT, depth=7), [], []
    for block in net.shallow:
        block.register_forward_hook(lambda _, __, out: spoken.append(out))
    for block in net.deep:
        block.skip.register_forward_hook(lambda _, given, __: heard.append(given[0][..., 16:]))
    said(net)
    assert len(heard) == len(spoken) == 3
    assert all(map(torch.equal, heard, reversed(spoken)))


def test_a_deep_block_that_reads_its_skip_alone_forgets_the_middle():
    """Against skips that are added after the block: where Linear(Concat(deep, shallow)) is (0, 1), the way is cut."""
    net = awake(UViT)
    with torch.no_grad():
        net.deep[0].skip.weight.copy_(torch.cat((torch.zeros(16, 16), torch.eye(16)), 1))
        net.deep[0].skip.bias.zero_()
        before = said(net)
        randomized(net.middle, 1.0)
        assert torch.equal(said(net), before)
        net.deep[0].skip.weight.copy_(torch.cat((torch.eye(16), torch.zeros(16, 16)), 1))
        assert not torch.allclose(said(net), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_word_is_zero(kind):
    out = kind(**SIZES)(X, C, COND)
    assert out.shape == X.shape and not out.any()


def test_blocks_are_the_identity_at_init():
    tokens, told, steer = torch.randn(3, 9, 16), torch.randn(3, 4, 16), torch.randn(3, 16)
    assert torch.equal(Block(16, 2, 4, text=16)(tokens, steer, (told, MASK)), tokens)
    for last in (False, True):
        mask = torch.ones(3, 1, 1, 13, dtype=torch.bool)
        assert all(map(torch.equal, mmdit.Block(16, 2, 4, last)(tokens, told, steer, mask), (tokens, told)))


@pytest.mark.parametrize("kind", KINDS)
def test_pads_are_nowhere_seen(kind):
    net = awake(kind)
    out = said(net)
    pads = 7 * torch.randn(3, 5, 6)
    longer = {"text": torch.cat((COND["text"], pads), 1), "mask": torch.cat((MASK, torch.zeros(3, 5).bool()), 1)}
    torch.testing.assert_close(said(net, **longer), out, rtol=1e-5, atol=1e-5)
    order = torch.tensor([0, 3, 1, 2])  # row 0's pad goes before two real tokens
    torch.testing.assert_close(said(net, text=COND["text"][:, order], mask=MASK[:, order]), out, rtol=1e-5, atol=1e-5)
    for rubbish in (float("nan"), float("inf"), 1e30):
        filled = torch.where(MASK[..., None], COND["text"], rubbish)
        assert torch.equal(said(net, text=filled), out)


@pytest.mark.parametrize("kind", KINDS)
def test_real_tokens_matter_and_a_row_of_pads_is_no_text(kind):
    net = awake(kind)
    out = said(net)
    moved = said(net, text=COND["text"] + 0.5)
    assert not torch.allclose(moved[:2], out[:2], atol=1e-3) and torch.equal(moved[2], out[2])
    without = {"label": COND["label"]}
    with torch.no_grad():
        torch.testing.assert_close(net(X, C, without)[2], out[2], rtol=1e-5, atol=1e-5)
        assert torch.equal(net(X, C), net(X, C, {"label": torch.full((3,), -1)}))
        unmasked = net(X, C, without | {"text": COND["text"]})
    torch.testing.assert_close(unmasked, said(net, mask=torch.ones_like(MASK)))


@pytest.mark.parametrize("kind", KINDS)
def test_level_class_and_place_matter(kind):
    net = awake(kind)
    out = said(net)
    with torch.no_grad():
        assert not torch.allclose(net(X, C + 0.1, COND), out, atol=1e-4)
        assert not torch.allclose(net(X.roll(2, -1), C, COND).roll(-2, -1), out, atol=1e-4)
    assert not torch.allclose(said(net, label=torch.tensor([1, 3, 0])), out, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_bit_of_a_gradient(kind):
    grads, runs = [], []
    for checkpointing in (False, True):
        net, count = awake(kind, checkpointing=checkpointing), []
        for module in net.modules():
            if isinstance(module, nn.GELU):
                module.register_forward_hook(lambda *_, count=count: count.append(1))
        net(X, C, COND).square().sum().backward()
        grads.append({name: weight.grad for name, weight in net.named_parameters()})
        runs.append(len(count))
    assert runs[1] == 2 * runs[0]  # every block was computed again, or it would be no checkpointing
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert all(grad is not None for grad in grads[0].values())


@pytest.mark.parametrize("kind", [DiT, UViT])
def test_a_network_without_text_has_no_weights_for_it(kind):
    net = awake(kind, text=0)
    assert not [name for name, _ in net.named_parameters() if "words" in name or "read" in name]
    assert torch.equal(said(net), said(net, text=2 * COND["text"]))


@pytest.mark.parametrize(("kind", "sizes"), [(DiT, {}), (UViT, {"smooth": False}), (MMDiT, {})])
def test_a_token_becomes_the_patch_it_came_from(kind, sizes):
    """With attention silenced, which alone mixes places, a changed pixel moves the pixels of its own patch only."""
    net = awake(kind, **sizes)
    for name, weight in net.named_parameters():
        if ".join." in name:
            nn.init.zeros_(weight)
    changed = X.clone()
    changed[0, 0, 3, 6] += 1
    with torch.no_grad():
        moved = (net(changed, C, COND) - net(X, C, COND)).abs().sum(1) > 1e-7
    assert moved[0, 2:4, 6:8].all() and moved.sum() == 4


def test_patches_are_numbered_row_by_row_and_put_back():
    x = torch.arange(2 * 36.0).reshape(1, 2, 6, 6)
    tokens = patches(x, 3)
    assert torch.equal(tokens[0, 1], x[0, :, :3, 3:].flatten())
    assert torch.equal(picture(tokens, 3), x)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_shapes_are_refused_in_a_sentence(kind):
    net = kind(**SIZES)
    with pytest.raises(ConfigError, match="x has 4 channels; this network takes 3"):
        net(torch.zeros(3, 4, 8, 8), C, COND)
    with pytest.raises(ConfigError, match="x is 8x10; this network takes 8x8"):
        net(torch.zeros(3, 3, 8, 10), C, COND)
    with pytest.raises(ConfigError, match="text is 5 wide; this network takes 6"):
        net(X, C, COND | {"text": torch.zeros(3, 4, 5)})
    for sizes in ({"size": 7}, {"heads": 3}, {"width": 6}):
        with pytest.raises(ConfigError, match="patch must divide size"):
            kind(**(SIZES | sizes))


def test_impossible_depths_and_texts_are_refused():
    with pytest.raises(ConfigError, match="depth 4: an odd number"):
        UViT(**(SIZES | {"depth": 4}))
    for impossible in ({"text": 0}, {"depth": 0}):
        with pytest.raises(ConfigError, match="from 1 are wanted"):
            MMDiT(**(SIZES | impossible))
