"""Pictures of a video that is still being denoised: what the model takes it for after every n steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from cogvideox.sampling.complete import complete_or_absent
from cogvideox.sampling.targets import Target
from cogvideox.sampling.video_io import to_uint8
from cogvideox.system import VideoDiffusion


def step_pictures(
    system: VideoDiffusion, targets: Sequence[Target], every: int
) -> Callable[[dict[str, Any]], None]:
    """A sampler's callback that writes ``NAME.preview.png`` for every item of the batch.

    It shows the predicted clean latent (``denoised``): the first, the middle and the last latent frame, side by side.
    Each is decoded as if it were alone, which costs three frames instead of the whole video, and blurs what moves.
    """

    def callback(state: dict[str, Any]) -> None:
        if (state["step"] + 1) % every:
            return
        for row, target in enumerate(targets):
            latents = state["denoised"][row : row + 1]  # (1, T, C, h, w)
            last = latents.shape[1] - 1
            chosen = dict.fromkeys((0, last // 2, last))
            frames = [chunk[0, -1] for i in chosen for chunk in system.decode(latents[:, i : i + 1])]
            strip = to_uint8(torch.cat(frames, dim=-1)).permute(1, 2, 0).cpu().numpy()  # (H, 3 W, 3)
            with complete_or_absent(target.preview) as partial:
                Image.fromarray(strip).save(partial, format="PNG")

    return callback
