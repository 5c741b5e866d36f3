"""Reference attention: an edit that looks at the tokens of the clip it comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sat.model.base_model import BaseMixin
from test_system import CONFIGS, PROMPTS, make_system
from transformer_cases import KINDS, full, inputs, randomise, tiny

from cogvideox.config import load_config
from cogvideox.diffusion.denoiser import GuidedDenoiser
from cogvideox.diffusion.guidance import ConstantGuidance
from cogvideox.diffusion.inversion import ddim_invert
from cogvideox.diffusion.reference import ReferenceTrajectory
from cogvideox.diffusion.samplers import ddim
from cogvideox.live_memory import LiveMemory
from cogvideox.model.reference import ReferenceAttention, attend_with_reference
from cogvideox.planning.sampling import LADDER, activation_bytes
from cogvideox.sampling.memory import apply_memory, choose_memory
from cogvideox.sampling.policy import check_inputs
from cogvideox.sampling.prompts import Request
from cogvideox.system import VideoDiffusion

CPU = torch.device("cpu")


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1) @ value


def tokens(items: int, seed: int = 0) -> list[torch.Tensor]:
    """query, key, value (items, 2 heads, 5 text + 7 video, 4), float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(items, 2, 12, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


# --------------------------------------------------------------------------------------------------- the attention


def test_an_item_attends_to_itself_and_to_its_reference_under_its_own_text() -> None:
    """Softmax over two sets of keys is the mean of both, weighted with their sums of exponentials."""
    query, key, value = tokens(6)  # references 0 1; the edited items 2 3 (without text) and 4 5 (with it)
    found = attend_with_reference(attend, query, key, value, items=2, text_length=5)
    for item in range(6):
        q, k, v = (x[item] for x in (query, key, value))
        expected = attend(q, k, v)
        if item >= 2:
            k_ref, v_ref = (torch.cat([x[item, :, :5], x[item % 2, :, 5:]], dim=1) for x in (key, value))
            own, reference = ((q @ keys.mT / 2).exp().sum(-1, keepdim=True) for keys in (k, k_ref))
            expected = (own * expected + reference * attend(q, k_ref, v_ref)) / (own + reference)
        torch.testing.assert_close(found[item], expected, rtol=0, atol=1e-12)


def test_a_reference_with_the_same_tokens_changes_nothing() -> None:
    """Softmax over every key twice is softmax over every key once: the weight of text and video stays."""
    twice = [torch.cat([x, x]) for x in tokens(2)]
    found = attend_with_reference(attend, *twice, items=2, text_length=5)
    torch.testing.assert_close(found, attend(*twice), rtol=0, atol=1e-12)


@pytest.mark.parametrize("items", [2, 3, 4])
def test_references_without_their_items_are_refused(items: int) -> None:
    with pytest.raises(ValueError, match=rf"a batch of 3 with {items} reference items"):
        attend_with_reference(attend, *tokens(3), items=items, text_length=5)


# ----------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_network_is_itself_where_the_reference_is_the_item(kind: str) -> None:
    net = randomise(tiny(kind))
    arguments = inputs(net, batch=2)
    plain = net(**arguments)
    twice = {k: torch.cat([v, v]) if k != "ofs" and v is not None else v for k, v in arguments.items()}
    if torch.is_tensor(arguments.get("ofs")) and arguments["ofs"].numel() > 1:
        twice["ofs"] = torch.cat([arguments["ofs"]] * 2)
    with ReferenceAttention(net)(2):
        found = net(**twice)
    torch.testing.assert_close(found, torch.cat([plain, plain]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_references_see_nothing_of_the_edit_and_the_edit_sees_them_in_the_chosen_layers() -> None:
    net = randomise(tiny("5b"))
    arguments = inputs(net, batch=3)
    plain, found = net(**arguments), {}
    for layers in (None, (0, 1), (0,), (1,)):
        with ReferenceAttention(net, layers)(1):
            found[layers] = net(**arguments)
        torch.testing.assert_close(found[layers][:1], plain[:1], rtol=0, atol=1e-5)
        assert (found[layers][1:] - plain[1:]).abs().flatten(1).mean(1).min() > 1e-4
    assert torch.equal(found[None], found[0, 1])
    assert not torch.equal(found[0, 1], found[(0,)]) and not torch.equal(found[(0,)], found[(1,)])


def test_text_of_the_reference_is_not_seen_and_its_video_is() -> None:
    net = randomise(tiny("2b"))
    seen = []
    arguments = inputs(net, batch=2)
    with ReferenceAttention(net, [0])(1):  # in layer 0 no text token has met a video token yet
        for key in ("context", "x"):
            changed = arguments[key].clone().requires_grad_()
            out = net(**arguments | {key: changed})
            (gradient,) = torch.autograd.grad(out[1].square().sum(), changed)
            seen.append(gradient[0].abs().max().item())
    assert seen[0] == 0 and seen[1] > 0


def test_training_is_untouched_outside_and_an_error_inside_leaves_nothing() -> None:
    net, other = (randomise(tiny("5b")) for _ in range(2))
    hook, arguments = net.hooks["attention_fn"], inputs(net)
    with pytest.raises(ValueError, match="a batch of 2 with 2 reference items"), ReferenceAttention(net)(2):
        net(**arguments)
    assert net.hooks["attention_fn"] is hook
    for one in (net, other):
        one(**arguments).square().mean().backward()
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs if a.grad is not None)
    assert net.state_dict().keys() == other.state_dict().keys()


@pytest.mark.parametrize(
    ("layers", "message"), [([2], "layer 2 does not"), ([0, -1], "layer -1 does"), ([], "no layer is named")]
)
def test_layers_that_do_not_exist_are_refused(layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"reference_layers: {message}.*has the layers 0-1"):
        ReferenceAttention(tiny("2b"), layers)


def test_an_attention_that_knows_no_reference_is_refused() -> None:
    class Own(BaseMixin):
        def attention_fn(self, query, key, value, mask, dropout=None, **_):
            return value

    with pytest.warns(UserWarning, match="replaces model"):
        net = tiny("2b", position=Own())
    with pytest.raises(ValueError, match="comes from the mixin adaln_layer -> pos_embed, which knows no ref"):
        ReferenceAttention(net)


# -------------------------------------------------------------------------------------------------------- the edit


def edit(system: VideoDiffusion, prompts: list[str], source: list[str] | None, part: float, **options):
    """The edited latents of two random clips, and the clips (2, 3, 8, 8, 8)."""
    system.config.sample.reference_steps = part
    clips = 0.7 * torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        images = None
        if system.transformer.in_channels > system.transformer.out_channels:
            images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        conditions = system.encode_prompts(prompts, images)
        source = system.encode_prompts(source, images) if source else None
        run = {"steps": 6, "seeds": [0, 1], "source": source, **options}
        return system.edit_latents(conditions, clips, **run), clips


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        ("tiny_t2v.yaml", []),
        ("tiny_i2v.yaml", []),
        ("tiny_t2v.yaml", ["model.transformer.patch_size=[2,2,2]"]),
    ],
)
def test_a_reference_changes_the_edit_and_none_is_bitwise_the_edit_without(base: str, overrides) -> None:
    system = make_system(*overrides, base=base).eval()
    plain, _ = edit(system, PROMPTS, PROMPTS[::-1], 0.0)
    used = []
    for part in (0.5, 1.0):
        used.append(edit(system, PROMPTS, PROMPTS[::-1], part)[0])
        assert (used[-1] - plain).abs().mean() > 1e-5
    assert not torch.equal(*used)
    system.config.sample.reference_layers = [1]
    assert not torch.equal(edit(system, PROMPTS, PROMPTS[::-1], 1.0)[0], used[1])
    assert torch.equal(edit(system, PROMPTS, PROMPTS[::-1], 0.0)[0], plain)


def plain_denoiser(system: VideoDiffusion, network, steps: int = 6) -> GuidedDenoiser:
    conditions = system.encode_prompts(PROMPTS)
    return GuidedDenoiser(network, system.schedule, steps, ConstantGuidance(1.0), *conditions)


@torch.no_grad()
def test_off_is_inversion_and_ddim_and_nothing_else() -> None:
    system = make_system().eval()
    found, clips = edit(system, PROMPTS, None, 0.0)
    denoise = plain_denoiser(system, system.predict)
    noise = ddim_invert(denoise, clips, system.schedule, steps=6, iterations=3)
    assert torch.equal(ddim(denoise, noise, system.schedule, steps=6), found)


@torch.no_grad()
def test_a_run_with_its_own_trajectory_as_reference_is_the_run_itself() -> None:
    system = make_system().eval()
    x, steps = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0)), []
    plain = ddim(plain_denoiser(system, system.predict), x, system.schedule, steps=6, callback=steps.append)
    timesteps = system.schedule.timesteps(6).tolist()
    condition = system.encode_prompts(PROMPTS)[0]
    reference = ReferenceTrajectory(timesteps, condition, ReferenceAttention(system.transformer))
    for t, state in zip(timesteps, [x, *(step["x"] for step in steps)], strict=False):
        reference.recording(None)({"t": t, "x": state})
    beside = plain_denoiser(system, reference.beside(system.predict))
    torch.testing.assert_close(ddim(beside, x, system.schedule, steps=6), plain, rtol=0, atol=1e-5)


def test_the_reference_is_the_state_of_the_clip_at_the_same_timestep() -> None:
    states, calls = {}, []

    class Entered:
        def __init__(self, items: int):
            self.items = items

        def __enter__(self) -> None:
            calls.append(self.items)

        def __exit__(self, *_) -> None: ...

    condition = {"tokens": torch.full((1, 2, 3), 7.0)}
    reference = ReferenceTrajectory([999, 800], condition, Entered)
    for t in (600, 800, 999):
        states[t] = torch.full((1, 1, 1, 1, 1), float(t))
        reference.recording(None)({"t": t, "x": states[t]})
    assert reference.states.keys() == {999, 800}

    def network(x, t, condition):
        seen.append((x.flatten().tolist(), t.tolist(), condition["tokens"][:, 0, 0].tolist()))
        return x

    edited, own, seen = torch.ones(2, 1, 1, 1, 1), {"tokens": torch.zeros(2, 2, 3)}, []
    for t in (999, 600):
        out = reference.beside(network)(edited, torch.tensor([t, t]), own)
        assert torch.equal(out, edited)
    assert seen == [([999, 1, 1], [999] * 3, [7, 0, 0]), ([1, 1], [600] * 2, [0, 0])] and calls == [1]


@pytest.mark.parametrize("part", [-0.1, 1.5, 0.01])
def test_a_part_that_is_none_is_refused_before_the_inversion(part: float) -> None:
    system = make_system().eval()
    system.predict = None  # is not called
    with pytest.raises(ValueError, match=rf"sample\.reference_steps={part}"):
        edit(system, PROMPTS, None, part)
    system.config.sample.reference_layers = [5]
    with pytest.raises(ValueError, match=r"layer 5 does not exist; this network has the layers 0-1"):
        edit(system, PROMPTS, None, 1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sample.reference_steps=0.5"], "sample.reference_steps is for the edit of an inverted video"),
        (["sample.reference_steps=2"], "sample.reference_steps=2"),
        (["sample.invert=true", "sample.reference_layers=[0,9]"], "layer 9 does not exist"),
    ],
)
def test_the_command_line_refuses_it_before_weights_are_read(overrides, message, tmp_path) -> None:
    config = make_system(*overrides).config
    with pytest.raises(ValueError, match=message):
        check_inputs(config, Request(0, "a dog", 0, video=tmp_path / "clip.mp4"))


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("base", ["tiny_t2v.yaml", "tiny_i2v.yaml"])
@pytest.mark.parametrize("part", [0.0, 0.5])
def test_inversion_in_small_memory_is_inversion(part: float, base: str) -> None:
    """Layers by turns, and modulations from a table: the inverse asks for its timesteps upwards."""
    found = []
    for memory in ("fast", "small"):
        system = make_system(base=base)
        chosen = choose_memory(system.config, memory, CPU)
        system.prepare_sampling(CPU, place=False)
        apply_memory(system, chosen, CPU)
        latents, _ = edit(system, PROMPTS, PROMPTS[::-1], part)
        found.append((latents, torch.cat(list(system.decode(latents)), dim=1)))
    for fast, small in zip(*found, strict=True):
        # float32, some thirty forward passes in a row and the decoder: products of weights elsewhere in memory round
        # apart.
        torch.testing.assert_close(small, fast, rtol=0, atol=5e-5)


@pytest.mark.parametrize("savings", [LADDER[0], LADDER[-1]], ids=["fast", "small"])
def test_the_planned_activations_are_those_with_a_reference(savings, fused_attention: None) -> None:
    """Counted at the published size on the meta device: one reference, and the guidance pair of its edit."""
    config = load_config(
        [CONFIGS / "cogvideox_5b.yaml"], ["sample.invert=true", "sample.reference_steps=0.5"]
    )
    net = full("5b", dtype=torch.bfloat16, num_layers=2, num_frames=49, latent_height=60, latent_width=90)
    net.requires_grad_(False).chunk_mlp(8192 if savings.mlp_chunks else None)
    with torch.device("meta"), LiveMemory() as memory, torch.no_grad(), ReferenceAttention(net)(1):
        context = torch.empty(3, 226, 4096, dtype=torch.bfloat16)
        net(torch.empty(3, 13, 16, 60, 90), torch.zeros(3), context)
    planned = activation_bytes(config, savings)
    assert memory.peak_bytes <= planned <= 1.03 * memory.peak_bytes
    config.sample = replace(config.sample, reference_steps=0.0)
    assert activation_bytes(config, savings) < 0.7 * planned
