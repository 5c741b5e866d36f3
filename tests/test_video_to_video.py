"""Video to video against diffusers' CogVideoXVideoToVideoPipeline on the same random weights."""

from __future__ import annotations

from pathlib import Path

import pipeline_case as case
import pytest
import torch
from test_pipeline_folder import DiffusersTable, system_of

from cogvideox.diffusion.samplers import noise_source

PROMPT, NEGATIVE = case.PROMPTS[:2]
STEPS, SEED = 5, 5
# diffusers refuses an odd number of latents for 1.5, which we pad: 5 frames are 2 latents.
FRAMES = {"2b": 9, "5b": 9, "1.5": 5}


@pytest.mark.parametrize("kind", FRAMES)
def test_the_same_video_as_diffusers_for_a_strength(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.cogvideo import pipeline_cogvideox_video2video as video_to_video

    frames = FRAMES[kind]
    pipeline = case.diffusers_pipeline(tmp_path / "t5", kind)
    components = pipeline.components | {
        "scheduler": diffusers.CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config)
    }
    opened = diffusers.CogVideoXVideoToVideoPipeline(**components)
    opened.set_progress_bar_config(disable=True)
    opened.transformer.norm_out.norm.eps = 1e-6  # the one norm that is known to differ
    # diffusers draws the video's latents from the posterior, we take the mean; and its noise shall be ours.
    monkeypatch.setattr(video_to_video, "retrieve_latents", lambda output, *_: output.latent_dist.mode())
    shape = (1, (frames - 1) // 4 + 1, case.Z_CHANNELS, case.HEIGHT // 8, case.WIDTH // 8)
    noise = noise_source([SEED])(torch.empty(shape))
    monkeypatch.setattr(video_to_video, "randn_tensor", lambda *_, **__: noise.clone())

    video = torch.rand(1, frames, 3, case.HEIGHT, case.WIDTH, generator=torch.Generator().manual_seed(6))
    strength = 0.6
    theirs = opened(
        video=list(video[0]),
        height=case.HEIGHT,
        width=case.WIDTH,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=2.0,
        max_sequence_length=case.text_length(kind),
        output_type="latent" if kind == "1.5" else "pt",
    ).frames

    system = system_of(kind, tmp_path, case.write_sat(tmp_path / "sat", kind))
    system.schedule = DiffusersTable(opened.scheduler, system.schedule)
    options = {"seeds": [SEED], "negative_prompt": NEGATIVE, "num_frames": frames, "steps": STEPS}

    def sample(strength: float) -> torch.Tensor:
        if kind == "1.5":  # diffusers decodes 2 latents to 8 frames: the latents are compared
            monkeypatch.setattr(system, "decode", lambda latents: iter([latents]))
            return system.sample([PROMPT], video=video * 2 - 1, strength=strength, **options)
        return system.sample([PROMPT], video=video * 2 - 1, strength=strength, **options) / 2 + 0.5

    ours = sample(strength)
    assert theirs.shape == ours.shape and theirs.std() > 0.1
    # As in test_pipeline_folder: three steps of float32 networks, guidance 2 and a decoder on top.
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)
    assert (sample(0.2) - theirs).abs().max() > 1e-2
