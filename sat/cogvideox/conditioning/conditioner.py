"""The conditioner: all conditions of a model, what is dropped in training, and what guidance compares with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cogvideox.conditioning.frames import Encode

JOINED_ALONG = {
    "tokens": (3, 1),
    "concat": (5, 2),
}  # output -> (its dimensions, the one along which conditions join)


class Condition(Protocol):
    """What a condition is: a module, or any callable, that turns a batch into tokens or into channels.

    ``condition(batch, drop)`` returns one of, or both of
      {"tokens": (B, L, D)}         joins the text tokens;
      {"concat": (B, T, C, H, W)}   joins the noisy latents along the channels.
    ``drop`` is (B,) bool: samples whose condition is left out in this training step. Its device is where the result is
    wanted. It is drawn with probability ``dropout`` per sample, or per batch where ``dropout_per`` is "batch"; a
    condition without these attributes is never dropped.

    A condition may name further keyword arguments and is then given them: ``rng`` (the step's random streams, None at
    inference), ``encode`` (pixels (B, F, 3, H, W) in [-1, 1] -> scaled latents), ``num_latent_frames``,
    ``image_latent_scale`` and ``scale_factor``. One with a method ``encode(captions, device, allow_empty=...)`` ->
    (B, L, D) takes part in negative prompts.
    """

    def __call__(self, batch: dict[str, Any], drop: Tensor) -> dict[str, Tensor]: ...


class Conditioner(nn.Module):
    """Runs conditions in their order and joins what they give. State-dict keys are SAT's ``embedders.N.*``."""

    def __init__(self, embedders: Iterable[Condition]):
        super().__init__()
        self.embedders = nn.ModuleList(e if isinstance(e, nn.Module) else _Callable(e) for e in embedders)

    def forward(
        self,
        batch: dict[str, Any],
        rng: Any = None,
        encode: Encode | None = None,
        *,
        device: torch.device | str | None = None,
        **context: Any,
    ) -> dict[str, Tensor]:
        """The conditions of a batch: ``{"tokens": (B, L, D), "concat": (B, T, C, H, W)}``, as far as there are any.

        rng: the step's random streams (``.local``); None is inference: nothing is dropped and no noise is added.
        device: of the result. None: that of ``rng``, else of the trained embedders, else of the batch's tensors.
        context: further keyword arguments for the conditions that name them.
        """
        size = _batch_size(batch)
        device = self._device(batch, rng) if device is None else device
        context |= {"rng": rng, "encode": encode}
        parts: dict[str, list[Tensor]] = {}
        for embedder in self.embedders:
            drop = _draw_drop(embedder, size, rng, device)
            for key, value in embedder(batch, drop, **_named_by(embedder, context)).items():
                _check_output(embedder, key, value, size)
                parts.setdefault(key, []).append(value)
        return {key: torch.cat(values, dim=JOINED_ALONG[key][1]) for key, values in parts.items()}

    def for_sampling(
        self,
        prompts: Sequence[str],
        *,
        images: Tensor | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        unconditional: str = "zeros",
        encode: Encode | None = None,
        device: torch.device | str | None = None,
        **context: Any,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(conditional, unconditional) inputs of guidance for B prompts.

        images: (B, 3, H, W) or (B, 1, 3, H, W), uint8 or in [-1, 1], for a model with an image condition.
        negative_prompt, unconditional: see ``unconditional``.  encode, device, context: see ``forward``.
        """
        batch: dict[str, Any] = {"caption": list(prompts)}
        if images is not None:
            batch["image"] = images
        conditional = self(batch, encode=encode, device=device, **context)
        if images is not None and "concat" not in conditional:
            raise ValueError("an image is given, but the model has no image condition (model.conditions)")
        return conditional, self.unconditional(conditional, unconditional, negative_prompt)

    def with_images(
        self,
        conditions: tuple[dict[str, Tensor], dict[str, Tensor]],
        images: Tensor,
        *,
        encode: Encode,
        **context: Any,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(conditional, unconditional) of ``for_sampling`` with the channels of other images; the text is not encoded.

        images: (B, 3, H, W).  Only the conditions that name ``encode``, those of pictures, are run again.
        """
        context |= {"encode": encode, "rng": None}
        drop = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        parts = []
        for embedder in self.embedders:
            named = _named_by(embedder, context)
            if "encode" in named:
                parts.append(embedder({"image": images}, drop, **named)["concat"])
        if not parts:
            raise ValueError("an image is given, but the model has no image condition (model.conditions)")
        concat = torch.cat(parts, dim=JOINED_ALONG["concat"][1])
        if concat.shape != conditions[0]["concat"].shape:
            raise ValueError(
                f"the images' channels are {tuple(concat.shape)}, those of the prompts "
                f"{tuple(conditions[0]['concat'].shape)}: one image per prompt, in the size of the video"
            )
        return tuple({**branch, "concat": concat} for branch in conditions)

    def unconditional(
        self,
        like: dict[str, Tensor],
        unconditional: str = "zeros",
        negative_prompt: str | Sequence[str | None] | None = None,
    ) -> dict[str, Tensor]:
        """What guidance moves away from: ``like`` with other tokens. Image channels stay, guidance is on the text.

        unconditional: "zeros" (as published and as trained) or "empty_prompt" (the encoded "", as diffusers does).
        negative_prompt: for all samples, or one per sample; it is encoded and takes the place of ``unconditional``,
        except in samples where it is None.
        """
        if unconditional not in ("zeros", "empty_prompt"):
            raise ValueError(f"sample.unconditional={unconditional!r}: expected 'zeros' or 'empty_prompt'")
        if "tokens" not in like:
            if negative_prompt is not None:
                raise ValueError(
                    "a negative prompt is given, but the model has no text condition (model.conditions)"
                )
            return dict(like)
        size = len(like["tokens"])
        prompts = (
            [negative_prompt] * size if isinstance(negative_prompt, str | None) else list(negative_prompt)
        )
        if len(prompts) != size:
            raise ValueError(
                f"{len(prompts)} negative prompts for {size} prompts: give one, or one per prompt"
            )
        if unconditional == "empty_prompt":
            prompts = ["" if prompt is None else prompt for prompt in prompts]
        if all(prompt is None for prompt in prompts):
            return {**like, "tokens": torch.zeros_like(like["tokens"])}
        tokens = self._encode_prompts([prompt or "" for prompt in prompts], like["tokens"])
        absent = torch.tensor([prompt is None for prompt in prompts], device=tokens.device)
        return {**like, "tokens": tokens.masked_fill(absent[:, None, None], 0)}

    def release(self) -> None:
        """Free the frozen encoders that can be read again (``TextCondition.release``), once all prompts are encoded."""
        for embedder in self.embedders:
            if hasattr(embedder, "release"):
                embedder.release()

    def _encode_prompts(self, prompts: list[str], like: Tensor) -> Tensor:
        """Prompts -> tokens shaped like those of the conditional branch. Equal prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        encoders = [embedder for embedder in self.embedders if hasattr(embedder, "encode")]
        parts = [encoder.encode(distinct, like.device, allow_empty=True) for encoder in encoders]
        tokens = torch.cat(parts, dim=1)[[distinct.index(prompt) for prompt in prompts]] if parts else None
        if tokens is None or tokens.shape != like.shape:
            raise ValueError(
                "a negative or empty prompt cannot be encoded: some token conditions (model.conditions) have no method "
                "encode(captions, device, allow_empty=...); use unconditional: zeros and no negative prompt"
            )
        return tokens

    def _device(self, batch: dict[str, Any], rng: Any) -> torch.device:
        if rng is not None:
            return rng.local.device
        tensors = [*self.parameters(), *(value for value in batch.values() if isinstance(value, Tensor))]
        return tensors[0].device if tensors else torch.get_default_device()


class _Callable(nn.Module):
    """A plain callable as a module, with its attributes of a condition."""

    def __init__(self, function: Condition):
        super().__init__()
        self.function = function
        self.dropout, self.dropout_per = (
            getattr(function, "dropout", 0.0),
            getattr(function, "dropout_per", "sample"),
        )

    def forward(self, batch: dict[str, Any], drop: Tensor, **context: Any) -> dict[str, Tensor]:
        return self.function(batch, drop, **context)


def _named_by(embedder: nn.Module, context: dict[str, Any]) -> dict[str, Any]:
    """Of ``context``, what the condition's signature names."""
    function = embedder.function if isinstance(embedder, _Callable) else embedder.forward
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return context
    return {p.name: context[p.name] for p in parameters if p.name in context}


def _draw_drop(embedder: nn.Module, size: int, rng: Any, device: torch.device | str) -> Tensor:
    """(B,) bool: which samples lose this condition."""
    probability = getattr(embedder, "dropout", 0.0)
    if rng is None or probability == 0:
        return torch.zeros(size, dtype=torch.bool, device=device)
    draws = 1 if getattr(embedder, "dropout_per", "sample") == "batch" else size
    dropped = torch.rand(draws, generator=rng.local, device=rng.local.device) < probability
    return dropped.expand(size).to(device)


def _batch_size(batch: dict[str, Any]) -> int:
    sizes = {key: len(v) for key, v in batch.items() if isinstance(v, list | tuple | Tensor)}
    if not sizes or len(set(sizes.values())) != 1:
        raise ValueError(f"a batch of conditions needs lists or tensors of one length, found {sizes}")
    return next(iter(sizes.values()))


def _check_output(embedder: nn.Module, key: str, value: Tensor, size: int) -> None:
    name = type(embedder).__name__
    if key not in JOINED_ALONG:
        raise ValueError(f"condition {name} returns {key!r}; expected {' or '.join(JOINED_ALONG)}")
    if value.ndim != JOINED_ALONG[key][0] or len(value) != size:
        shape = "(B, L, D)" if key == "tokens" else "(B, T, C, H, W)"
        raise ValueError(
            f"condition {name} returns {key} {tuple(value.shape)}; expected {shape} with B={size}"
        )
