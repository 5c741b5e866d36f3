"""What the trained VAE alone does to true clips: the spread of its latents, and how much of a clip survives it.

Both bound what the transformer can do. The latents' spread gives ``vae.scale_factor``, without which the noise schedule
does not fit; and a shape that the VAE blurs is blurred in every sampled video.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from cogvideox.sampling.video_io import write_video
from scripts.demo.scores import read_clip

if TYPE_CHECKING:
    from scripts.demo.plan import Demo

MEASUREMENT = "latents.json"


@torch.no_grad()
def reconstruct(demo: Demo) -> None:
    """Write each validation and held-out clip as it comes back from the VAE to ``samples/reconstructed/``, and
    ``latents.json``: scale_factor (1 / root mean square of posterior samples) and psnr (dB, the clips' mean).
    """
    from cogvideox.system import build_vae
    from cogvideox.vae.autoencoder import split_moments
    from cogvideox.vae.losses import psnr
    from cogvideox.vae.training import pixels_to_float
    from cogvideox.weights.load import load_vae

    vae = build_vae(demo.config).eval()
    load_vae(vae, demo.run("vae"))
    folder = demo.samples("reconstructed")
    squares, decibels = [], []
    for path in tqdm(demo.true_clips("validation", "held_out"), desc="reconstructing", unit="clip"):
        video = pixels_to_float(read_clip(path)[None])  # (1, F, 3, H, W)
        mean, logvar = split_moments(vae.encode(video))
        reconstruction = vae.decode(mean).clamp(-1, 1)
        squares.append((mean.square() + logvar.exp()).mean())  # of what training draws from the posterior
        decibels.append(psnr(reconstruction, video))
        write_video(folder / path.name, reconstruction[0], demo.config.data.fps)
    measured = {
        "scale_factor": 1 / float(torch.stack(squares).mean().sqrt()),
        "psnr": float(torch.stack(decibels).mean()),
    }
    (folder / MEASUREMENT).write_text(json.dumps(measured, indent=1))


def read_measurement(demo: Demo) -> dict[str, float]:
    """What ``reconstruct`` measured."""
    return json.loads((demo.samples("reconstructed") / MEASUREMENT).read_text())
