"""The 3D causal VAE of CogVideoX: video (B, F, C, H, W) <-> latents (B, T, z, H/s, W/s), F = r (T - 1) + 1.

Yang et al. 2024 (arXiv:2408.06072), section 2.1. Parameter names are those of the published `3d-vae.pt`.

Group norm sees only the chunk that it is given, so where a clip is cut is part of the model: a different cut gives
different numbers. The defaults are the published ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cogvideox.vae.causal_conv import ConvCache
from cogvideox.vae.decoder import Decoder
from cogvideox.vae.encoder import Encoder
from cogvideox.vae.tiling import Tiling, difference

LOGVAR_RANGE = (-30.0, 20.0)


class CausalVAE(nn.Module):
    """3D causal variational autoencoder.

    channels, channel_multipliers: level i is `channels * channel_multipliers[i]` wide, finest level first; n levels
        compress space by 2^(n-1).
    num_res_blocks: residual blocks per encoder level; the decoder has one more.
    temporal_compression: r, a power of two up to 2^(n-1); 1 keeps every frame.
    norm_groups: groups of every group norm; divides all widths.
    encode_frames_per_pass: None encodes a clip in one pass (SAT). 8 is diffusers' way: batches of 8 frames with what
        remains added to the first (9 for 4k+1 frames). The same numbers up to 13 frames, others from 17 on.
    decode_latents_per_pass: latents in each chunk of a decode; the first chunk has one more. 2 is the published way.
        (SAT's script for 161 frames of CogVideoX1.5 uses 4.)
    tile_latent_height, tile_latent_width: encode and decode in overlapping tiles of this size in latents, as diffusers
        does; None is the whole height or width. Saves memory; other numbers (see `tiling` and `tiling_difference`).
    slice_batch: the clips of a batch one after the other: the memory of one clip, the same numbers.
    checkpoint_activations: recompute each residual block in the backward pass of a one-pass encode or decode.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: int,
        channel_multipliers: list[int],
        num_res_blocks: int,
        z_channels: int,
        temporal_compression: int = 4,
        norm_groups: int = 32,
        encode_frames_per_pass: int | None = None,
        decode_latents_per_pass: int = 2,
        tile_latent_height: int | None = None,
        tile_latent_width: int | None = None,
        slice_batch: bool = False,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        widths = [channels * multiplier for multiplier in channel_multipliers]
        _check_geometry(widths, num_res_blocks, temporal_compression, norm_groups, decode_latents_per_pass)
        self.in_channels = in_channels
        self.z_channels = z_channels
        self.spatial_compression = 2 ** (len(widths) - 1)
        self.temporal_compression = temporal_compression
        self.encode_frames_per_pass = encode_frames_per_pass
        self.decode_latents_per_pass = decode_latents_per_pass
        self.tiling = Tiling(tile_latent_height, tile_latent_width)
        self.slice_batch = slice_batch
        self._check_frames_per_pass(encode_frames_per_pass)
        shared = dict(
            widths=widths,
            num_res_blocks=num_res_blocks,
            z_channels=z_channels,
            num_time_levels=temporal_compression.bit_length() - 1,
            norm_groups=norm_groups,
            checkpoint_activations=checkpoint_activations,
        )
        self.encoder = Encoder(in_channels=in_channels, **shared)
        self.decoder = Decoder(out_channels=in_channels, **shared)
        self.register_load_state_dict_pre_hook(_drop_training_loss)

    def num_latents(self, num_frames: int) -> int:
        """T for F pixel frames. ValueError unless F = r k + 1."""
        r = self.temporal_compression
        if num_frames < 1 or (num_frames - 1) % r != 0:
            below = max(num_frames - 1, 0) // r * r + 1
            nearest = f"{below} or {below + r}" if num_frames > 0 else "1"
            raise ValueError(
                f"{num_frames} frames: the VAE needs {r}k+1; the nearest is {nearest} (data.num_frames)"
            )
        return (num_frames - 1) // r + 1

    def num_frames(self, num_latents: int) -> int:
        """F for T latents."""
        return (num_latents - 1) * self.temporal_compression + 1

    def encode(self, video: Tensor, frames_per_pass: int | None = None) -> Tensor:
        """Posterior moments of a video: (B, F, C, H, W) in [-1, 1] -> (B, T, 2 * z, H/s, W/s), mean | log variance.

        frames_per_pass: as `encode_frames_per_pass`, which is the default; a number of at least F is one pass.
        Neither clamped nor scaled: see `sample_posterior` and the model's scale factor.
        """
        self._check_video(video)
        if frames_per_pass is None:
            frames_per_pass = self.encode_frames_per_pass
        if frames_per_pass is None:
            frames_per_pass = video.shape[1]
        elif frames_per_pass < video.shape[1]:
            self._check_frames_per_pass(frames_per_pass)
        clips = video.split(1) if self.slice_batch else [video]
        return torch.cat([self._encode_clips(clip, frames_per_pass) for clip in clips])

    def decode(self, latents: Tensor, chunked: bool = True) -> Tensor:
        """Video of unscaled latents: (B, T, z, H, W) -> (B, F, C, s * H, s * W), about [-1, 1], not clamped.

        chunked: as published, latents [0:3], [3:5], [5:7], ... (see `decode_stream`); False decodes whole clips in one
            pass, neither tiled nor sliced (training; more memory).
        """
        if chunked:
            return torch.cat(list(self.decode_stream(latents)), dim=1)
        self._check_latents(latents)
        return self._decode_chunk(latents, None)

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """The chunks of `decode(latents)` one after the other, each (B, f, C, s * H, s * W): the memory of one chunk.
        Tiles, and the clips of a sliced batch but the last, are decoded completely before the first chunk comes.

        The cuts do not depend on T, so that a clip's first frames are the same whatever follows. An even T ends with a
        chunk of one latent (SAT drops that latent; diffusers returns 4T frames).
        """
        self._check_latents(latents)
        return self._decode_slices(latents) if self.slice_batch else self._decode_clips(latents)

    def tiling_difference(self, latents: Tensor) -> dict[str, float]:
        """Decode with and without tiles: {max, rms, psnr_db} of the difference. latents: (B, T, z, H, W), unscaled."""
        self._check_latents(latents)
        return difference(self._decode_chunks(latents), self._decode_clips(latents))

    def _encode_clips(self, video: Tensor, frames_per_pass: int) -> Tensor:
        s = self.spatial_compression
        if not self.tiling.cuts(video.shape[-2] // s, video.shape[-1] // s):
            return self._encode_passes(video, frames_per_pass)
        (moments,) = self.tiling.run(
            lambda tile: [self._encode_passes(tile, frames_per_pass)], video, cell_in=s, cell_out=1
        )
        return moments

    def _encode_passes(self, video: Tensor, frames_per_pass: int) -> Tensor:
        num_frames = video.shape[1]
        if frames_per_pass >= num_frames:
            return self._encode_chunk(video, None)
        cache: ConvCache = {}
        first = frames_per_pass + num_frames % frames_per_pass
        lengths = [first] + [frames_per_pass] * ((num_frames - first) // frames_per_pass)
        return torch.cat([self._encode_chunk(chunk, cache) for chunk in video.split(lengths, dim=1)], dim=1)

    def _decode_slices(self, latents: Tensor) -> Iterator[Tensor]:
        *earlier, last = latents.split(1)
        videos = [list(self._decode_clips(clip)) for clip in earlier]
        for chunks in zip(*videos, self._decode_clips(last), strict=True):
            yield torch.cat(chunks)

    def _decode_clips(self, latents: Tensor) -> Iterator[Tensor]:
        if not self.tiling.cuts(*latents.shape[-2:]):
            return self._decode_chunks(latents)
        return self.tiling.run(self._decode_chunks, latents, cell_in=1, cell_out=self.spatial_compression)

    def _decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        cache: ConvCache = {}
        start, num_latents = 0, latents.shape[1]
        while start < num_latents:
            end = start + self.decode_latents_per_pass + (start == 0)
            yield self._decode_chunk(latents[:, start:end], cache)
            start = end

    def _encode_chunk(self, video: Tensor, cache: ConvCache | None) -> Tensor:
        return self.encoder(video.transpose(1, 2), cache).transpose(1, 2).contiguous()

    def _decode_chunk(self, latents: Tensor, cache: ConvCache | None) -> Tensor:
        return self.decoder(latents.transpose(1, 2), cache).transpose(1, 2).contiguous()

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[2] != self.in_channels or not video.is_floating_point():
            raise ValueError(
                f"video of shape {tuple(video.shape)} and type {video.dtype}: expected floats in [-1, 1] of shape "
                f"(B, F, {self.in_channels}, H, W)"
            )
        self.num_latents(video.shape[1])
        s, (height, width) = self.spatial_compression, video.shape[3:]
        if height % s or width % s or not height or not width:
            nearest = " x ".join(str(max(round(size / s), 1) * s) for size in (height, width))
            raise ValueError(
                f"frames of {height} x {width}: the VAE needs multiples of {s}; the nearest is {nearest}"
            )

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[2] != self.z_channels or latents.shape[1] < 1:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: expected (B, T >= 1, {self.z_channels}, H, W)"
            )

    def _check_frames_per_pass(self, frames_per_pass: int | None) -> None:
        r = self.temporal_compression
        if frames_per_pass is not None and (frames_per_pass < 1 or frames_per_pass % r):
            raise ValueError(
                f"vae.encode_frames_per_pass={frames_per_pass}: expected a multiple of {r}, or null"
            )


def sample_posterior(
    moments: Tensor, *, generator: torch.Generator | None = None, noise: Tensor | None = None
) -> Tensor:
    """Draw z = mean + std * noise: moments (B, T, 2 * z, H, W) -> (B, T, z, H, W).

    Give `noise`, shaped like the mean, or a `generator` to draw it from (on the generator's device).
    """
    mean, logvar = split_moments(moments)
    if noise is None:
        assert generator is not None, "sample_posterior needs noise or a generator"
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
    return mean + torch.exp(0.5 * logvar) * noise.to(mean)


def posterior_mode(moments: Tensor) -> Tensor:
    """The mean: (B, T, 2 * z, H, W) -> (B, T, z, H, W)."""
    return split_moments(moments)[0]


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and clamped log variance, each (B, T, z, H, W)."""
    mean, logvar = moments.chunk(2, dim=2)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def _check_geometry(
    widths: list[int],
    num_res_blocks: int,
    temporal_compression: int,
    norm_groups: int,
    decode_latents_per_pass: int,
) -> None:
    if len(widths) < 2:
        raise ValueError(f"vae.channel_multipliers has {len(widths)} entry: the VAE needs at least 2 levels")
    if num_res_blocks < 1:
        raise ValueError(f"vae.num_res_blocks={num_res_blocks}: expected at least 1")
    if decode_latents_per_pass < 1:
        raise ValueError(f"vae.decode_latents_per_pass={decode_latents_per_pass}: expected at least 1")
    legal = [2**i for i in range(len(widths))]
    if temporal_compression not in legal:
        raise ValueError(
            f"vae.temporal_compression={temporal_compression}: {len(widths)} levels (vae.channel_multipliers) allow "
            f"{', '.join(map(str, legal))}"
        )
    for width in widths:
        if norm_groups < 1 or width % norm_groups:
            raise ValueError(
                f"vae: norm_groups={norm_groups} does not divide the width {width} (channels x channel_multipliers)"
            )


def _drop_training_loss(module: nn.Module, state_dict: dict, prefix: str, *_args: object) -> None:
    """Published files may carry `loss.*` (LPIPS and discriminator of the original training): not part of the VAE."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}loss.")]:
        del state_dict[key]
