"""The same network in diffusers, with the same weights: what every comparison is made with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.model.position import RotaryPosition3D
from cogvideox.model.transformer import ExpertTransformer
from cogvideox.vae.autoencoder import CausalVAE
from cogvideox.weights import transformer_keys, vae_keys


@torch.no_grad()
def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere, so that no zero-initialised part hides an error; activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.ndim == 1:
            parameter.copy_(noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return net


def transformer_twin(net: ExpertTransformer) -> nn.Module:
    """``CogVideoXTransformer3DModel`` with the weights of ``net``, loaded strictly through our key table."""
    from diffusers import CogVideoXTransformer3DModel

    g, position = net.geometry, net.mixins["pos_embed"]
    rotary = isinstance(position, RotaryPosition3D)
    new = g["patch_size"][0] > 1
    with torch.device(next(net.parameters()).device):
        twin = CogVideoXTransformer3DModel(
            num_attention_heads=g["num_attention_heads"],
            attention_head_dim=g["head_dim"],
            in_channels=g["in_channels"],
            out_channels=g["out_channels"],
            time_embed_dim=g["time_embed_dim"],
            ofs_embed_dim=net.ofs_embed_dim,
            text_embed_dim=g["text_hidden_size"],
            num_layers=g["num_layers"],
            sample_width=g["latent_width"],
            sample_height=g["latent_height"],
            sample_frames=g["num_frames"],
            patch_size=g["patch_size"][1],
            patch_size_t=g["patch_size"][0] if new else None,
            patch_bias=not new,
            max_text_seq_length=g["text_length"],
            use_rotary_positional_embeddings=rotary,
            use_learned_positional_embeddings=rotary and position.pos_embedding is not None,
        )
    twin.to(next(net.parameters()).dtype)
    weights = transformer_keys.sat_to_diffusers(net.state_dict())
    twin.load_state_dict(weights, strict=True, assign=next(net.parameters()).is_meta)
    twin.norm_out.norm.eps = 1e-6  # diffusers has 1e-5 here, the published SAT code 1e-6
    return twin


def rotary_of(net: ExpertTransformer, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the twin wants beside its inputs, as diffusers' pipeline makes it once per run: rope on the integer grid,
    which is SAT's rule for every size. x: (B, T, C, H, W) latents. None for a network without rope."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    if not isinstance(net.mixins["pos_embed"], RotaryPosition3D):
        return None
    pt, ph, pw = net.patch_size
    size = (x.shape[3] // ph, x.shape[4] // pw)
    return get_3d_rotary_pos_embed(
        net.geometry["head_dim"],
        None,
        size,
        x.shape[1] // pt,
        grid_type="slice",
        max_size=size,
        device=x.device,
    )


def run_twin(net: ExpertTransformer, twin: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The twin's output for keyword arguments of ``net``."""
    x = arguments["x"]
    rope = rotary_of(net, x)
    if "concat_images" in arguments:
        x = torch.cat((x, arguments["concat_images"]), dim=2)
    return twin(
        x, arguments["context"], arguments["timesteps"], ofs=arguments.get("ofs"), image_rotary_emb=rope
    ).sample


def vae_twin(vae: CausalVAE, **config: Any) -> nn.Module:
    """diffusers' AutoencoderKLCogVideoX with the weights of ``vae``, in evaluation mode."""
    from diffusers import AutoencoderKLCogVideoX

    widths = tuple(level.block[0].conv1.conv.out_channels for level in vae.encoder.down)
    weights = vae.state_dict()
    with torch.device(next(vae.parameters()).device):
        twin = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * len(widths),
            up_block_types=("CogVideoXUpBlock3D",) * len(widths),
            block_out_channels=widths,
            latent_channels=vae.z_channels,
            layers_per_block=len(vae.encoder.down[0].block),
            norm_num_groups=vae.encoder.down[0].block[0].norm1.num_groups,
            temporal_compression_ratio=vae.temporal_compression,
            **config,
        )
    twin.to(next(vae.parameters()).dtype)
    twin.load_state_dict(vae_keys.sat_to_diffusers(weights), assign=next(vae.parameters()).is_meta)
    return twin.eval()
