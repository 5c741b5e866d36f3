"""The expert transformer of CogVideoX (Yang et al. 2024) as a SAT model with four swappable mixins.

A SAT model is a trunk of plain transformer layers (trunk.py) plus mixins that take over its hooks:

    pos_embed    position.py     position_embedding_forward, attention_fn    sincos, rope, learned tables
    patch_embed  patch_embed.py  word_embedding_forward                      latents and text to tokens
    adaln_layer  adaln.py        layer_forward, attention_fn                 timestep modulation, query/key norm
    final_layer  final_layer.py  final_forward                               tokens to latents

B batch, T latent frames, C channels, H W latent size, N video tokens, L text tokens, D width, E time width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sat.model.base_model import BaseMixin, BaseModel
from torch import Tensor

from cogvideox.execution import AUTO, check_attention
from cogvideox.model.attention import attention_fn
from cogvideox.model.compiled_blocks import layer_runner
from cogvideox.model.modulation import Modulations, precompute_modulations
from cogvideox.model.text_projection import ProjectedTexts
from cogvideox.model.timestep import embedding_mlp, sinusoid
from cogvideox.model.trunk import Trunk

PREFIX = "model.diffusion_model."
"""Where the published checkpoints keep the network."""

UNUSED_KEYS = ("transformer.position_embeddings.weight", "transformer.word_embeddings.weight")
"""Parameters that SAT's own trunk creates and CogVideoX never uses; a file may hold them."""


class ExpertTransformer(BaseModel):
    """Predicts the velocity of noisy latents, given their timestep and text.

    ``position``, ``patch_embed``, ``adaln``, ``final_layer``: mixins, or callables that make one from those of these
    arguments which their signature names (``grid`` and ``head_dim`` too, see ``geometry``).
    ``num_frames`` counts pixel frames, ``latent_height`` and ``latent_width`` latents: the configured size, which
    limits only learned position tables. ``ofs_embed_dim``: the network has an ``ofs`` input (1.5-I2V) of that width.
    ``checkpoint_activations``: see recompute.py; false or none, products, selective, true or full, or a whole number.
    ``attention``: the kernel, see execution.py; ``attention_backend`` may be set later, as a probe does.
    ``compile``: none or blocks, see execution.py.
    ``device="meta"`` allocates nothing; ``skip_init`` leaves the trunk's weights unset, for a checkpoint to fill.
    """

    attention_fn = staticmethod(attention_fn)  # the innermost of SAT's attention hooks

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        num_attention_heads: int,
        in_channels: int,
        out_channels: int,
        time_embed_dim: int,
        patch_size: tuple[int, int, int],
        text_length: int,
        text_hidden_size: int,
        num_frames: int,
        latent_height: int,
        latent_width: int,
        position: BaseMixin | Callable[..., BaseMixin],
        patch_embed: BaseMixin | Callable[..., BaseMixin],
        adaln: BaseMixin | Callable[..., BaseMixin],
        final_layer: BaseMixin | Callable[..., BaseMixin],
        ofs_embed_dim: int | None = None,
        temporal_compression: int = 4,
        checkpoint_activations: Any = False,
        attention: str = AUTO,
        compile: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        skip_init: bool = False,
    ):
        _check_geometry(hidden_size, num_attention_heads, time_embed_dim, ofs_embed_dim, patch_size)
        patch_size = tuple(patch_size)
        latent_frames = (num_frames - 1) // temporal_compression + 1
        device = torch.get_default_device() if device is None else torch.device(device)
        with torch.device("meta"):
            trunk = Trunk(num_layers, hidden_size, num_attention_heads, checkpoint_activations).to(dtype)
        if device.type != "meta":
            trunk.to_empty(device=device)
            if not skip_init:
                trunk.init_weights()

        super().__init__(args=None, transformer=trunk)
        check_attention(attention)
        self.attention_backend = attention
        trunk.run_layer = layer_runner(compile)
        self.in_channels, self.out_channels, self.patch_size = in_channels, out_channels, patch_size
        self.hidden_size, self.text_length, self.ofs_embed_dim = hidden_size, text_length, ofs_embed_dim
        self._modulations: Modulations | None = None
        self._texts: ProjectedTexts | None = None
        self.geometry = {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "num_attention_heads": num_attention_heads,
            "head_dim": hidden_size // num_attention_heads,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "time_embed_dim": time_embed_dim,
            "patch_size": patch_size,
            "text_length": text_length,
            "text_hidden_size": text_hidden_size,
            "num_frames": num_frames,
            "latent_height": latent_height,
            "latent_width": latent_width,
            # A clip of 21 latents is padded to 22 for a temporal patch of 2, so time rounds up.
            "grid": (
                -(-latent_frames // patch_size[0]),
                *_spatial_grid(latent_height, latent_width, patch_size),
            ),
        }
        with device:
            self.time_embed = embedding_mlp(hidden_size, time_embed_dim)
            if ofs_embed_dim is not None:
                self.ofs_embed = embedding_mlp(ofs_embed_dim, ofs_embed_dim)
            # Order is meaning: a `non_conflict` hook wraps those before it, so q and k are normed, then rotated.
            self.add_mixin("pos_embed", _make_mixin("position", position, self.geometry))
            self.add_mixin("patch_embed", _make_mixin("patch_embed", patch_embed, self.geometry))
            self.add_mixin("adaln_layer", _make_mixin("adaln", adaln, self.geometry))
            self.add_mixin("final_layer", _make_mixin("final_layer", final_layer, self.geometry))
        for key, hook in (("patch_embed", "word_embedding_forward"), ("final_layer", "final_forward")):
            if hook not in self.hooks:
                raise ValueError(
                    f"model.transformer.{key}: the mixin has no method {hook}, and the trunk has none"
                )
        self.to(dtype)
        self.register_load_state_dict_pre_hook(_accept_published_keys)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        concat_images: Tensor | None = None,
        ofs: Tensor | float | None = None,
    ) -> Tensor:
        """Velocity of the latents ``x``.

        x: (B, T, C, H, W), any size that the patch divides;  timesteps: (B,) in [0, 1000), integers or fractions, on
        the device of x, or on the CPU, where reading them waits for nothing (``use_modulations`` does);
        context: (B, text_length, text_hidden_size);  concat_images: (B, T, C', H, W), C + C' = in_channels;
        ofs: a number or (B,), for networks with that input (published: 2.0).
        Returns (B, T, out_channels, H, W) in the dtype of x; inside, the network computes in its weights' dtype.
        """
        self._check_inputs(x, timesteps, context, concat_images, ofs)
        video = x if concat_images is None else torch.cat((x, concat_images.to(x.dtype)), dim=2)
        dtype = self.time_embed[0].weight.dtype
        frames, height, width = self.patch_size
        grid = (video.shape[1] // frames, video.shape[3] // height, video.shape[4] // width)
        emb = self.embed_time(timesteps, ofs)
        known = {} if self._modulations is None else self._modulations.at(timesteps, ofs, emb.device)
        modulations = known.pop("modulations", None)
        if self._texts is not None:
            known["text"] = self._texts.of(context)
        velocity = super().forward(
            video.to(dtype),
            position_ids=None,
            attention_mask=None,
            context=context.to(dtype),
            emb=emb,
            grid=grid,
            text_length=context.shape[1],
            backend=self.attention_backend,
            of_layer=partial(self._of_layer, modulations=modulations),
            **known,
        )
        return velocity.to(x.dtype)

    def precompute_modulations(
        self, timesteps: Tensor | Sequence[float], ofs: Tensor | float | None = None
    ) -> Modulations:
        """The adaLN modulations of all ``timesteps`` (n,) of a sampling run, for ``use_modulations``."""
        return precompute_modulations(self, timesteps, ofs)

    @contextmanager
    def use_modulations(self, modulations: Modulations | None) -> Iterator[None]:
        """Inside, the network looks its modulations up and does not touch the adaLN weights. None: as outside.

        A timestep that ``modulations`` does not hold is a ValueError.
        """
        before, self._modulations = self._modulations, modulations
        try:
            yield
        finally:
            self._modulations = before

    @contextmanager
    def project_texts_once(self) -> Iterator[None]:
        """Inside, a ``context`` that is given again, the same tensor, is not projected again (text_projection.py).

        For runs without gradients, in which neither the tensors nor the weights change.
        """
        before, self._texts = self._texts, ProjectedTexts.of_network(self)
        try:
            yield
        finally:
            self._texts = before

    def chunk_mlp(self, rows: int | None) -> None:
        """Let every MLP take ``rows`` tokens (of all items together) at a time where no gradient is kept; None: all."""
        if rows is not None and rows < 1:
            raise ValueError(f"MLP chunks of {rows} tokens: expected at least 1, or None for all at once")
        for layer in self.transformer.layers:
            layer.mlp.chunk_rows = rows

    def _of_layer(self, index: int, **known: Any) -> dict[str, Any]:
        """What the mixins hand to the hooks of one layer."""
        parts = (m.of_layer(index, **known) for m in self.mixins.values() if hasattr(m, "of_layer"))
        return {key: value for part in parts for key, value in part.items()}

    def embed_time(self, timesteps: Tensor, ofs: Tensor | float | None = None) -> Tensor:
        """(B, E): the MLP of the timestep's sinusoid, plus that of ``ofs``. Sinusoids are float32, then cast."""
        weight = self.time_embed[0].weight
        timesteps = _sent(timesteps.reshape(-1), weight.device)
        emb = self.time_embed(sinusoid(timesteps, self.hidden_size).to(weight.dtype))
        if ofs is not None:
            # A number reaches a GPU as the argument of a kernel; as a tensor it would be a copy that may wait.
            is_number = isinstance(ofs, int | float)
            ofs = torch.full((1,), float(ofs), device=weight.device) if is_number else ofs.float().reshape(-1)
            emb = emb + self.ofs_embed(
                sinusoid(_sent(ofs, weight.device), self.ofs_embed_dim).to(weight.dtype)
            )
        return emb

    def _check_inputs(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        images: Tensor | None,
        ofs: Tensor | float | None,
    ) -> None:
        if x.ndim != 5:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, T, C, H, W)")
        batch, frames, channels, height, width = x.shape
        expected = (batch, frames, self.in_channels - channels, height, width)
        if images is None and channels != self.in_channels:
            hint = "; an image-to-video network needs concat_images" if channels < self.in_channels else ""
            raise ValueError(
                f"x has {channels} channels, expected model.transformer.in_channels={self.in_channels}{hint}"
            )
        if images is not None and tuple(images.shape) != expected:
            raise ValueError(
                f"concat_images has shape {tuple(images.shape)}, expected {expected}: the frames and size of x, and "
                f"together with x model.transformer.in_channels={self.in_channels} channels"
            )
        if frames % self.patch_size[0]:
            raise ValueError(
                f"{frames} latent frames: model.transformer.patch_size={list(self.patch_size)} needs a multiple of "
                f"{self.patch_size[0]} (CogVideoX1.5 puts one latent in front)"
            )
        _spatial_grid(height, width, self.patch_size)
        if context.shape[:2] != (batch, self.text_length):
            raise ValueError(
                f"context has shape {tuple(context.shape)}, expected batch {batch} and "
                f"model.transformer.text_length={self.text_length} tokens"
            )
        if timesteps.numel() not in (1, batch):
            raise ValueError(f"{timesteps.numel()} timesteps for a batch of {batch}")
        if (ofs is None) != (self.ofs_embed_dim is None):
            raise ValueError(
                f"ofs={ofs} for a network with model.transformer.ofs_embed_dim={self.ofs_embed_dim}: "
                + ("it needs ofs (2.0 at inference)" if ofs is None else "it has no ofs input")
            )


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``. From pinned memory, as any other copy to a GPU may wait for what is queued there."""
    is_sent_to_gpu = device.type == "cuda" and values.device.type == "cpu"
    return (values.pin_memory() if is_sent_to_gpu else values).to(device, non_blocking=True)


def _check_geometry(
    hidden_size: int, num_attention_heads: int, time_embed_dim: int, ofs_embed_dim: int | None, patch_size
) -> None:
    if hidden_size % num_attention_heads:
        raise ValueError(
            f"model.transformer.num_attention_heads={num_attention_heads} does not divide "
            f"model.transformer.hidden_size={hidden_size}"
        )
    if hidden_size % 2:
        raise ValueError(
            f"model.transformer.hidden_size={hidden_size} must be even: sines and cosines of the timestep"
        )
    if ofs_embed_dim not in (None, time_embed_dim) or (ofs_embed_dim or 0) % 2:
        raise ValueError(
            f"model.transformer.ofs_embed_dim={ofs_embed_dim} must be even and equal "
            f"model.transformer.time_embed_dim={time_embed_dim}: the two embeddings are added"
        )
    if len(patch_size) != 3:
        raise ValueError(f"model.transformer.patch_size={patch_size}: expected three numbers, [t, h, w]")


def _spatial_grid(height: int, width: int, patch_size: tuple[int, int, int]) -> tuple[int, int]:
    _, p, q = patch_size
    if height % p or width % q:
        raise ValueError(
            f"a latent of {height}x{width} (height x width) is not divided by model.transformer.patch_size="
            f"{list(patch_size)}: nearest below is {height // p * p}x{width // q * q}"
        )
    return height // p, width // q


def _make_mixin(
    key: str, factory: BaseMixin | Callable[..., BaseMixin], geometry: dict[str, Any]
) -> BaseMixin:
    """Call ``factory`` with the part of ``geometry`` that its signature names and its own parameters do not set."""
    if isinstance(factory, BaseMixin):
        return factory
    fixed = getattr(factory, "keywords", {})  # of a functools.partial: the parameters of the YAML file
    signature = inspect.signature(factory)
    arguments = {
        name: geometry[name] for name in signature.parameters if name in geometry and name not in fixed
    }
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"model.transformer.{key}: {factory} cannot be built, {error}; "
            f"give it in params, or name one of {', '.join(geometry)}"
        ) from error
    mixin = factory(**arguments)
    if not isinstance(mixin, BaseMixin):
        raise ValueError(
            f"model.transformer.{key}: {factory} made a {type(mixin).__name__}, expected a SAT BaseMixin"
        )
    return mixin


def _accept_published_keys(module: ExpertTransformer, state_dict: dict, prefix: str, *_) -> None:
    """Take a published state dict as it is: with its prefix, and with values that the network does not use."""
    if not prefix:
        for key in [key for key in state_dict if key.startswith(PREFIX)]:
            state_dict[key.removeprefix(PREFIX)] = state_dict.pop(key)
    for key in UNUSED_KEYS:
        state_dict.pop(prefix + key, None)
