"""Upstream's denoiser, loss and sampler: here one noise schedule, the timesteps of training, sampler and guidance."""

from __future__ import annotations

from typing import Any

from cogvideox.upstream_rules import DENOISER, LOSS, SAMPLER, SAMPLERS, TIMESTEPS
from cogvideox.upstream_source import UpstreamSource


def translate_diffusion(source: UpstreamSource, result: dict[str, Any], training: bool) -> None:
    """Fill ``result``'s model.schedule, model.timesteps, model.offset_noise, sampler, guidance and sample.steps."""
    schedules = [_schedule(source, f"{DENOISER}.discretization_config")]
    source.target("model.denoiser_config", "DiscreteDenoiser")
    source.target(f"{DENOISER}.scaling_config", "VideoScaling")
    source.target("model.loss_fn_config", "VideoDiffusionLoss")
    if offset := source.take(f"{LOSS}.offset_noise_level", 0):
        result["model"]["offset_noise"] = offset
    schedules.append(_schedule(source, f"{TIMESTEPS}.discretization_config"))
    _timesteps(source, result, training)
    schedules.append(_schedule(source, f"{SAMPLER}.discretization_config"))
    schedules = [schedule for schedule in schedules if schedule is not None]
    if any(schedule != schedules[0] for schedule in schedules):
        source.problems.append(
            f"denoiser_config, loss_fn_config and sampler_config hold different noise schedules, {schedules}: here one "
            f"schedule serves training and sampling"
        )
    if schedules:
        target = "cogvideox.diffusion.schedule.ZeroSNRSchedule"
        result["model"]["schedule"] = {"target": target, "params": schedules[0]}
    num_timesteps = schedules[0].get("num_timesteps", 1000) if schedules else 1000
    for path in (f"{DENOISER}.num_idx", f"{TIMESTEPS}.num_idx"):
        source.only(path, num_timesteps, why=f"the schedule has {num_timesteps} time steps")
    _sampler(source, result)


def _timesteps(source: UpstreamSource, result: dict[str, Any], training: bool) -> None:
    path = f"{LOSS}.sigma_sampler_config"
    if not source.has(path):
        return
    source.target(path, "DiscreteSampling")
    uniform = source.take(f"{TIMESTEPS}.uniform_sampling", False)
    if uniform and training:
        source.note_difference(
            f"{TIMESTEPS}.uniform_sampling",
            "upstream ties each rank to one interval of time steps for good; here the intervals are dealt out anew in "
            "every step",
        )
    kind = "Stratified" if uniform else "Uniform"
    result["model"]["timesteps"] = {"target": f"cogvideox.diffusion.timesteps.{kind}Timesteps"}


def _schedule(source: UpstreamSource, path: str) -> dict[str, Any] | None:
    """The arguments of our schedule that differ from its defaults; None where upstream's files have none."""
    if not source.has(path):
        return None
    source.target(path, "ZeroSNRDDPMDiscretization")
    p = f"{path}.params"
    names = {"snr_shift": ("shift_scale", 1.0), "num_timesteps": ("num_timesteps", 1000)}
    names |= {"linear_start": ("linear_start", 0.00085), "linear_end": ("linear_end", 0.012)}
    names |= {"shift_after_rescale": ("post_shift", False)}
    values = {ours: source.take(f"{p}.{theirs}", default) for ours, (theirs, default) in names.items()}
    if source.take(f"{p}.keep_start", False) and not values["shift_after_rescale"]:
        start, shift = values["linear_start"], values["snr_shift"]
        values["linear_start"] = start / (shift + (1 - shift) * start)
    return {ours: value for ours, value in values.items() if value != names[ours][1]}


def _sampler(source: UpstreamSource, result: dict[str, Any]) -> None:
    path = "model.sampler_config"
    if not source.has(path):
        return
    kind = source.target(path, *SAMPLERS)
    result["sampler"] = {"target": SAMPLERS[kind]} if kind else None
    steps = source.take(f"{SAMPLER}.num_steps")
    if steps is not None:
        result["sample"]["steps"] = steps
    result["guidance"] = _guidance(source, f"{SAMPLER}.guider_config", steps)


def _guidance(source: UpstreamSource, path: str, steps: Any) -> dict[str, Any]:
    kind = source.target(path, "DynamicCFG", "VanillaCFG", "IdentityGuider") or "IdentityGuider"
    source.target(f"{path}.params.dyn_thresh_config", "NoDynamicThresholding")
    scale = source.take(f"{path}.params.scale", 1.0)
    if kind != "DynamicCFG":
        return {"target": "cogvideox.diffusion.guidance.ConstantGuidance", "params": {"scale": scale}}
    # Upstream hands the training time step to a formula meant for the step count; the published form is kept.
    params = {"scale": scale}
    if (exponent := source.take(f"{path}.params.exp", 5)) != 5:
        params["exponent"] = exponent
    source.only(
        f"{path}.params.num_steps", steps, why=f"sampler_config has num_steps={steps}; give both the same"
    )
    return {"target": "cogvideox.diffusion.guidance.DynamicTimestepGuidance", "params": params}
