"""A whole CogVideoX at random, tiny: transformer, VAE and T5 of each published kind, as SAT and diffusers store them.

What no tensor tells is as published, so that a converter's constants are right here too: 226 text tokens (1.5: 224),
32 norm groups, 8 x 8 pixels and 4 frames per latent. A learned table (5B-I2V) has its rows for the text, then for
FRAMES, HEIGHT and WIDTH below; only its number of rows is in the file.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from stand_ins import sat_folder
from torch import Tensor, nn
from transformer_cases import KINDS, diffusers_twin, randomise, tiny

from cogvideox.model.position import SincosPosition3D, rotary_3d
from cogvideox.model.transformer import PREFIX, ExpertTransformer
from cogvideox.vae.autoencoder import CausalVAE
from scripts.benchmark.twins import vae_twin

FRAMES, HEIGHT, WIDTH = 9, 32, 48
"""Pixel frames and pixels: 3 x 4 x 6 latents, 3 x 2 x 3 patches (1.5: 4 latents, 2 x 2 x 3 patches)."""
Z_CHANNELS, TEXT_WIDTH = 4, 16
VAE_SIZES = {
    "channels": 32,
    "channel_multipliers": [1, 1, 1, 2],
    "num_res_blocks": 1,
    "z_channels": Z_CHANNELS,
}
T5_SIZES = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 160,
            "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}  # fmt: skip
PROMPTS = ("a red circle moving right", "a blue square moving left", "green triangle up and down")
LATENT_SCALE = {kind: 1.15258426 if kind == "2b" else 0.7 for kind in KINDS}
SNR_SHIFT = {kind: 3.0 if kind == "2b" else 1.0 for kind in KINDS}


def text_length(kind: str) -> int:
    return 224 if kind.startswith("1.5") else 226


def network(kind: str, seed: int = 0, **changes: Any) -> ExpertTransformer:
    """Our transformer with random weights."""
    sizes = {"text_length": text_length(kind), "text_hidden_size": TEXT_WIDTH, "out_channels": Z_CHANNELS,
             "num_frames": FRAMES, "latent_height": HEIGHT // 8, "latent_width": WIDTH // 8}  # fmt: skip
    return randomise(tiny(kind, **(sizes | changes)), seed).eval().requires_grad_(False)


def autoencoder(seed: int = 1, **changes: Any) -> CausalVAE:
    """Our VAE with random weights."""
    return randomise(CausalVAE(**(VAE_SIZES | changes)), seed).eval().requires_grad_(False)


def text_encoder(seed: int = 2) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5EncoderModel(T5Config(**T5_SIZES)).eval().requires_grad_(False)


def published_state(net: ExpertTransformer) -> dict[str, Tensor]:
    """The state dict as SAT's published files hold it: prefixed, with 2B's fixed table, with rope's dead values."""
    state, position = dict(net.state_dict()), net.mixins["pos_embed"]
    if isinstance(position, SincosPosition3D):
        state["mixins.pos_embed.pos_embedding"] = position.table(net.geometry["grid"], net.text_length)
    else:
        state["transformer.position_embeddings.weight"] = torch.ones(64, net.hidden_size)
        cos, sin = rotary_3d(net.geometry["grid"], net.geometry["head_dim"], 10_000.0, 0)
        # SAT stores each angle twice, side by side.
        state["mixins.pos_embed.freqs_cos"] = cos.repeat_interleave(2, dim=1)
        state["mixins.pos_embed.freqs_sin"] = sin.repeat_interleave(2, dim=1)
    dtype = next(net.parameters()).dtype
    return {PREFIX + name: value.to(dtype) for name, value in state.items()}


def write_sat_transformer(folder: Path, net: ExpertTransformer) -> Path:
    """FOLDER/latest and FOLDER/1/mp_rank_00_model_states.pt."""
    return sat_folder(folder, published_state(net), tag="1")


def write_sat_vae(folder: Path, vae: CausalVAE) -> Path:
    """FOLDER/3d-vae.pt with the discriminator and LPIPS that published files may carry."""
    folder.mkdir(parents=True)
    losses = {
        "loss.logvar": torch.zeros(()),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1, 64, 1, 1),
    }
    torch.save({"state_dict": {**vae.state_dict(), **losses}}, folder / "3d-vae.pt")
    return folder / "3d-vae.pt"


def write_t5(folder: Path) -> Path:
    """FOLDER/config.json, model.safetensors and a sentencepiece model, as in SAT's t5-v1_1-xxl."""
    text_encoder().save_pretrained(folder)
    (folder / "spiece.model").write_bytes(_sentencepiece_model())
    return folder


def write_sat(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """The published SAT layout: FOLDER/transformer, FOLDER/vae/3d-vae.pt, FOLDER/t5-v1_1-xxl; dtype of the first."""
    write_sat_transformer(folder / "transformer", network(kind).to(dtype))
    write_sat_vae(folder / "vae", autoencoder())
    write_t5(folder / "t5-v1_1-xxl")
    return folder


def write_config(file: Path, kind: str, **load: Path) -> Path:
    """Our configuration of the model as a YAML file; load: what ``load:`` names. Sampling: DDIM, guidance 2."""
    net = tiny(kind)
    rotary = kind != "2b"
    position = {"target": f"cogvideox.model.position.{'RotaryPosition3D' if rotary else 'SincosPosition3D'}"}
    if kind == "5b_i2v":
        position["params"] = {"learned_table": True}
    if kind == "2b":
        position["params"] = {"height_interpolation": 1.875, "width_interpolation": 1.875}
    keys = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "in_channels",
        "out_channels",
        "time_embed_dim",
    )
    conditions = [{"target": "cogvideox.conditioning.text.TextCondition",
                   "params": {"max_length": text_length(kind)}}]  # fmt: skip
    if "i2v" in kind:
        conditions.append({"target": "cogvideox.conditioning.frames.FirstFrameCondition"})
    size = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 8}
    tree = {
        "model": {
            "transformer": {
                **{key: net.geometry[key] for key in keys},
                "ofs_embed_dim": net.ofs_embed_dim,
                "patch_size": list(net.patch_size),
                "text_length": text_length(kind),
                "text_hidden_size": TEXT_WIDTH,
                "num_frames": FRAMES,
                "latent_height": HEIGHT // 8,
                "latent_width": WIDTH // 8,
                "position": position,
            },
            "conditions": conditions,
            "schedule": {
                "target": "cogvideox.diffusion.schedule.ZeroSNRSchedule",
                "params": {"snr_shift": SNR_SHIFT[kind]},
            },
        },
        "vae": {**VAE_SIZES, "scale_factor": LATENT_SCALE[kind], "precision": "fp32"},
        "load": {name: str(path) for name, path in load.items()},
        "sampler": {"target": "cogvideox.diffusion.samplers.ddim"},
        "guidance": {"target": "cogvideox.diffusion.guidance.ConstantGuidance", "params": {"scale": 2.0}},
        "sample": {**size, "steps": 2, "precision": "fp32"},
    }
    tree["model"]["ofs"] = 2.0
    file.write_text(json.dumps(tree))  # YAML is a superset of JSON
    return file


def write_diffusers(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """The same model, saved by diffusers' own pipeline class with the settings of the published repositories."""
    diffusers_pipeline(folder.parent / f"{folder.name}-t5", kind, dtype).save_pretrained(folder)
    return folder


def diffusers_pipeline(t5_folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' pipeline of a kind, with the weights of ``network(kind)``, ``autoencoder()``, ``text_encoder()``.

    t5_folder: where the tokenizer is written, which transformers makes from a file only.
    """
    import diffusers
    from transformers import T5Tokenizer

    write_t5(t5_folder)
    image = "i2v" in kind
    pipeline = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    scheduler = diffusers.CogVideoXDDIMScheduler if kind == "2b" else diffusers.CogVideoXDPMScheduler
    return pipeline(
        tokenizer=T5Tokenizer.from_pretrained(t5_folder),
        text_encoder=text_encoder(),
        vae=vae_twin(
            autoencoder(), scaling_factor=LATENT_SCALE[kind], invert_scale_latents=kind.startswith("1.5")
        ),
        transformer=diffusers_twin(network(kind)).eval().requires_grad_(False).to(dtype),
        scheduler=scheduler(
            snr_shift_scale=SNR_SHIFT[kind],
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )


@cache
def _sentencepiece_model() -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 20), model_writer=model, vocab_size=32, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()
