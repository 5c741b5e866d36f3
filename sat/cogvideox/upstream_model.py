"""Upstream's ``model`` section, what is built from it: the transformer with its LoRA, the VAE, the conditions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cogvideox.upstream_rules import LORA, MIXINS, NETWORK, TRUNK, VAE
from cogvideox.upstream_source import UpstreamSource


def translate_model(source: UpstreamSource, result: dict[str, Any], training: bool) -> None:
    """Fill ``result``'s sections model (transformer, conditions), vae, lora and the paths of weights in load.

    training: the files also say how to train; otherwise LoRA means that a trained LoRA is loaded.
    """
    prefixes = source.take("model.not_trainable_prefixes", ["first_stage_model", "conditioner"])
    if source.has("model.network_config"):
        _transformer(source, result)
        _lora(source, result, prefixes, training)
    source.ignore("args.checkpoint_activations", "model.transformer.checkpoint_activations switches it")
    _vae(source, result)
    _conditions(source, result, frozen_text=bool({"conditioner", "all"} & set(prefixes)))


def patch_size(value: Any) -> list[int] | None:
    """2 (CogVideoX 1.0: per frame) -> [1, 2, 2]; [2, 2, 2] (1.5) stays; None for anything else."""
    if isinstance(value, int):
        return [1, value, value]
    return value if isinstance(value, list) and len(value) == 3 else None


def _transformer(source: UpstreamSource, result: dict[str, Any]) -> None:
    source.target("model.network_config", "DiffusionTransformer")
    p = NETWORK
    names = ("num_layers", "hidden_size", "num_attention_heads", "in_channels", "out_channels", "num_frames")
    section = {n: source.take(f"{p}.{n}") for n in (*names, "latent_height", "latent_width")}
    patch = source.take(f"{p}.patch_size")
    section["patch_size"] = patch_size(patch)
    if patch is not None and section["patch_size"] is None:
        source.problems.append(f"{p}.patch_size={patch!r}: expected a number or [t, h, w]")
    section["time_embed_dim"] = source.take(f"{p}.time_embed_dim", section["hidden_size"])
    section["ofs_embed_dim"] = source.take(f"{p}.ofs_embed_dim")
    if section["ofs_embed_dim"] is not None:
        source.note_difference(
            f"{p}.ofs_embed_dim",
            "sampling scales image latents as training does; SAT's sampling does not: "
            "sample.image_latent_scale=sat_sampling",
        )
    if (compression := source.take(f"{p}.time_compressed_rate", 4)) != 4:
        result["vae"]["temporal_compression"] = compression

    everywhere = source.get("args.checkpoint_activations", False)
    section["checkpoint_activations"] = source.take(f"{TRUNK}.checkpoint_activations", everywhere)
    if everywhere == section["checkpoint_activations"]:
        source.take("args.checkpoint_activations")
    width = section["hidden_size"]
    if width is not None:
        source.only(f"{TRUNK}.inner_hidden_size", None, 4 * width, why=f"the MLP here has {4 * width}")

    _position(source, section)
    m = MIXINS
    source.target(f"{m}.patch_embed_config", "ImagePatchEmbeddingMixin")
    section["text_hidden_size"] = source.take(f"{m}.patch_embed_config.params.text_hidden_size")
    source.target(f"{m}.adaln_layer_config", "AdaLNMixin")
    source.target(f"{m}.final_layer_config", "FinalLayerMixin")
    result["model"]["transformer"] = {key: value for key, value in section.items() if value is not None}


def _position(source: UpstreamSource, section: dict[str, Any]) -> None:
    path = f"{MIXINS}.pos_embed_config"
    kind = source.target(path, "Basic3DPositionEmbeddingMixin", "Rotary3DPositionEmbeddingMixin")
    p = f"{path}.params"
    section["text_length"] = source.take(
        f"{p}.text_length", source.get("model.conditioner_config.params.emb_models.0.params.max_length")
    )
    axes = ("height_interpolation", "width_interpolation", "time_interpolation")
    interpolation = {n: source.take(f"{NETWORK}.{n}", 1.0) for n in axes}
    interpolation |= {n: source.take(f"{p}.{n}", interpolation[n]) for n in axes}
    if kind == "Basic3DPositionEmbeddingMixin":
        params = {n: value for n, value in interpolation.items() if value != 1.0}
        section["position"] = {"target": "cogvideox.model.position.SincosPosition3D", "params": params}
    elif kind == "Rotary3DPositionEmbeddingMixin":
        head = source.take(f"{p}.hidden_size_head")
        heads, width = section["num_attention_heads"], section["hidden_size"]
        if head is not None and heads and width and head * heads != width:
            source.problems.append(
                f"{p}.hidden_size_head={head}: hidden_size / num_attention_heads is {width / heads:g}"
            )
        for name in (n for n, value in interpolation.items() if value != 1.0):
            source.note(f"{p}.{name}", "rotary positions are whole numbers, upstream too")
        params = {}
        if (theta := source.take(f"{p}.theta", 10000)) != 10000:
            params["theta"] = theta
        if source.take(f"{p}.learnable_pos_embed", False):
            params["learned_table"] = True
        section["position"] = {"target": "cogvideox.model.position.RotaryPosition3D", "params": params}


def _lora(source: UpstreamSource, result: dict[str, Any], prefixes: list[str], training: bool) -> None:
    path = f"{MIXINS}.lora_config"
    if not source.has(path):
        if set(prefixes) - {"first_stage_model", "conditioner"}:
            source.problems.append(
                f"model.not_trainable_prefixes={prefixes}: only LoRA ('all' together with lora_config) or training "
                f"the whole transformer can be expressed"
            )
        return
    source.target(path, "LoraMixin")
    layers = source.take(f"{LORA}.layer_range")
    result["lora"] = {"rank": source.take(f"{LORA}.r"), "alpha": source.take(f"{LORA}.lora_alpha", 1)}
    if layers is not None:
        result["lora"]["transformer_layers"] = layers
    if training and "all" not in prefixes:
        source.problems.append(
            f"model.not_trainable_prefixes={prefixes}: with lora_config it would train adapters and base weights "
            f"together; here the base is frozen: set it to ['all']"
        )
    if not training and (checkpoint := source.get("args.load")) is not None:
        result["load"]["lora"] = checkpoint  # upstream's LoRA checkpoints are whole models: base and adapters


def _vae(source: UpstreamSource, result: dict[str, Any]) -> None:
    section, path = result["vae"], "model.first_stage_config"
    has_vae = source.has(path)
    if source.has("model.scale_factor") or has_vae:
        section["scale_factor"] = source.take("model.scale_factor", 1.0)
    if not has_vae:
        return
    source.target(path, "VideoAutoencoderInferenceWrapper", "VideoAutoencodingEngine")
    if (weights := source.take(f"{VAE}.ckpt_path")) is not None:
        result["load"]["vae"] = weights
    source.target(f"{VAE}.regularizer_config", "DiagonalGaussianRegularizer")
    halves = []
    for half in ("encoder", "decoder"):
        source.target(f"{VAE}.{half}_config", f"ContextParallel{half.title()}3D")
        q = f"{VAE}.{half}_config.params"
        shape = {
            "channels": source.take(f"{q}.ch"),
            "channel_multipliers": source.take(f"{q}.ch_mult"),
            "num_res_blocks": source.take(f"{q}.num_res_blocks"),
            "z_channels": source.take(f"{q}.z_channels"),
            "in_channels": source.take(f"{q}.in_channels", 3),
            "temporal_compression": source.take(
                f"{q}.temporal_compress_times", section.get("temporal_compression", 4)
            ),
        }
        source.only(f"{q}.out_ch", shape["in_channels"], why="the decoder gives back what the encoder takes")
        source.only(f"{q}.zq_ch", None, shape["z_channels"], why="its norms are given the latents")
        halves.append(shape)
    if halves[0] != halves[1]:
        differing = [
            f"{k}: {halves[0][k]} and {halves[1][k]}" for k in halves[0] if halves[0][k] != halves[1][k]
        ]
        source.problems.append(f"{VAE}: encoder and decoder differ in {'; '.join(differing)}")
    section.update({key: value for key, value in halves[0].items() if value is not None})


def _conditions(source: UpstreamSource, result: dict[str, Any], frozen_text: bool) -> None:
    conditions: list[dict[str, Any]] = []
    path = "model.conditioner_config"
    source.target(path, "GeneralConditioner")
    for index in list(source.get(f"{path}.params.emb_models") or {}):
        e = f"{path}.params.emb_models.{index}"
        if index != "0":
            source.problems.append(f"{e}: one text encoder, of the captions, is supported")
        conditions.append(_text_condition(source, result, e, frozen_text))
    image = source.take("model.noised_image_input", False)
    everywhere = source.take("model.noised_image_all_concat", False)
    dropout = source.take("model.noised_image_dropout", 0.0)
    if image:
        # One draw drops the image of the whole batch, as upstream does.
        params = {"dropout": dropout, "dropout_per": "batch"} | ({"repeat": True} if everywhere else {})
        conditions.append({"target": "cogvideox.conditioning.frames.FirstFrameCondition", "params": params})
    for name, given in (("noised_image_all_concat", everywhere), ("noised_image_dropout", dropout)):
        if given and not image:
            source.note(f"model.{name}", "acts only with model.noised_image_input")
    if conditions:
        result["model"]["conditions"] = conditions


def _text_condition(
    source: UpstreamSource, result: dict[str, Any], path: str, frozen: bool
) -> dict[str, Any]:
    source.target(path, "FrozenT5Embedder")
    source.only(f"{path}.input_key", "txt", why="the text encoder reads the captions")
    source.only(f"{path}.legacy_ucg_value", None, why="a dropped caption is a zero embedding")
    params: dict[str, Any] = {"dropout": source.take(f"{path}.ucg_rate", 0.0)}
    if (length := source.take(f"{path}.params.max_length")) is not None:
        params["max_length"] = length
    if source.take(f"{path}.is_trainable", False):
        if frozen:
            source.note(f"{path}.is_trainable", "model.not_trainable_prefixes freezes the text encoder")
        else:
            params["trainable"] = True
    if (folder := source.take(f"{path}.params.model_dir")) is not None:
        # transformers, which upstream calls, takes this for a hub id where there is no such folder.
        is_hub_id = re.fullmatch(r"google/[\w.-]+", str(folder)) and not Path(folder).is_dir()
        result["load"]["text_encoder"] = f"hf://{folder}" if is_hub_id else folder
    for name in ("device", "freeze", "cache_dir"):
        source.ignore(f"{path}.params.{name}", "follows from other keys")
    return {"target": "cogvideox.conditioning.text.TextCondition", "params": params}
