"""Which attention kernel a run uses: the one it is told, the one it has used so far, or the fastest of a probe."""

from __future__ import annotations

import logging

import torch

from cogvideox import dist
from cogvideox.config import Config, ConfigError
from cogvideox.execution import ATTENTION, AUTO
from cogvideox.flops import clip_of
from cogvideox.model.attention_backends import Shape, activate, fastest_backend, missing
from cogvideox.system_vae import DTYPES

logger = logging.getLogger("cogvideox")


def settle_attention(
    config: Config, device: torch.device, *, training: bool, recorded: str | None = None
) -> str:
    """The kernel of a run, a name of ``execution.ATTENTION``, ready on ``device``. Every rank must call.

    Before the models are built, while the memory of a GPU is free. With ``model.transformer.attention=auto`` it is
    probed on rank 0, at the size and in the precision of the section ``data`` (training) or ``sample``.
    recorded: what the run used so far; it goes on with that, as another kernel rounds in another order.
    Raises ConfigError where the kernel that is asked for by name does not run here.
    """
    if config.model.transformer is None:
        return AUTO
    name = config.model.transformer.attention
    if name == AUTO and recorded in ATTENTION:
        name, reason = recorded, missing(recorded, device)
        if reason is not None:
            logger.warning(
                "attention: the run has used %s so far, which does not run here: %s. From here on it rounds "
                "otherwise",
                recorded,
                reason,
            )
            name, recorded = AUTO, None
    if name == AUTO and recorded is None:
        name = dist.gather(fastest_backend(_shape(config, training), device) if dist.is_main() else None)[0]
    try:
        activate(name, device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return name


def _shape(config: Config, training: bool) -> Shape:
    t = config.model.transformer
    section = config.data if training else config.sample
    clips = config.train.batch_size if training else 2 * config.sample.batch_size  # with guidance
    precision = config.train.precision if training else config.sample.precision
    return Shape(
        items=clips * t.num_attention_heads,
        tokens=clip_of(config, section).tokens,
        head_dim=t.hidden_size // t.num_attention_heads,
        dtype=DTYPES[precision or "bf16"],  # null is the checkpoint's, mostly bf16; fp16 has the same kernels
        backward=training,
    )
