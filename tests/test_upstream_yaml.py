"""YAML files of CogVideo's own sat/ folder: recognised, translated, and what cannot be translated is named."""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import cogvideox
from cogvideox.config import ConfigError, load_config
from cogvideox.upstream_yaml import is_upstream, translate

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# The published files: (code line, model) -> our file of the same model.
PUBLISHED = {
    ("v1.0", "2b"): "cogvideox_2b",
    ("main", "2b"): "cogvideox_2b",
    ("v1.0", "5b"): "cogvideox_5b",
    ("main", "5b"): "cogvideox_5b",
    ("v1.0", "5b_i2v"): "cogvideox_5b_i2v",
    ("main", "5b_i2v"): "cogvideox_5b_i2v",
    ("v1.0", "2b_lora"): "cogvideox_2b",
    ("v1.0", "5b_lora"): "cogvideox_5b",
    ("v1.0", "5b_i2v_lora"): "cogvideox_5b_i2v",
    ("main", "1.5_5b"): "cogvideox1.5_5b",
    ("main", "1.5_5b_i2v"): "cogvideox1.5_5b_i2v",
}


def published(reference: Path, line: str, model: str, method: str) -> dict[str, Any]:
    """The published model file merged with sft.yaml or inference.yaml, from the table of reference/UPSTREAM_YAML.md."""
    skip = {"args.mode"}
    if "i2v" not in model:
        skip |= {"model.noised_image_input", "model.noised_image_all_concat", "model.noised_image_dropout"}
        skip |= {"model.augmentation_dropout"}
    if not model.endswith("lora"):
        skip |= {"model.not_trainable_prefixes", "model.network_config.params.modules.lora_config"}
    if model != "1.5_5b_i2v":
        skip |= {"model.network_config.params.ofs_embed_dim"}
    position = "model.network_config.params.modules.pos_embed_config.params"
    if not model.startswith("5b_i2v"):
        skip.add(f"{position}.learnable_pos_embed")
    if model.startswith("2b"):
        skip.add(f"{position}.hidden_size_head")
    else:
        skip |= {f"{position}.height_interpolation", f"{position}.width_interpolation"}
    training = {
        "args.save",
        "args.train",
        "args.valid",
        "args.eval",
        "args.log_interval",
        "args.split",
        "args.num_w",
    }
    training |= {
        "args.experiment",
        "args.no_load",
        "args.checkpoint",
        "args.force_train",
        "data.",
        "deepspeed.",
    }
    sampling = {
        "args.sampling",
        "args.input",
        "args.output",
        "args.force_inf",
        "args.batch",
        "args.latent",
        "args.bf16",
    }
    sampling |= {"args.load", "args.image2video"}
    skip |= sampling - {"args.load"} if method == "sft" else training

    tree: dict[str, Any] = {"args": {"mode": "finetune" if method == "sft" else "inference"}}
    for row in (reference / "UPSTREAM_YAML.md").read_text().splitlines():
        if not row.startswith("| ") or row.startswith("| key") or "`" not in row:
            continue
        key, cell = (part.strip() for part in row.strip("| ").split("|", 1))
        if any(key.startswith(prefix) for prefix in skip):
            continue
        values = re.findall(r"`([^`]*)`(?: \(([^)]*)\))?", cell)
        named = [value for value, files in values if files and f"{line}:{model}" in files.split(", ")]
        named += [value for value, files in values if files and f"{line}:{method}" in files.split(", ")]
        rest = [value for value, files in values if not files or re.fullmatch(r"\d+ files", files)]
        if named or rest:
            put(
                tree, key, yaml.safe_load((named + rest)[0].replace("{your CogVideoX SAT folder}", "weights"))
            )
    return tree


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    names = key.replace("emb_models[0]", "emb_models").split(".")
    for i, name in enumerate(names[:-1]):
        tree = tree.setdefault(name, [{}] if name == "emb_models" else {})
        tree = tree[0] if isinstance(tree, list) else tree
        assert isinstance(tree, dict), names[: i + 1]
    tree[names[-1]] = value


def load(tmp_path: Path, tree: dict[str, Any], *others: Path):
    path = tmp_path / "upstream.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config([path, *others])


# ----------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize("method", ["sft", "inference"])
@pytest.mark.parametrize("line, model", PUBLISHED, ids=lambda value: value)
def test_a_published_file_is_our_file_of_the_same_model(reference, tmp_path, line, model, method):
    ours = load_config([CONFIGS / f"{PUBLISHED[line, model]}.yaml"])
    theirs = load(tmp_path, published(reference, line, model, method))
    if model.startswith("1.5"):  # the table of positions there, 300 x 300, is only an upper limit
        assert (theirs.model.transformer.latent_height, theirs.model.transformer.latent_width) == (300, 300)
        theirs.model.transformer.latent_height, theirs.model.transformer.latent_width = 96, 170
    assert theirs.model.transformer == ours.model.transformer
    assert theirs.model.schedule == ours.model.schedule
    assert theirs.model.timesteps == ours.model.timesteps
    assert theirs.sampler == ours.sampler and theirs.guidance == ours.guidance
    for found, expected in zip(theirs.model.conditions, ours.model.conditions, strict=True):
        assert found.target == expected.target
        assert expected.params.items() <= found.params.items()
    ours.vae.encode_frames_per_pass = theirs.vae.encode_frames_per_pass  # upstream has no such choice
    assert theirs.vae == ours.vae
    if method == "inference":
        ours.sample.output_dir = "outputs"
        if line == "main" and not model.startswith("1.5"):  # its inference.yaml is written for 1.5 models
            section = theirs.sample
            assert (section.num_frames, section.height, section.width, section.fps) == (85, 768, 1360, 16)
            section.num_frames, section.height, section.width, section.fps = 49, 480, 720, 8
        assert theirs.sample == ours.sample
    assert theirs.load.vae.endswith("vae/3d-vae.pt") and theirs.load.transformer.endswith("/transformer")
    assert theirs.load.text_encoder.endswith("t5-v1_1-xxl")


def test_the_published_sft_file_is_translated_whole(reference, tmp_path):
    config = load(tmp_path, published(reference, "v1.0", "5b", "sft"))
    train, data = config.train, config.data
    assert (train.steps, train.batch_size, train.precision, train.gradient_clipping) == (1000, 2, "bf16", 0.1)
    assert train.optimizer.target == "torch.optim.AdamW"
    assert train.optimizer.params == {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-4}
    assert train.ema_decay == 0.9999  # FusedEmaAdam's own default
    assert (train.lr_schedule, train.warmup_steps) == ("linear", 10)  # SAT's defaults: 1 % of the steps
    assert (train.save_every, train.log_every) == (500, 20)
    assert (data.path, data.num_frames, data.height, data.width, data.fps) == ("disney", 49, 480, 720, 8)
    assert data.params == {"skip_frames": 3} and data.num_workers == 8
    assert data.validation_path is None  # it names the training folder
    assert config.run.dir == "ckpts_5b_lora/lora-disney"
    assert config.deepspeed["zero_optimization"]["stage"] == 2
    assert not {"loss_scale", "optimizer", "bf16", "fp16"} & config.deepspeed.keys()


def test_deepspeed_accepts_the_translated_section(reference, tmp_path):
    import torch

    from cogvideox.engine.optim import deepspeed_config

    config = load(tmp_path, published(reference, "v1.0", "5b", "sft"))
    arguments = {"trainable": 10, "world_size": 1, "device": torch.device("cpu")}
    final = deepspeed_config(config.train, config.deepspeed, **arguments)
    assert final["bf16"]["enabled"] and final["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("model, rank", [("2b_lora", 128), ("5b_lora", 128), ("5b_i2v_lora", 256)])
def test_the_published_lora_files_become_a_lora_section(reference, tmp_path, model, rank):
    config = load(tmp_path, published(reference, "v1.0", model, "sft"))
    assert (config.lora.rank, config.lora.alpha) == (rank, 1.0)


@pytest.mark.parametrize(
    "line, latents, frames", [("v1.0", 13, 49), ("v1.0", 9, 33), ("main", 22, 81), ("main", 42, 161)]
)
def test_sampling_num_frames_counts_latents_and_the_padding_of_1_5(
    reference, tmp_path, line, latents, frames
):
    tree = published(reference, line, "5b" if line == "v1.0" else "1.5_5b", "inference")
    tree["args"]["sampling_num_frames"] = latents
    assert load(tmp_path, tree).sample.num_frames == frames
    # The same from inference.yaml alone, put after a model file of this project.
    assert translate({"args": tree["args"]})["sample"]["num_frames"] == frames


def test_every_key_without_effect_is_reported(reference, caplog):
    tree = published(reference, "v1.0", "5b", "sft")
    with caplog.at_level(logging.WARNING, logger="cogvideox"):
        translate(tree)
    for key in (
        "deepspeed.loss_scale",
        "args.valid_data",
        "args.no_load_rng",
        "adm_in_channels",
        "weighting_config",
    ):
        assert key in caplog.text


def test_no_key_of_a_published_file_can_be_changed_unnoticed(reference):
    """Each leaf in turn gets a value that nobody translates: it changes the result, is refused, or was reported."""
    tree = published(reference, "v1.0", "5b_i2v_lora", "sft") | {}
    plain, silent = translate(copy.deepcopy(tree)), []
    for path in leaves(tree):
        changed = copy.deepcopy(tree)
        node = changed
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = 31337 if not isinstance(node[path[-1]], bool) else not node[path[-1]]
        reports: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = reports.append  # type: ignore[method-assign]
        logging.getLogger("cogvideox").addHandler(handler)
        try:
            same = translate(changed) == plain
        except ConfigError:
            continue
        finally:
            logging.getLogger("cogvideox").removeHandler(handler)
        name = ".".join(str(part) for part in path if not isinstance(part, int))
        parents = [name.rsplit(".", n)[0] for n in range(4)]
        text = " ".join(r.getMessage() for r in reports).replace(".0.", ".")
        if same and not any(parent in text for parent in parents):
            silent.append(name)
    assert silent == []


def leaves(node: Any, path: tuple = ()) -> list[tuple]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None or not node or isinstance(node, list) and not isinstance(node[0], dict):
        return [path]
    return [leaf for key, value in items for leaf in leaves(value, (*path, key))]


# -------------------------------------------------------------------------------------------------- partial files


@pytest.mark.parametrize("kind", ["t2v_sincos", "t2v_rope", "i2v_rope", "t2v_v15", "i2v_v15"])
def test_the_tiny_reference_networks_translate_and_load_their_weights(reference, tmp_path, kind):
    from safetensors import safe_open

    folder = reference / "fixtures" / "transformer" / kind
    params = json.loads((folder / "config.json").read_text())["network_params"]
    config = load(tmp_path, {"model": {"network_config": {"params": params}}})
    assert config.vae is None and config.train is None and config.sample is None
    net = cogvideox.build_transformer(config, device="meta")
    with safe_open(folder / "weights.safetensors", "pt") as weights:
        published_keys = {key.removeprefix("model.diffusion_model.") for key in weights.keys()}
    assert {key for key, _ in net.named_parameters()} <= published_keys


def test_the_tiny_reference_lora_network_translates(reference, tmp_path):
    path = reference / "fixtures" / "lora" / "t2v_sincos" / "config.json"
    params = json.loads(path.read_text())["network_params"]
    config = load(tmp_path, {"model": {"network_config": {"params": params}}})
    assert (config.lora.rank, config.lora.alpha) == (4, 1.0)


def test_the_tiny_reference_vae_translates(reference, tmp_path):
    section = json.loads((reference / "fixtures" / "vae" / "config.json").read_text())["vae_config"]
    config = load(tmp_path, {"model": {"first_stage_config": section, "scale_factor": 0.7}})
    assert (config.vae.channels, config.vae.channel_multipliers, config.vae.scale_factor) == (
        32,
        [1, 1, 2, 1],
        0.7,
    )
    assert (config.vae.num_res_blocks, config.vae.z_channels) == (1, 16)


@pytest.mark.parametrize(
    "sampler, ours",
    [
        ("VPSDEDPMPP2MSampler", "dpmpp_2m_sde"),
        ("VPODEDPMPP2MSampler", "dpmpp_2m"),
        ("VideoDDIMSampler", "ddim"),
    ],
)
@pytest.mark.parametrize(
    "guider, guidance",
    [
        (
            {"target": "sgm.x.DynamicCFG", "params": {"scale": 6, "exp": 5, "num_steps": 30}},
            "DynamicTimestepGuidance",
        ),
        ({"target": "sgm.x.VanillaCFG", "params": {"scale": 6}}, "ConstantGuidance"),
    ],
)
def test_samplers_and_guidance_have_their_equivalents(sampler, ours, guider, guidance):
    params = {"num_steps": 30, "guider_config": guider}
    result = translate({"model": {"sampler_config": {"target": f"sgm.x.{sampler}", "params": params}}})
    assert result["sampler"] == {"target": f"cogvideox.diffusion.samplers.{ours}"}
    assert result["guidance"] == {
        "target": f"cogvideox.diffusion.guidance.{guidance}",
        "params": {"scale": 6},
    }
    assert result["sample"] == {"steps": 30}


def test_without_a_guider_there_is_no_guidance():
    result = translate(
        {"model": {"sampler_config": {"target": "sgm.x.VideoDDIMSampler", "params": {"num_steps": 9}}}}
    )
    assert result["guidance"]["params"] == {"scale": 1.0}


def test_interpolations_are_resolved_in_upstreams_own_names():
    steps = {"num_steps": 30, "guider_config": {"target": "sgm.x.DynamicCFG", "params": {"scale": 6}}}
    steps["guider_config"]["params"]["num_steps"] = "${model.sampler_config.params.num_steps}"
    assert translate({"model": {"sampler_config": {"target": "sgm.x.VideoDDIMSampler", "params": steps}}})


def test_a_file_of_this_project_can_be_put_after_one_of_upstreams(reference, tmp_path):
    overlay = tmp_path / "ours.yaml"
    overlay.write_text("train: {steps: 7}\nlora: {rank: 8}\n")
    config = load(tmp_path, published(reference, "v1.0", "5b", "sft"), overlay)
    assert (config.train.steps, config.train.batch_size, config.lora.rank) == (7, 2, 8)


def test_files_of_this_project_are_not_taken_for_upstreams():
    for path in CONFIGS.glob("*.yaml"):
        assert not is_upstream(yaml.safe_load(path.read_text())), path


@pytest.mark.parametrize(
    "tree",
    [
        {"args": {"seed": 1}},
        {"model": {"scale_factor": 0.7}},
        {"data": {"target": "data_video.SFTDataset"}},
        {"data": {"params": {"skip_frms_num": 3.0}}},
        {"deepspeed": {"optimizer": {"type": "sat.ops.FusedEmaAdam"}}},
    ],
)
def test_a_fragment_of_upstreams_is_recognised(tree):
    assert is_upstream(tree)


# ------------------------------------------------------------------------------------ what cannot be translated


def test_all_that_cannot_be_translated_is_named_in_one_error(reference):
    tree = published(reference, "v1.0", "5b", "sft")
    network = tree["model"]["network_config"]["params"]
    network["modules"]["pos_embed_config"] = {"target": "dit_video_concat.Basic2DPositionEmbeddingMixin"}
    network["use_SwiGLU"] = True
    network["my_own_key"] = 3
    tree["model"]["loss_fn_config"]["params"]["min_snr_value"] = 5
    tree["args"]["train_data"] = ["one", "two"]
    tree["args"]["my_arg"] = "x"
    tree["deepspeed"]["scheduler"] = {"type": "WarmupLR"}
    with pytest.raises(ConfigError) as error:
        translate(tree)
    for named in (
        "pos_embed_config.target=dit_video_concat.Basic2DPositionEmbeddingMixin",
        "use_SwiGLU=True",
        "network_config.params.my_own_key=3: not known",
        "min_snr_value=5",
        "args.train_data=['one', 'two']",
        "args.my_arg='x': not known",
        "deepspeed.scheduler=",
    ):
        assert named in str(error.value)


CHANGES = {
    "another sampler": (("model", "sampler_config", "target"), "sgm.x.EulerEDMSampler", "EDMSampler: no equivalent"),
    "a module of the user's": (("model", "network_config", "target"), "my_dit.Net", "target=my_dit.Net: no equivalent"),
    "another dataset": (("data", "target"), "data_video.VideoDataset", "data.target=data_video.VideoDataset"),
    "another optimizer": (("deepspeed", "optimizer", "type"), "Lamb", "deepspeed.optimizer.type=Lamb"),
    "tensor parallel": (("args", "model_parallel_size"), 2, "args.model_parallel_size=2"),
    "frozen prefixes": (("model", "not_trainable_prefixes"), ["all"], "not_trainable_prefixes=.'all'."),
    "two schedules": (
        ("model", "denoiser_config", "params", "discretization_config", "params", "shift_scale"),
        3.0,
        "different noise schedules",
    ),
    "encoder unlike decoder": (
        ("model", "first_stage_config", "params", "decoder_config", "params", "ch"),
        64,
        "differ in channels: 128 and 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("keys, value, message", CHANGES.values(), ids=CHANGES.keys())
def test_what_has_no_equivalent_is_named(reference, keys, value, message):
    tree = published(reference, "v1.0", "5b", "sft")
    node = tree
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    with pytest.raises(ConfigError, match=message):
        translate(tree)


def test_several_videos_of_one_prompt_are_refused_with_the_way_to_get_them():
    with pytest.raises(ConfigError, match="args.batch_size=4: .*repeat it in the prompt file"):
        translate({"args": {"mode": "inference", "batch_size": 4}})
