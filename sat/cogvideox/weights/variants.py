"""The published CogVideoX family: the geometry that tells its members apart, and the constants that belong to each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variant:
    """One published text- or image-to-video model. The fields up to ``learned_table`` identify it."""

    name: str
    num_layers: int
    hidden_size: int
    patch_size: tuple[int, int, int]
    in_channels: int
    # I2V: 16 noisy channels and 16 of the image.
    learned_table: bool
    # A trained position table beside the rotary one (5B-I2V).
    ofs_embed_dim: int | None
    latent_scale: float
    # Latents are multiplied by it after encoding. The 1.55258426 of a README for 2B is a misprint.
    snr_shift: float
    dtype: str
    # The precision it was trained in.
    hub: str
    # Repository on huggingface.co, in diffusers format.
    config: str
    # The file of this project that fits.
    num_attention_heads: int
    rotary: bool
    # Rotary position; otherwise a fixed sine-cosine table.
    num_frames: int
    height: int
    width: int
    # Native size in pixels; latents are 8 times smaller, and there are (num_frames - 1) / 4 + 1.
    fps: int
    text_length: int
    # In training and in the SAT weights' configuration. diffusers' configs say 226 throughout.
    scheduler: str
    # diffusers' class: the sampler that the authors recommend.
    invert_scale_latents: bool
    # A key of the VAE's config.json, true for all of 1.5. It acts in image-to-video alone: diffusers divides the
    # image's latent by the scale instead of multiplying.

    @property
    def image_to_video(self) -> bool:
        return self.in_channels == 32

    @property
    def pipeline(self) -> str:
        """diffusers' pipeline class."""
        return "CogVideoXImageToVideoPipeline" if self.image_to_video else "CogVideoXPipeline"


_P1, _P2 = (1, 2, 2), (2, 2, 2)
_V1, _V15 = (49, 480, 720, 8, 226), (81, 768, 1360, 16, 224)
_DDIM, _DPM = "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"
# fmt: off
VARIANTS = (
    Variant("CogVideoX-2B", 30, 1920, _P1, 16, False, None, 1.15258426, 3.0, "float16",
            "THUDM/CogVideoX-2b", "configs/cogvideox_2b.yaml", 30, False, *_V1, _DDIM, False),
    Variant("CogVideoX-5B", 42, 3072, _P1, 16, False, None, 0.7, 1.0, "bfloat16",
            "THUDM/CogVideoX-5b", "configs/cogvideox_5b.yaml", 48, True, *_V1, _DPM, False),
    Variant("CogVideoX-5B-I2V", 42, 3072, _P1, 32, True, None, 0.7, 1.0, "bfloat16",
            "THUDM/CogVideoX-5b-I2V", "configs/cogvideox_5b_i2v.yaml", 48, True, *_V1, _DPM, False),
    Variant("CogVideoX1.5-5B", 42, 3072, _P2, 16, False, None, 0.7, 1.0, "bfloat16",
            "THUDM/CogVideoX1.5-5B", "configs/cogvideox1.5_5b.yaml", 48, True, *_V15, _DPM, True),
    Variant("CogVideoX1.5-5B-I2V", 42, 3072, _P2, 32, False, 512, 0.7, 1.0, "bfloat16",
            "THUDM/CogVideoX1.5-5B-I2V", "configs/cogvideox1.5_5b_i2v.yaml", 48, True, *_V15, _DPM, True),
)
# fmt: on
T5_HUB = "google/t5-v1_1-xxl"


def variants_with(**geometry: object) -> list[Variant]:
    """The members that have these values of Variant's fields (``num_layers=42, hidden_size=3072``)."""
    return [v for v in VARIANTS if all(getattr(v, key) == value for key, value in geometry.items())]


def variant_named_in(path: Path | str) -> Variant | None:
    """The variant that a path speaks of (``.../cogvideox-5b-i2v-sat/transformer``), for advice on what to download."""
    text = re.sub(r"[^a-z0-9.]+", "", str(path).lower())
    named = [v for v in VARIANTS if re.sub(r"[^a-z0-9.]+", "", v.name.lower()) in text]
    return max(named, key=lambda v: len(v.name), default=None)


def download_advice(path: Path | str) -> str:
    """One sentence on how to get published weights, or "" where the path does not look like them.

    "CogVideoX-5B-I2V is published as THUDM/CogVideoX-5b-I2V: `hf download THUDM/... --local-dir weights/...`"
    """
    text = str(path).lower()
    variant = variant_named_in(path)
    if variant is not None:
        name, hub = variant.name, variant.hub
    elif "t5" in text and ("xxl" in text or "v1_1" in text):
        name, hub = "The text encoder", T5_HUB
    elif "3d-vae" in text or "cogvideo" in text:
        name, hub = "The family", VARIANTS[1].hub
    else:
        return ""
    place = _download_folder(path, hub)
    return (
        f"{name} is published as {hub}; download it where the path points to: "
        f"`hf download {hub} --local-dir {place}`, and name that folder"
    )


def _download_folder(path: Path | str, hub: str) -> str:
    """The outermost missing folder of the path that carries the model's name, else weights/NAME."""
    if "://" not in str(path):
        keyword = "t5" if hub == T5_HUB else "cogvideo"
        for part in reversed([Path(path), *Path(path).parents]):
            if keyword in part.name.lower() and not part.suffix == ".pt" and not part.exists():
                return str(part)
    return f"weights/{hub.rpartition('/')[2]}"
