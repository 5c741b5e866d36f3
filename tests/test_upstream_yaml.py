"""YAML files of CogVideo's own sat/ folder: recognised, translated, and what cannot be translated is named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from upstream_files import MODELS, REMOVED, changed, inference_file, model_file, sft_file

import cogvideox
from cogvideox.config import Config, ConfigError, load_config
from cogvideox.engine.optim import deepspeed_config, learning_rate_factor
from cogvideox.upstream_yaml import is_upstream, translate

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NETWORK = "model.network_config.params"
POSITION = f"{NETWORK}.modules.pos_embed_config"
GUIDER = "model.sampler_config.params.guider_config"
TEXT = "model.conditioner_config.params.emb_models.0"
TIMESTEPS = "model.loss_fn_config.params.sigma_sampler_config.params"
OPTIMIZER = "deepspeed.optimizer.params"
SCHEDULES = [
    f"{path}.discretization_config.params"
    for path in ("model.denoiser_config.params", TIMESTEPS, "model.sampler_config.params")
]
RUNS = [(*model, method) for model in MODELS for method in ("sft", "inference")]


def files(line: str, model: str, method: str) -> dict[str, Any]:
    """A published model file merged with sft.yaml or inference.yaml."""
    return model_file(model) | (sft_file() if method == "sft" else inference_file(line))


def load(tmp_path: Path, *trees: dict[str, Any], overrides: list[str] | None = None) -> Config:
    paths = [tmp_path / f"{index}.yaml" for index in range(len(trees))]
    for path, tree in zip(paths, trees, strict=True):
        path.write_text(yaml.safe_dump(tree))
    return load_config(paths, overrides or [])


def at(config: Any, path: str) -> Any:
    """The value of a dotted path through dataclasses, mappings and lists."""
    for name in path.split("."):
        if isinstance(config, list):
            config = config[int(name)]
        else:
            config = config.get(name) if isinstance(config, dict) else getattr(config, name)
    return config


def leaves(node: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None or not node or isinstance(node, list) and not isinstance(node[0], dict):
        yield path, node
    else:
        for key, value in items:
            yield from leaves(value, (*path, key))


# ----------------------------------------------------------------------------------------------- published files


def test_the_files_of_these_tests_hold_every_key_and_value_of_the_published_ones(reference):
    ours: dict[str, dict[str, str]] = {}
    named = {f"{line}:{model}": model_file(model) for line, model in MODELS}
    named |= {f"{line}:sft": sft_file() for line in ("v1.0", "main")}
    named |= {f"{line}:inference": inference_file(line) for line in ("v1.0", "main")}
    for name, tree in named.items():
        for path, value in leaves(tree):
            key = ".".join(map(str, path)).replace("emb_models.0", "emb_models[0]")
            ours.setdefault(key, {})[name] = repr(value)
    table = (reference / "UPSTREAM_YAML.md").read_text()
    rows = re.findall(r"^\| ((?:model|args|data|deepspeed)\.\S+) \| (.*) \|$", table, flags=re.MULTILINE)
    assert {key for key, _ in rows} == ours.keys()
    for key, cell in rows:
        found = re.findall(r"`([^`]*)`(?: \(([^)]*)\))?", cell)
        values = [(repr(as_written(key, value)), where) for value, where in found]
        assert {value for value, _ in values} == set(ours[key].values()), key
        for value, where in values:
            for name in [n for n in where.split(", ") if ":" in n]:
                assert ours[key][name] == value, (key, name)


def as_written(key: str, value: str) -> Any:
    """A value of the table as the YAML file holds it."""
    if key == "args.load":
        return value  # a placeholder in braces, quoted in the file
    return float(value) if key.endswith(".lr") else yaml.safe_load(value)  # 0.00001 in the file


@pytest.mark.parametrize("line, model, method", RUNS)
def test_a_published_file_is_our_file_of_the_same_model(tmp_path, line, model, method):
    ours = load_config([CONFIGS / f"{MODELS[line, model]}.yaml"])
    theirs = load(tmp_path, files(line, model, method))
    if model.startswith("1.5"):  # the table of positions there, 300 x 300, is only an upper limit
        assert (theirs.model.transformer.latent_height, theirs.model.transformer.latent_width) == (300, 300)
        theirs.model.transformer.latent_height, theirs.model.transformer.latent_width = 96, 170
    assert theirs.model.transformer == ours.model.transformer
    assert theirs.model.schedule == ours.model.schedule
    assert theirs.model.timesteps == ours.model.timesteps
    assert (theirs.model.loss, theirs.model.offset_noise) == (ours.model.loss, 0)
    assert theirs.sampler == ours.sampler and theirs.guidance == ours.guidance
    for found, expected in zip(theirs.model.conditions, ours.model.conditions, strict=True):
        assert found.target == expected.target
        assert expected.params.items() <= found.params.items()
    ours.vae.encode_frames_per_pass = theirs.vae.encode_frames_per_pass  # upstream has no such choice
    assert theirs.vae == ours.vae
    assert theirs.load.vae.endswith("vae/3d-vae.pt") and theirs.load.transformer.endswith("/transformer")
    assert theirs.load.text_encoder.endswith("t5-v1_1-xxl")
    is_lora = model.endswith("lora")
    assert (theirs.lora is not None) == is_lora
    # A LoRA checkpoint of upstream's is a whole model, from which sampling takes both.
    assert theirs.load.lora == (theirs.load.transformer if is_lora and method == "inference" else None)
    if method == "inference":
        ours.sample.output_dir, ours.sample.prompt_file = "outputs", "configs/test.txt"
        if line == "main" and not model.startswith("1.5"):  # its inference.yaml is written for 1.5 models
            section = theirs.sample
            assert (section.num_frames, section.height, section.width, section.fps) == (85, 768, 1360, 16)
            section.num_frames, section.height, section.width, section.fps = 49, 480, 720, 8
        assert theirs.sample == ours.sample


@pytest.mark.parametrize("model", [model for line, model in MODELS if line == "main" and "lora" not in model])
def test_a_published_file_builds_the_network_of_its_model(tmp_path, model):
    base = MODELS["main", model]
    sides = []
    for config in (load(tmp_path, files("main", model, "sft")), load_config([CONFIGS / f"{base}.yaml"])):
        net = cogvideox.build_transformer(config, device="meta")
        sides.append({name: tuple(p.shape) for name, p in net.named_parameters()})
    assert sides[0] == sides[1]


def test_the_published_sft_file_is_translated_whole(tmp_path):
    config = load(tmp_path, files("v1.0", "5b_lora", "sft"))
    train, data = config.train, config.data
    assert (train.steps, train.batch_size, train.precision, train.gradient_clipping) == (1000, 2, "bf16", 0.1)
    assert train.optimizer.target == "torch.optim.AdamW"
    assert train.optimizer.params == {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-4}
    assert train.ema_decay == 0.9999  # FusedEmaAdam's own default
    assert (train.lr_schedule, train.warmup_steps) == ("linear", 10)  # SAT's defaults: 1 % of the steps
    assert (train.save_every, train.log_every) == (500, 20)
    assert (train.validate_every, train.validation_batches) == (100, 1)
    assert (data.path, data.num_frames, data.height, data.width, data.fps) == ("disney", 49, 480, 720, 8)
    assert data.params == {"skip_frames": 3} and data.num_workers == 8
    assert data.validation_path is None  # it names the training folder
    assert config.run.dir == "ckpts_5b_lora/lora-disney"
    assert config.deepspeed["zero_optimization"]["stage"] == 2
    assert config.deepspeed.keys() == {
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "wall_clock_breakdown",
    }
    assert (config.lora.rank, config.lora.alpha) == (128, 1.0)


@pytest.mark.parametrize("model, rank", [("2b_lora", 128), ("5b_lora", 128), ("5b_i2v_lora", 256)])
def test_the_published_lora_files_become_a_lora_section(tmp_path, model, rank):
    config = load(tmp_path, files("v1.0", model, "sft"))
    assert (config.lora.rank, config.lora.alpha) == (rank, 1.0)


def test_deepspeed_accepts_the_translated_section(tmp_path):
    import torch

    config = load(tmp_path, files("v1.0", "5b", "sft"))
    arguments = {"trainable": 10, "world_size": 1, "device": torch.device("cpu")}
    final = deepspeed_config(config.train, config.deepspeed, **arguments)
    assert final["bf16"]["enabled"] and final["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("style", ["linear", "cosine", "constant"])
def test_the_learning_rate_follows_sats_formula(tmp_path, style):
    """SAT's sat/training/learning_rates.py, with n steps done: after the warm-up of w, 1 - (n - w) / N, or
    r + (1 - r) (1 + cos(pi (n - w) / N)) / 2 with lr_decay_ratio r."""
    tree = changed(files("v1.0", "5b", "sft"), {"args.lr_decay_style": style, "args.warmup": 0.1})
    train = load(tmp_path, tree).train
    steps, warmup = 1000, 100
    assert (train.steps, train.warmup_steps) == (steps, warmup)
    for n in (100, 400, 999):
        p = (n - warmup) / steps
        theirs = {"linear": 1 - p, "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2, "constant": 1}[
            style
        ]
        ours = learning_rate_factor(
            n,
            steps=steps,
            schedule=train.lr_schedule,
            warmup_steps=train.warmup_steps,
            min_ratio=train.min_lr_ratio,
        )
        # SAT's cosine divides by all steps, ours by those after the warm-up: at most 0.9 * pi / 2 * 0.1 apart.
        assert ours == pytest.approx(theirs, abs=0.15 if style == "cosine" else 1e-12)


# ---------------------------------------------------------------------------------------------- users' variants

VARIANTS: dict[str, tuple[tuple[str, str, str], dict[str, Any], dict[str, Any]]] = {
    "another size": (
        ("v1.0", "5b", "sft"),
        {"data.params.video_size": [256, 384], "data.params.fps": 12, "data.params.max_num_frames": 81},
        {"data.height": 256, "data.width": 384, "data.fps": 12, "data.num_frames": 81, "sample.width": 384,
         "sample.num_frames": 81, "sample.fps": 12},
    ),
    "other data, held out": (
        ("v1.0", "5b", "sft"),
        {"args.train_data": "data/mine", "args.valid_data": ["data/kept"], "args.eval_iters": 5},
        {"data.path": "data/mine", "data.validation_path": "data/kept", "train.validation_batches": 5},
    ),
    "no weights to start from": (("v1.0", "5b", "sft"), {"args.load": REMOVED}, {"load.transformer": None}),
    "fp16": (
        ("v1.0", "2b", "sft"),
        {"deepspeed.bf16.enabled": False, "deepspeed.fp16.enabled": True, "deepspeed.fp16.loss_scale_window": 100},
        {"train.precision": "fp16", "vae.precision": "fp16", "sample.precision": "fp16",
         "model.conditions.0.params.dtype": "fp16", "deepspeed.fp16": {"loss_scale_window": 100}},
    ),
    "sampling in fp16": (
        ("v1.0", "2b", "inference"),
        {"args.bf16": REMOVED, "args.fp16": True},
        {"sample.precision": "fp16", "vae.precision": "fp16", "model.conditions.0.params.dtype": "fp16"},
    ),
    "sampling in neither": (
        ("v1.0", "2b", "inference"), {"args.bf16": REMOVED}, {"sample.precision": "fp32", "vae.precision": "fp32"},
    ),
    "training in neither": (("v1.0", "2b", "sft"), {"deepspeed.bf16": REMOVED}, {"train.precision": "fp32"}),
    "no clipping": (("v1.0", "5b", "sft"), {"deepspeed.gradient_clipping": REMOVED}, {"train.gradient_clipping": 0.0}),
    "accumulation": (
        ("v1.0", "5b", "sft"), {"deepspeed.gradient_accumulation_steps": 8}, {"train.gradient_accumulation_steps": 8},
    ),
    "offload, old spelling": (
        ("v1.0", "5b", "sft"),
        {"deepspeed.zero_optimization.cpu_offload": True},
        {"deepspeed.zero_optimization.offload_optimizer": {"device": "cpu"},
         "deepspeed.zero_optimization.cpu_offload": None},
    ),
    "offload, ZeRO-3": (
        ("v1.0", "5b", "sft"),
        {"deepspeed.zero_optimization.stage": 3, "deepspeed.zero_optimization.offload_param": {"device": "cpu"}},
        {"deepspeed.zero_optimization.stage": 3, "deepspeed.zero_optimization.offload_param": {"device": "cpu"}},
    ),
    "optimizer's defaults": (
        ("v1.0", "5b", "sft"),
        {f"{OPTIMIZER}.weight_decay": REMOVED, f"{OPTIMIZER}.lr": REMOVED, "args.lr": 3e-4},
        {"train.optimizer.params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}},
    ),
    "DeepSpeed's Adam, which decays like AdamW and keeps no average": (
        ("v1.0", "5b", "sft"), {"deepspeed.optimizer.type": "Adam"},
        {"train.optimizer.target": "torch.optim.AdamW", "train.ema_decay": None},
    ),
    "an average of its own": (("v1.0", "5b", "sft"), {f"{OPTIMIZER}.ema_decay": 0.99}, {"train.ema_decay": 0.99}),
    "seed and wandb": (
        ("v1.0", "5b", "sft"), {"args.seed": 7, "args.wandb": True}, {"seed": 7, "train.trackers": ["wandb"]},
    ),
    "a name, nowhere to save": (("v1.0", "5b", "sft"), {"args.save": REMOVED}, {"run.dir": "runs/lora-disney"}),
    "LoRA of some layers": (
        ("v1.0", "5b_lora", "sft"),
        {f"{NETWORK}.modules.lora_config.params": {"r": 64, "lora_alpha": 32, "layer_range": [0, 1]}},
        {"lora.rank": 64, "lora.alpha": 32, "lora.transformer_layers": [0, 1]},
    ),
    "offset noise": (
        ("v1.0", "5b", "sft"), {"model.loss_fn_config.params.offset_noise_level": 0.1}, {"model.offset_noise": 0.1},
    ),
    "independent time steps": (
        ("v1.0", "5b", "sft"),
        {f"{TIMESTEPS}.uniform_sampling": False},
        {"model.timesteps.target": "cogvideox.diffusion.timesteps.UniformTimesteps"},
    ),
    "SNR shift after the rescaling": (
        ("v1.0", "2b", "sft"),
        {f"{path}.post_shift": True for path in SCHEDULES},
        {"model.schedule.params": {"snr_shift": 3.0, "shift_after_rescale": True}},
    ),
    "SNR shift that keeps the start": (  # upstream's linear_start / (s + (1 - s) linear_start)
        ("v1.0", "2b", "sft"),
        {f"{path}.keep_start": True for path in SCHEDULES},
        {"model.schedule.params": {"snr_shift": 3.0, "linear_start": 0.00085 / (3 - 2 * 0.00085)}},
    ),
    "sampling with a file that also says how to train": (
        ("v1.0", "5b", "inference"), {"args.train_iters": 5, "args.train_data": ["x"]}, {"train": None, "data": None},
    ),
    "fewer steps": (
        ("v1.0", "5b", "inference"),
        {"model.sampler_config.params.num_steps": 30, f"{GUIDER}.params.num_steps": 30, f"{GUIDER}.params.exp": 3},
        {"sample.steps": 30, "guidance.params": {"scale": 6, "exponent": 3}},
    ),
    "image in every frame": (
        ("v1.0", "5b_i2v", "sft"),
        {"model.noised_image_all_concat": True, "model.noised_image_dropout": 0.2},
        {"model.conditions.1.params": {"dropout": 0.2, "dropout_per": "batch", "repeat": True}},
    ),
    "trained text encoder": (
        ("v1.0", "5b", "sft"),
        {"model.not_trainable_prefixes": ["first_stage_model"], f"{TEXT}.is_trainable": True},
        {"model.conditions.0.params": {"dropout": 0.1, "max_length": 226, "trainable": True, "dtype": "fp32"}},
    ),
    "text encoder that its prefix freezes": (
        ("v1.0", "5b", "sft"),
        {f"{TEXT}.is_trainable": True},
        {"model.conditions.0.params": {"dropout": 0.1, "max_length": 226, "dtype": "bf16"}},
    ),
    "another network": (
        ("v1.0", "5b", "sft"),
        {f"{NETWORK}.num_layers": 2, f"{NETWORK}.hidden_size": 128, f"{NETWORK}.num_attention_heads": 2,
         f"{NETWORK}.time_embed_dim": REMOVED, f"{POSITION}.params.theta": 5000},
        {"model.transformer.hidden_size": 128, "model.transformer.time_embed_dim": 128,
         "model.transformer.position.params": {"theta": 5000}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("run, keys, expected", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_users_variant_is_translated(tmp_path, run, keys, expected):
    config = load(tmp_path, changed(files(*run), keys))
    assert {path: at(config, path) for path in expected} == expected


@pytest.mark.parametrize(
    "line, latents, frames", [("v1.0", 13, 49), ("v1.0", 9, 33), ("main", 22, 81), ("main", 42, 161)]
)
def test_sampling_num_frames_counts_latents_and_the_padding_of_1_5(tmp_path, line, latents, frames):
    tree = files(line, "5b" if line == "v1.0" else "1.5_5b", "inference")
    tree["args"]["sampling_num_frames"] = latents
    assert load(tmp_path, tree).sample.num_frames == frames
    # The same from inference.yaml alone, put after a model file of this project.
    assert translate({"args": tree["args"]})["sample"]["num_frames"] == frames


def test_a_hub_id_of_t5_stays_one_and_a_folder_stays_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = files("main", "1.5_5b", "inference")
    assert load(tmp_path, tree).load.text_encoder == "hf://google/t5-v1_1-xxl"
    (tmp_path / "google" / "t5-v1_1-xxl").mkdir(parents=True)
    assert load(tmp_path, tree).load.text_encoder == "google/t5-v1_1-xxl"


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


@pytest.mark.parametrize("guider", [None, {"target": "sgm.x.IdentityGuider"}])
def test_without_a_guider_there_is_no_guidance(guider):
    params = {"num_steps": 9} | ({"guider_config": guider} if guider else {})
    result = translate({"model": {"sampler_config": {"target": "sgm.x.VideoDDIMSampler", "params": params}}})
    assert result["guidance"]["params"] == {"scale": 1.0}


def test_interpolations_are_resolved_in_upstreams_own_names():
    steps = {"num_steps": 30, "guider_config": {"target": "sgm.x.DynamicCFG", "params": {"scale": 6}}}
    steps["guider_config"]["params"]["num_steps"] = "${model.sampler_config.params.num_steps}"
    assert translate({"model": {"sampler_config": {"target": "sgm.x.VideoDDIMSampler", "params": steps}}})


# -------------------------------------------------------------------------------------- in company, and in part


def test_overlays_and_overrides_of_this_project_may_follow(tmp_path):
    overlay = {"train": {"steps": 7}, "lora": {"rank": 8}, "sampler": "cogvideox.diffusion.samplers.ddim"}
    config = load(tmp_path, model_file("5b"), sft_file(), overlay, overrides=["train.batch_size=1", "seed=3"])
    assert (config.train.steps, config.train.batch_size, config.lora.rank, config.seed) == (7, 1, 8, 3)
    assert config.sampler.target.endswith("ddim") and config.train.gradient_clipping == 0.1


def test_upstreams_training_file_goes_with_a_model_file_of_this_project(tmp_path, caplog):
    ours = yaml.safe_load((CONFIGS / "cogvideox_2b.yaml").read_text())
    config = load(tmp_path, ours, sft_file())
    assert config.model == load(tmp_path, ours).model and config.train.steps == 1000
    assert "args.checkpoint_activations: model.transformer.checkpoint_activations switches it" in caplog.text


def test_later_files_win_whichever_they_are(tmp_path):
    ours = yaml.safe_load((CONFIGS / "cogvideox_5b.yaml").read_text())
    sft = changed(sft_file(), {"data.params.video_size": [256, 384]})
    last = {"data": {"width": 512}}
    config = load(tmp_path, ours, sft, last)
    assert (config.data.height, config.data.width, config.sample.height) == (256, 512, 480)


def test_upstreams_own_overlay_changes_a_target_and_keeps_its_params(tmp_path):
    overlay = changed({}, {"model.sampler_config.target": "sgm.x.VideoDDIMSampler"})
    config = load(tmp_path, model_file("5b"), inference_file("v1.0"), overlay)
    assert config.sampler.target.endswith("ddim")
    assert (config.sample.steps, config.guidance.params) == (50, {"scale": 6})


def test_the_order_of_upstreams_files_decides_as_there(tmp_path):
    sft = changed(sft_file(), {"args.load": "base/transformer"})
    inference = changed(inference_file("v1.0"), {"args.load": "mine/transformer"})
    assert load(tmp_path, model_file("5b"), sft, inference).load.transformer == "mine/transformer"
    assert load(tmp_path, model_file("5b"), inference, sft).load.transformer == "base/transformer"


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
    assert config.vae.channels == 32 and config.vae.channel_multipliers == [1, 1, 2, 1]
    assert (config.vae.num_res_blocks, config.vae.z_channels, config.vae.scale_factor) == (1, 16, 0.7)


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


# ------------------------------------------------------------------------------------------ what has no meaning


@pytest.mark.parametrize("run", [("v1.0", "5b_i2v_lora", "sft"), ("main", "1.5_5b_i2v", "inference")])
def test_no_key_of_a_published_file_can_be_changed_unnoticed(run, caplog):
    """Each leaf in turn gets a value that nobody translates: it changes the result, is refused, or was reported."""
    tree = files(*run)
    plain, silent = translate(tree), []
    for path, value in leaves(tree):
        name = ".".join(map(str, path))
        caplog.clear()
        try:
            same = translate(changed(tree, {name: not value if isinstance(value, bool) else 31337})) == plain
        except ConfigError:
            continue
        parents = [name.rsplit(".", n)[0] for n in range(4)]
        if same and not any(parent in caplog.text for parent in parents):
            silent.append(name)
    assert silent == []


LISTED = {
    "misplaced loss scale": ({}, "deepspeed.loss_scale, .*deepspeed.min_loss_scale: stands outside fp16:"),
    "validation on the training clips": ({}, "args.valid_data: it is the training folder"),
    "key of nobody's under args": ({"args.my_arg": 1}, "args.my_arg: CogVideo's published code does not read it"),
    "misspelt argument": ({"args.train_iter": 5}, r"args.train_iter \(did you mean train_iters\?\)"),
    "key of nobody's under model": ({"model.my_loss.weight": 1}, "model.my_loss.weight"),
    "key of nobody's under data": ({"data.shuffle": True}, "data.shuffle"),
    "key of nobody's under deepspeed": ({"deepspeed.clip": 1}, "deepspeed.clip: is no key of its top level"),
    "section of nobody's": ({"lightning.devices": 8}, "lightning.devices"),
    "another learning rate under args": ({"args.lr": 1.0}, "args.lr: the section deepspeed decides"),
    "another batch size under args": ({"args.batch_size": 64}, "args.batch_size: the section deepspeed decides"),
    "printing": ({"deepspeed.steps_per_print": 3}, "deepspeed.steps_per_print: train.log_every"),
    "bound ranks": ({}, "With another effect here:\n(.*\n)*.*uniform_sampling: upstream ties each rank"),
    "finetune's slow start": ({}, "args.mode: .*5 % of its value in the first 100 steps"),
}  # fmt: skip


@pytest.mark.parametrize("keys, message", LISTED.values(), ids=LISTED.keys())
def test_what_has_no_meaning_is_listed_with_the_reason(caplog, keys, message):
    plain = translate(files("v1.0", "5b", "sft"))
    assert translate(changed(files("v1.0", "5b", "sft"), keys)) == plain
    assert re.search(message, caplog.records[-1].getMessage())
    assert len(caplog.records) == 2  # one list per translation


def test_only_one_rank_lists_what_has_no_meaning(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    translate(files("v1.0", "5b", "sft"))
    assert not caplog.records


@pytest.mark.parametrize("empty", ["args", "data", "deepspeed", "model", "model.network_config.params",
                                   "model.conditioner_config.params", GUIDER])  # fmt: skip
def test_an_empty_section_says_nothing(empty):
    assert isinstance(translate(changed(files("v1.0", "5b", "inference"), {empty: None})), dict)


def test_the_prompt_file_is_read_where_upstream_reads_it(caplog):
    sample = translate(files("v1.0", "5b", "inference"))["sample"]
    assert sample["prompt_file"] == "configs/test.txt"
    asked = translate(changed(files("v1.0", "5b", "inference"), {"args.input_type": "cli"}))["sample"]
    assert "prompt_file" not in asked
    assert "args.input_file" in caplog.text and "standard input" in caplog.text


def test_all_that_cannot_be_translated_is_named_in_one_error():
    keys = {
        f"{POSITION}": {
            "target": "dit_video_concat.Basic2DPositionEmbeddingMixin",
            "params": {"text_length": 226},
        },
        f"{NETWORK}.use_SwiGLU": True,
        f"{NETWORK}.my_own_key": 3,
        "model.loss_fn_config.params.min_snr_value": 5,
        "args.train_data": ["one", "two"],
        "deepspeed.scheduler": {"type": "WarmupLR"},
    }
    with pytest.raises(ConfigError) as error:
        translate(changed(files("v1.0", "5b", "sft"), keys))
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == len(keys)
    for named in (
        "pos_embed_config.target=dit_video_concat.Basic2DPositionEmbeddingMixin",
        "use_SwiGLU=True",
        "network_config.params.my_own_key=3: not known",
        "min_snr_value=5",
        "args.train_data=['one', 'two']",
        "deepspeed.scheduler=",
    ):
        assert sum(named in line for line in lines) == 1


REFUSED = {
    "an EDM sampler": (
        {"model.sampler_config.target": "sgm.x.EulerEDMSampler"},
        r"EulerEDMSampler: no equivalent here \(known: VPSDE.*infinite where CogVideoX starts",
    ),
    "EDM time steps": ({"model.loss_fn_config.params.sigma_sampler_config.target": "sgm.x.EDMSampling"}, "EDMSampling"),
    "another guidance": ({f"{GUIDER}.target": "sgm.x.LinearDynamicCFG"}, "LinearDynamicCFG.*guidance of your own"),
    "guidance over other steps": ({f"{GUIDER}.params.num_steps": 30}, "num_steps=30: sampler_config has num_steps=50"),
    "2-D positions": (
        {f"{POSITION}.target": "dit_video_concat.Basic2DPositionEmbeddingMixin"}, "the same for every frame",
    ),
    "a module of the user's": ({"model.network_config.target": "my_dit.Net"}, "target=my_dit.Net: no equivalent"),
    "web datasets": ({"data.target": "data_video.VideoDataset"}, "data.target=data_video.VideoDataset.*unpack them"),
    "a dataset of the user's": ({"data.target": "my_data.Mine", "data.params.root": "x"}, "data.target=my_data.Mine"),
    "another optimizer": ({"deepspeed.optimizer.type": "Lamb"}, "deepspeed.optimizer.type=Lamb"),
    "decay in the gradient": ({f"{OPTIMIZER}.adam_w_mode": False}, "weight decay is decoupled"),
    "tensor parallel": ({"args.model_parallel_size": 2}, "args.model_parallel_size=2"),
    "frozen prefixes": ({"model.not_trainable_prefixes": ["all"]}, "not_trainable_prefixes=.'all'."),
    "two schedules": ({f"{SCHEDULES[0]}.shift_scale": 3.0}, "different noise schedules"),
    "encoder unlike decoder": (
        {"model.first_stage_config.params.decoder_config.params.ch": 64}, "differ in channels: 128 and 64",
    ),
    "both half precisions": ({"deepspeed.fp16.enabled": True}, "only one of them can be true"),
    "yes as a text": ({"deepspeed.bf16.enabled": "auto"}, "deepspeed.bf16.enabled='auto': expected true or false"),
    "epochs": ({"args.epochs": 3}, "args.epochs=3: .*set args.train_iters"),
    "a word for a number": ({f"{OPTIMIZER}.lr": "fast"}, "optimizer.params.lr='fast': expected a number"),
    "a split": ({"args.split": "9,1,0", "args.valid_data": REMOVED}, "args.split=9,1,0: .*args.valid_data"),
    "a second text encoder": (
        {"model.conditioner_config.params.emb_models.1.target": "sgm.x.FrozenCLIPEmbedder"}, "emb_models.1: one text",
    ),
    "no temporal padding": ({f"{NETWORK}.patch_size": [2, 2]}, r"patch_size=\[2, 2\]: expected a number or"),
    "misspelt in a part": ({f"{NETWORK}.hidden_sizes": 3}, "hidden_sizes=3: not known; did you mean hidden_size?"),
    "a section of this project's": ({"train.steps": 3}, "train.steps=3: .*file of its own"),
}  # fmt: skip


@pytest.mark.parametrize("keys, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_would_change_the_result_is_refused_by_name(keys, message):
    with pytest.raises(ConfigError, match=message):
        translate(changed(files("v1.0", "5b", "sft"), keys))


def test_lora_that_also_trains_its_base_is_refused():
    keys = {"model.not_trainable_prefixes": ["first_stage_model", "conditioner"]}
    with pytest.raises(ConfigError, match="adapters and base weights together"):
        translate(changed(files("v1.0", "5b_lora", "sft"), keys))


def test_several_videos_of_one_prompt_are_refused_with_the_way_to_get_them():
    with pytest.raises(ConfigError, match="args.batch_size=4: .*repeat it in the prompt file"):
        translate({"args": {"mode": "inference", "batch_size": 4}})
