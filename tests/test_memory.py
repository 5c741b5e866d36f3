"""The knob sample.memory: what it picks, what it refuses, and that no set changes the video."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cogvideox
from cogvideox import plan as planner
from cogvideox.config import load_config
from cogvideox.live_memory import LiveMemory
from cogvideox.planning.sampling import LADDER, Savings, network_bytes, stage_bytes, text_bytes, vae_bytes
from cogvideox.sampling.memory import apply_memory, choose_memory
from cogvideox.system import VideoDiffusion, build_vae

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CPU = torch.device("cpu")
SMALL = ("model.transformer.num_layers=2", "sample.steps=3", "model.conditions.0.params.config.num_layers=2")
PROMPTS = ["a red circle moving right", "a blue square moving up"]
TILES = ("vae.tile_latent_height=30", "vae.tile_latent_width=45")


def published(name: str, *overrides: str):
    return load_config([CONFIGS / f"cogvideox_{name}.yaml"], overrides)


def make_system(*overrides: str, base: str = "tiny_t2v.yaml") -> VideoDiffusion:
    config = cogvideox.load_config([CONFIGS / base], [*SMALL, *overrides])
    torch.manual_seed(0)
    system = VideoDiffusion(config)
    for parameter in system.model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return system


def sample(system: VideoDiffusion, **arguments) -> torch.Tensor:
    images = None
    if system.transformer.in_channels > system.transformer.out_channels:
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return system.sample(PROMPTS, images=images, **arguments)


def prepared(savings: Savings, *overrides: str, base: str = "tiny_t2v.yaml") -> VideoDiffusion:
    system = make_system(*overrides, base=base)
    chosen = replace(choose_memory(system.config, "fast", CPU), savings=savings)
    system.prepare_sampling(CPU, place=False)
    apply_memory(system, chosen, CPU)
    return system


# ------------------------------------------------------------------------------------------------ the same video


@pytest.mark.parametrize("base", ["tiny_t2v.yaml", "tiny_i2v.yaml"])
def test_no_set_of_savings_changes_a_pixel_beyond_rounding(
    base: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_system(base=base)
    plain.prepare_sampling(CPU)
    expected = sample(plain, negative_prompt="a green triangle")
    for savings in LADDER:
        system = prepared(savings, base=base)
        for _ in range(2):  # the second run finds the models where the first one left them
            found = sample(system, negative_prompt="a green triangle")
            # Modulations of one row and of two round apart; three steps of a network in float32 carry that on.
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0, msg=savings.name)


def test_the_text_encoder_may_be_released_and_read_again() -> None:
    """A pretrained encoder does not exist before its first use, and is another object after a release."""
    overrides = ("model.conditions.0.params.trainable=false",)
    plain = make_system(*overrides)
    plain.prepare_sampling(CPU)
    expected = sample(plain)
    for savings in LADDER[1:]:
        system = make_system(*overrides)
        embedder = system.conditioner.embedders[0]
        embedder._model = "stands for a folder"  # so that release frees it and the next use builds it again
        system.conditioner.release()
        assert embedder.transformer is None
        chosen = replace(choose_memory(system.config, "small", CPU), savings=savings)
        system.prepare_sampling(CPU, place=False)
        apply_memory(system, chosen, CPU)
        for _ in range(2):
            torch.testing.assert_close(sample(system), expected, atol=2e-5, rtol=0)
            system.conditioner.release()


def test_tiles_are_the_same_tiles_wherever_the_vae_waits() -> None:
    overrides = ("vae.tile_latent_height=6", "vae.tile_latent_width=5")
    plain = make_system(*overrides)
    plain.prepare_sampling(CPU)
    found = sample(prepared(LADDER[-1], *overrides))
    torch.testing.assert_close(found, sample(plain), atol=2e-5, rtol=0)


def test_modulations_are_computed_once_per_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    system = prepared(LADDER[1])
    calls = []
    original = system.transformer.precompute_modulations
    monkeypatch.setattr(
        system.transformer, "precompute_modulations", lambda *a: calls.append(a) or original(*a)
    )
    sample(system)
    sample(system)
    assert len(calls) == 1
    sample(system, steps=2)
    assert len(calls) == 2


def test_the_network_is_right_outside_of_the_sampler_too() -> None:
    """Inversion calls it with no schedule announced: then the adaLN weights pass through the device."""
    plain = make_system()
    plain.prepare_sampling(CPU)
    x = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    for savings in LADDER:
        system = prepared(savings)
        condition, _ = system.encode_prompts(PROMPTS)
        for _ in range(2):
            found = system.predict(x, torch.tensor([999, 3]), condition)
        assert torch.equal(found, plain.predict(x, torch.tensor([999, 3]), condition))


def test_small_keeps_two_layers_of_the_transformer_and_frees_them_for_the_vae(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cogvideox.sampling import memory

    made = []

    class Recorded(memory.LayerOffload):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(memory, "LayerOffload", Recorded)
    system = make_system("model.transformer.num_layers=4")
    chosen = choose_memory(system.config, "small", CPU)
    system.prepare_sampling(CPU, place=False)
    apply_memory(system, chosen, CPU)
    at_decode = []
    system.vae.decoder.register_forward_pre_hook(lambda *_: at_decode.append([o.device_bytes for o in made]))
    sample(system)
    adaln, layers, text = made
    assert len(layers.layers) == 4 and layers.peak_resident == adaln.peak_resident == text.peak_resident == 2
    assert at_decode and at_decode[0] == [0, 0, 0]


def test_quantize_reports_on_request_and_samples(caplog: pytest.LogCaptureFixture) -> None:
    for memory in ("fast", "small"):
        system = make_system(
            "sample.quantize=int8", "sample.quantize_report=true", f"sample.memory='{memory}'"
        )
        chosen = choose_memory(system.config)
        system.prepare_sampling(CPU, place=False)
        with caplog.at_level(logging.INFO, logger="cogvideox"):
            apply_memory(system, chosen, CPU)
        assert "relative error of one forward" in caplog.text
        assert torch.isfinite(sample(system)).all()


# ---------------------------------------------------------------------------------------------------- the choice


def test_names_pick_their_sets_and_say_why(caplog: pytest.LogCaptureFixture) -> None:
    config = published("5b")
    with caplog.at_level(logging.INFO, logger="cogvideox"):
        peaks = [choose_memory(config, name).peak for name in ("fast", "balanced", "small")]
    assert peaks == sorted(peaks, reverse=True)
    assert "sample.memory=balanced: the text encoder first" in caplog.text
    assert "Planned: text " in caplog.text and "denoising" in caplog.text


def test_a_limit_takes_the_fastest_set_that_fits() -> None:
    config = published("5b")
    plans = [max(stage_bytes(config, savings).values()) for savings in LADDER]
    assert plans == sorted(plans, reverse=True)
    for index, peak in enumerate(plans):
        limit = -(-peak // 2**20) / 2**10  # in GiB, rounded up to a MiB
        first = next(i for i, p in enumerate(plans) if p <= limit * 2**30)
        assert choose_memory(config, f"{limit} GiB").savings is LADDER[first]
        assert first <= index


def test_a_limit_that_cannot_be_met_says_the_least_and_what_would_help() -> None:
    with pytest.raises(
        ValueError, match=r"'1 GiB' cannot be met: the least .* need is .* in decoding.*in tiles"
    ):
        choose_memory(published("5b"), "1 GiB")
    with pytest.raises(ValueError, match=r"in denoising\. Use .*sample.quantize=int8"):
        choose_memory(published("5b", *TILES, "sample.batch_size=4"), "1 GiB")
    least = choose_memory(published("5b"), "small").peak
    with pytest.raises(ValueError) as error:
        choose_memory(published("5b"), "1 GiB")
    named = float(str(error.value).split("sample.memory='")[2].split(" GiB")[0])
    assert 0 <= named * 2**30 - least < 0.11 * 2**30
    assert choose_memory(published("5b"), f"{named} GiB").savings.name == "small"


@pytest.mark.parametrize("word", ["tiny", "12", "12 GB", "0 GiB", "-3 GiB"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="expected fast, balanced, small, or a size such as '12 GiB'"):
        choose_memory(published("2b"), word)


def test_torchao_weights_are_not_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogvideox.sampling import memory

    monkeypatch.setattr(memory, "check_method", lambda method: None)
    config = published("2b", "sample.quantize=torchao_int8")
    assert choose_memory(config, "fast").quantize == "torchao_int8"
    with pytest.raises(ValueError, match="use sample.quantize=int8, or sample.memory=fast"):
        choose_memory(config, "balanced")


def test_a_plan_larger_than_the_device_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cogvideox.sampling import memory

    monkeypatch.setattr(memory, "_device_bytes", lambda device: 16 * 2**30)
    choose_memory(published("5b"), "fast", torch.device("cuda"))
    assert "and the device has 16.00 GiB: use sample.memory=" in caplog.text


# ------------------------------------------------------------------------------------- whole runs, as planned


@pytest.mark.parametrize(
    ("name", "memory", "gigabytes"),
    [("2b", "balanced, text encoder by layers", 6), ("5b", "balanced", 13), ("5b", "small", 4)],
)
def test_whole_runs_are_planned_within_their_targets(name: str, memory: str, gigabytes: float) -> None:
    """Figures of the plan, not measurements: tensors, without the driver's context. The VAE decodes in tiles.

    Published: 18 GB (2B) and 26 GB (5B). With the transformer on the device: 6 and 13 GB; by layers: 4 GB. The 2B's 6
    GB are less than its text encoder alone.
    """
    savings = next(s for s in LADDER if s.name == memory)
    assert max(stage_bytes(published(name, *TILES), savings).values()) <= gigabytes * 1e9


@pytest.mark.parametrize(("frames", "tiles"), [(49, ()), (17, TILES)])
def test_planned_decoding_is_at_least_what_lives_in_it(frames: int, tiles: tuple[str, ...]) -> None:
    """Counted on the meta device at 480 x 720 in bfloat16; a plan below it would promise too much."""
    config = published("5b", *tiles, f"sample.num_frames={frames}")
    vae = build_vae(config, device="meta").to(torch.bfloat16).requires_grad_(False)
    with torch.device("meta"), LiveMemory() as memory, torch.no_grad():
        for chunk in vae.decode_stream(
            torch.empty(1, vae.num_latents(frames), 16, 60, 90, dtype=torch.bfloat16)
        ):
            chunk.float()
    assert memory.peak_bytes <= vae_bytes(config, LADDER[1])["decoding"]


@pytest.mark.parametrize("name", ["2b", "5b", "5b_i2v"])
def test_the_parts_of_the_network_add_up_to_its_parameters(name: str) -> None:
    config = published(name)
    parts = network_bytes(config)
    assert parts["layers"] + parts["adaln"] + parts["ends"] == 2 * planner.network_parameters(config)
    layers = config.model.transformer.num_layers
    assert parts["two layers"] == pytest.approx(parts["layers"] * 2 / layers)
    assert network_bytes(config, "int8")["layers"] == pytest.approx(parts["layers"] / 2, rel=0.01)


def test_the_planned_weights_are_those_of_the_built_network() -> None:
    system = make_system()
    config = system.config
    config.sample.precision = "fp32"
    parts, net = network_bytes(config), system.transformer

    def count(module: torch.nn.Module) -> int:
        return sum(p.nbytes for p in module.parameters())

    assert parts["layers"] == count(net.transformer.layers)
    # The norms of queries and keys are in the mixin and stay on the device with the ends.
    assert parts["adaln"] == count(net.mixins["adaln_layer"].adaLN_modulations)
    assert parts["layers"] + parts["adaln"] + parts["ends"] == count(net)
    assert text_bytes(config)["whole"] == count(system.conditioner.embedders[0].transformer)
    table = net.precompute_modulations(list(range(config.sample.steps)))
    assert parts["table"] == table.nbytes
