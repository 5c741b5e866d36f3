"""Short names of samplers, guidances, losses and timesteps for the command line: ``sampler=heun``. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

SAMPLERS = {
    "ddim": "cogvideox.diffusion.samplers.ddim",
    # Euler's method in k-diffusion's variables, x / a and sqrt(1 - a^2) / a, is DDIM's step.
    "euler": "cogvideox.diffusion.samplers.ddim",
    "euler_ancestral": "cogvideox.diffusion.ancestral.euler_ancestral",
    "heun": "cogvideox.diffusion.heun.heun",
    "dpmpp_2m": "cogvideox.diffusion.samplers.dpmpp_2m",
    "dpmpp_2m_sde": "cogvideox.diffusion.samplers.dpmpp_2m_sde",
    "dpmpp_3m_sde": "cogvideox.diffusion.dpm.dpmpp_3m_sde",
    "unipc": "cogvideox.diffusion.unipc.unipc",
}

GUIDANCES = {
    "constant": "cogvideox.diffusion.guidance.ConstantGuidance",
    "dynamic": "cogvideox.diffusion.guidance.DynamicTimestepGuidance",
    "dynamic_step": "cogvideox.diffusion.guidance.DynamicStepGuidance",
    "interval": "cogvideox.diffusion.guidance.IntervalGuidance",
    "rescaled": "cogvideox.diffusion.guidance.RescaledGuidance",
}

LOSSES = {
    "v_prediction": "cogvideox.diffusion.loss.v_prediction_loss",
    "min_snr": "cogvideox.diffusion.weighting.MinSNR",
    "soft_min_snr": "cogvideox.diffusion.weighting.SoftMinSNR",
    "p2": "cogvideox.diffusion.weighting.P2",
    "snr_power": "cogvideox.diffusion.weighting.SNRPower",
    "debiased": "cogvideox.diffusion.weighting.Debiased",
    "constant": "cogvideox.diffusion.weighting.Constant",
}

TIMESTEPS = {
    "stratified": "cogvideox.diffusion.timesteps.StratifiedTimesteps",
    "uniform": "cogvideox.diffusion.timesteps.UniformTimesteps",
    "logit_normal": "cogvideox.diffusion.timesteps.LogitNormalTimesteps",
    "mode": "cogvideox.diffusion.timesteps.ModeTimesteps",
}


def target_of(name: str, known: Mapping[str, str], key: str) -> str:
    """The import path behind ``name``; a path, anything with a dot, is returned as it is.

    known: one of the tables above; key: of the configuration, for the message.
    Raises ValueError that names the nearest and all known names.
    """
    if "." in name:
        return name
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{key}={name}: {hint}the known ones are {', '.join(known)}, or give an import path")
