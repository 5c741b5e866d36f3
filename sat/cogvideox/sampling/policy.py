"""What a model can be asked for: sizes and lengths (native, extrapolated or impossible) and the inputs of a request.

Native is what the weights were trained on. The published models: CogVideoX 1.0, clips of up to 49 frames (8k + 1) of
480 x 720; CogVideoX1.5, up to 161 frames (16k + 1) of 768 x 1360, and its image-to-video model any size whose shorter
side is 768 and whose longer one is at most 1360 (the model table of CogVideo's README). Any other network: the size in
``model.transformer``, or that of the section ``data``.

Everything that the VAE and the patches divide is possible, as sines and rotary angles exist for every position. Only a
learned table ends where it was trained. ``config.check`` refuses what cannot be divided. torch is not imported.
"""

from __future__ import annotations

import logging

from cogvideox.config import Config, ConfigError, reference_count
from cogvideox.sampling.clips import check_image, first_frames, keep_indices, last_frames
from cogvideox.sampling.prompts import Request, takes_image
from cogvideox.sampling.windows import plan
from cogvideox.weights.variants import Variant, variants_with

logger = logging.getLogger("cogvideox")


def check_size(config: Config) -> str | None:
    """None for a native size, or a sentence on what is extrapolated. ConfigError where it is impossible."""
    if config.model.transformer is None or config.vae is None:
        return None  # building it is where this becomes an error
    section, variant = config.sample, published_variant(config)
    asked = section.height, section.width
    frames, sizes = _native_frames(config, variant), _native_sizes(config, variant)
    name = variant.name if variant else "this model"
    if _has_learned_table(config):
        _check_learned_table(config, name, sizes)
    remarks = []
    if section.num_frames not in frames:
        near = sorted(frames, key=lambda count: abs(count - section.num_frames))[:2]
        remarks.append(f"{section.num_frames} frames ({_either(sorted(near))} are native)")
    if asked not in sizes and not (variant and _free_size(variant, asked)):
        turned = " turned to portrait" if asked[::-1] in sizes else ""
        remarks.append(f"{_size(asked)}{turned} ({_either(map(_size, sorted(sizes)))} is native)")
    if not remarks:
        return None
    advice = _grid_advice(config) if asked not in sizes else ""
    return f"{name} was not trained on {' and '.join(remarks)}: it is extrapolated, expect less of it{advice}"


def warn_about_size(config: Config) -> None:
    """``check_size`` with its sentence as one warning in the log."""
    sentence = check_size(config)
    if sentence is not None:
        logger.warning("sample: %s", sentence)


def published_variant(config: Config) -> Variant | None:
    """The published model with this network's geometry; None for a network of one's own."""
    t = config.model.transformer
    found = variants_with(
        num_layers=t.num_layers,
        hidden_size=t.hidden_size,
        patch_size=tuple(t.patch_size),
        in_channels=t.in_channels,
        ofs_embed_dim=t.ofs_embed_dim,
        learned_table=_has_learned_table(config),
    )
    return found[0] if found else None


def _has_learned_table(config: Config) -> bool:
    position = config.model.transformer.position
    return bool(position.params.get("learned_table")) or position.target.endswith("LearnedPosition3D")


def _native_frames(config: Config, variant: Variant | None) -> set[int]:
    """Lengths of trained clips; a picture, one frame, is among them, as images were trained with the videos."""
    if variant is None:
        counts = {config.model.transformer.num_frames}
        return counts | ({config.data.num_frames} if config.data is not None else set())
    step, longest = (16, 161) if variant.patch_size[0] == 2 else (8, 49)
    return set(range(1, longest + 1, step))


def _native_sizes(config: Config, variant: Variant | None) -> set[tuple[int, int]]:
    transformer, side = config.model.transformer, config.vae.spatial_compression
    sizes = {(transformer.latent_height * side, transformer.latent_width * side)}
    if config.data is not None:  # fine-tuning on another size makes it native
        sizes.add((config.data.height, config.data.width))
    return sizes


def _free_size(variant: Variant, size: tuple[int, int]) -> bool:
    """CogVideoX1.5-5B-I2V: min(height, width) = 768, max(height, width) <= 1360, multiples of 16."""
    multi_resolution = variant.image_to_video and variant.patch_size[0] == 2
    return multi_resolution and min(size) == 768 and max(size) <= 1360 and max(size) % 16 == 0


def _check_learned_table(config: Config, name: str, sizes: set[tuple[int, int]]) -> None:
    section, trained = config.sample, config.model.transformer.num_frames
    asked = section.height, section.width
    if asked not in sizes:
        raise ConfigError(
            f"sample.height={asked[0]}, sample.width={asked[1]}: {name} has a learned position table, which knows "
            f"{_either(map(_size, sorted(sizes)))} only"
        )
    if section.num_frames > trained:
        raise ConfigError(
            f"sample.num_frames={section.num_frames}: {name} has a learned position table, which ends at {trained} "
            f"frames; use {trained}, and sample.total_frames={section.num_frames} for a longer video in windows"
        )


def _grid_advice(config: Config) -> str:
    position = config.model.transformer.position
    if not position.target.endswith("RotaryPosition3D"):
        return ""
    how = position.params.get("other_sizes", "slice")
    other = "resize" if how == "slice" else "slice"
    return f" (rotary grid: {how}; model.transformer.position.params.other_sizes={other} is the other way)"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _either(items) -> str:
    return " or ".join(str(item) for item in items)


# -------------------------------------------------------------------------------------------------- inputs


def check_inputs(config: Config, request: Request) -> None:
    """Raise ConfigError where the inputs and modes of a request do not go together, or a file of it cannot serve.

    Pictures are opened and videos counted, not decoded.
    """
    section, where = config.sample, f"prompt {request.index} ({request.prompt!r})"
    _check_modes(config, request, where)
    if takes_image(config):
        if not (request.image or request.video or request.continue_from):
            raise ConfigError(f"{where}: this model needs an image: --image FILE or prompt@@FILE")
    elif request.image and not request.last_image:
        raise ConfigError(
            f"{where}: this model takes no image (together with --last-image FILE it is kept by force, as the first "
            f"frame, which no weights were trained for)"
        )
    if section.strength is not None:
        if not 0 <= section.strength <= 1:
            raise ConfigError(
                f"sample.strength={section.strength}: expected a number from 0 (the video itself) to 1 (all new)"
            )
        if section.strength and not round(section.strength * section.steps):
            raise ConfigError(
                f"sample.strength={section.strength} of sample.steps={section.steps} is no step at all: use at least "
                f"{1 / section.steps:.3g}, or more steps"
            )
        if not request.video or section.invert:
            raise ConfigError(
                f"{where}: sample.strength is for video to video: give --video FILE, without --invert"
            )
    _check_files(config, request)


def _check_modes(config: Config, request: Request, where: str) -> None:
    section = config.sample
    longer = section.total_frames is not None or request.continue_from is not None
    if (section.invert or section.keep_frames) and not request.video:
        name = "--invert" if section.invert else "sample.keep_frames"
        raise ConfigError(f"{where}: {name} needs the video it starts from: --video FILE")
    if section.invert and section.keep_frames:
        raise ConfigError(
            "sample.invert and sample.keep_frames exclude each other: inversion starts from all frames"
        )
    if reference_count(section.reference_steps, section.steps) and not section.invert:
        raise ConfigError(
            f"{where}: sample.reference_steps is for the edit of an inverted video: add --invert"
        )
    if section.reference_layers is not None:
        _check_layers(config, section.reference_layers)
    if request.source_prompt is not None and not section.invert:
        raise ConfigError(f"{where}: --source-prompt says what an inverted video shows: add --invert")
    if longer and (request.video or request.last_image):
        other = "--video" if request.video else "--last-image"
        raise ConfigError(
            f"{where}: {other} is for one window of sample.num_frames={section.num_frames}; leave out "
            f"--total-frames and --continue-from"
        )
    if request.video and request.last_image:
        raise ConfigError(
            f"{where}: --video and --last-image exclude each other (sample.keep_frames keeps a last frame)"
        )
    if request.image and request.continue_from:
        raise ConfigError(
            f"{where}: --image and --continue-from exclude each other: the video has the first frame"
        )


def _check_layers(config: Config, layers: list[int]) -> None:
    count = config.model.transformer.num_layers
    missing = [layer for layer in layers if not 0 <= layer < count]
    if missing or not layers:
        found = f"layer {missing[0]} does not exist" if missing else "no layer is named"
        raise ConfigError(
            f"sample.reference_layers: {found}; this network has the layers 0-{count - 1} (null: all)"
        )


def _check_files(config: Config, request: Request) -> None:
    section, longer = config.sample, plan(config, request.continue_from is not None)
    for path in (request.image, request.last_image):
        if path is not None:
            check_image(path)
    if request.video is not None:
        first_frames(request.video, config)
    if request.continue_from is not None and request.continue_from.suffix != ".safetensors":
        last_frames(request.continue_from, config, longer.shared)
    if section.keep_frames is not None:
        keep_indices(section.keep_frames, section.num_frames)
