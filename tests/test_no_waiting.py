"""No step of sampling waits for the device: everything between two steps is known on the host.

On the meta device there are no values, so that whatever would read one there (``.item()``, ``bool(tensor)``, a copy to
the host) is an error.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cogvideox
from cogvideox.diffusion.names import GUIDANCES, SAMPLERS
from cogvideox.diffusion.stepping import Predictions
from cogvideox.sampling.memory import OncePerRun
from cogvideox.system import VideoDiffusion
from cogvideox.system_sampling import Start

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
META = torch.device("meta")
SIZE = {"num_frames": 9, "height": 32, "width": 32, "steps": 4}


def system_on_meta(base: str = "tiny_t2v", *overrides: str) -> VideoDiffusion:
    config = cogvideox.load_config([CONFIGS / f"{base}.yaml"], ["model.transformer.num_layers=2", *overrides])
    system = VideoDiffusion(config)
    system.transformer.to(META)
    system.once_per_run = OncePerRun(system)
    return system.eval().requires_grad_(False)


def conditions(system: VideoDiffusion, batch: int = 2):
    net = system.transformer
    g = net.geometry
    one = {"tokens": torch.empty(batch, g["text_length"], g["text_hidden_size"], device=META)}
    if net.in_channels > net.out_channels:
        one["concat"] = torch.empty(batch, 3, net.out_channels, 8, 8, device=META)
    return one, dict(one)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_no_sampler_reads_from_the_device(sampler: str) -> None:
    system = system_on_meta("tiny_t2v", f"sampler={sampler}", "guidance=dynamic")
    out = system.sample_latents(conditions(system), seeds=[0, 1], **SIZE)
    assert out.is_meta and out.shape == (2, 3, 8, 8, 8)


@pytest.mark.parametrize("guidance", sorted(GUIDANCES))
@pytest.mark.parametrize("base", ["tiny_t2v", "tiny_i2v"])
def test_no_guidance_reads_from_the_device(base: str, guidance: str) -> None:
    system = system_on_meta(base, f"guidance={guidance}")
    assert system.sample_latents(conditions(system), seeds=[0, 1], **SIZE).is_meta


def test_neither_do_a_start_kept_frames_and_an_edit_with_its_reference() -> None:
    system = system_on_meta("tiny_t2v", "sample.reference_steps=0.5")
    latents = torch.empty(2, 3, 8, 8, 8, device=META)
    mask = torch.zeros(1, 3, 1, 1, 1)
    mask[:, 0] = 1
    ways = {"start": Start(latents, 0.8), "keep": (latents, mask)}
    assert system.sample_latents(conditions(system), seeds=[0, 1], **SIZE, **ways).is_meta
    run = {"steps": 4, "seeds": [0, 1], "source": conditions(system)}
    assert system.edit_latents(conditions(system), latents, **run).is_meta


def test_a_prediction_that_is_not_finite_is_found_one_prediction_later() -> None:
    """So that the device has work while the host looks at what it did before."""
    values = iter([0.0, float("nan"), 0.0, 0.0])
    predict = Predictions(lambda x, t: x + next(values), steps=4)
    x, t = torch.zeros(2), torch.tensor(500)
    predict(x, t, 0)
    predict(x, t, 1)
    with pytest.raises(FloatingPointError, match=r"step 2 of 4 \(timestep 500\)"):
        predict(x, t, 2)
    predict = Predictions(lambda x, t: x * torch.nan, steps=1)
    last = predict(x, t, 0)
    with pytest.raises(FloatingPointError, match="step 1 of 1"):
        predict.settled(last)


def test_texts_and_modulations_are_computed_once_per_run_and_change_nothing() -> None:
    config = cogvideox.load_config(
        [CONFIGS / "tiny_t2v.yaml"], ["model.transformer.num_layers=2", "guidance=dynamic"]
    )
    torch.manual_seed(0)
    system = VideoDiffusion(config)
    for parameter in system.model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    system.prepare_sampling(torch.device("cpu"))
    g = system.transformer.geometry
    tokens = [torch.randn(1, g["text_length"], g["text_hidden_size"]) for _ in range(2)]
    pair = {"tokens": tokens[0]}, {"tokens": tokens[1]}
    expected = system.sample_latents(pair, seeds=[3], **SIZE)

    calls = {"text": 0, "adaln": 0}

    def count(name: str):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    mixins = system.transformer.mixins
    mixins["patch_embed"].text_proj.register_forward_hook(count("text"))
    mixins["adaln_layer"].adaLN_modulations[0].register_forward_hook(count("adaln"))
    system.once_per_run = OncePerRun(system)
    found = [system.sample_latents(pair, seeds=[3], **SIZE) for _ in range(2)]
    # Each run has a pair of texts of its own; its timesteps are those of the run before.
    assert calls == {"text": 2, "adaln": SIZE["steps"]}
    for again in found:
        # Modulations of one row and of two round apart (float32).
        torch.testing.assert_close(again, expected, atol=2e-5, rtol=0)
