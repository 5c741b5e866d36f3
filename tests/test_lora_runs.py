"""A LoRA on eight bits from end to end: trained, resumed, known, exported, merged, with its average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import train_video
from cogvideox.command_line import run_door
from cogvideox.config import load_config
from cogvideox.convert.lora import write_lora
from cogvideox.data.moving_shapes import combinations, make_dataset
from cogvideox.engine.logging import read_metrics
from cogvideox.sampling.video_io import write_video
from cogvideox.system import VideoDiffusion
from cogvideox.weights.identify import identify
from cogvideox.weights.lora.file import read_lora

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BASES = [CONFIGS / "tiny_t2v.yaml", CONFIGS / "lora.yaml"]
SMALL = ["model.transformer.num_layers=1", "model.conditions.0.params.config.num_layers=1"]

# LoRA+ (Hayou et al. 2024) as docs/optimizers.md shows it, Muon, min-SNR, patterns, rsLoRA, an int8 base, an average.
METHOD = """
model:
  loss: min_snr
lora:
  rank: 4
  alpha: 4.0
  layers: ["attention.*", "adaLN_modulations.*", "final_layer.linear"]
  rank_pattern: {"adaLN_modulations.*": 2}
  rslora: true
  quantize_base: int8
train:
  precision: bf16
  ema_decay: 0.5
  optimizer: {target: muon, params: {lr: 1.0e-2}}
  groups:
    - {pattern: "*.matrix_B.*", lr_scale: 16}
"""


def train(folder: Path, *overrides: str) -> int:
    files = [*BASES, folder / "method.yaml"]
    fixed = [
        *SMALL,
        f"data.path={folder / 'clips'}",
        "train.log_every=1",
        "train.batch_size=2",
        "train.warmup_steps=0",
    ]
    return run_door(train_video.main, ["--traceback", "--base", *map(str, files), *fixed, *overrides])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One base model, and a run on it: 4 steps at once, and 2 + 2."""
    root = tmp_path_factory.mktemp("lora_runs")
    make_dataset(root / "clips", combinations()[0][:4], 1, seed=0, write_video=write_video)
    (root / "method.yaml").write_text(METHOD)
    config = load_config([CONFIGS / "tiny_t2v.yaml"], SMALL)
    system = VideoDiffusion(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in system.transformer.parameters():  # so that no layer starts at zero
            value.add_(0.02 * torch.randn(value.shape, generator=generator))
    torch.save({"module": {f"model.diffusion_model.{k}": v for k, v in system.transformer.state_dict().items()}},
               root / "base.pt")  # fmt: skip
    base = f"load.transformer={root / 'base.pt'}"
    assert train(root, base, f"run.dir={root / 'whole'}", "train.steps=4", "train.save_every=4") == 0
    for steps in (2, 4):
        assert (
            train(root, base, f"run.dir={root / 'half'}", f"train.steps={steps}", "train.save_every=2") == 0
        )
    return root


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / "4" / "mp_rank_00_model_states.pt"
    return torch.load(path, weights_only=False)["module"]


def test_the_checkpoint_holds_the_adapters_and_resumes_bit_for_bit(root: Path) -> None:
    whole, half = matrices(root / "whole"), matrices(root / "half")
    assert whole.keys() == half.keys() and all(
        torch.equal(value, half[name]) for name, value in whole.items()
    )
    assert all(".matrix_A." in name or ".matrix_B." in name for name in whole)
    assert {len(v) for k, v in whole.items() if "adaLN_modulations.0" in k and "matrix_A" in k} == {2}
    losses = [
        [r["train/loss"] for r in read_metrics(root / run / "metrics.jsonl")] for run in ("whole", "half")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert all("train/loss/unweighted" in r for r in read_metrics(root / "whole" / "metrics.jsonl"))


def test_the_average_holds_the_adapters_alone_and_is_what_is_read(root: Path) -> None:
    folder = root / "whole" / "checkpoints" / "4"
    with safe_open(folder / "ema_rank_00.safetensors", "pt") as file:
        average = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert average.keys() == matrices(root / "whole").keys()
    averaged, last = read_lora(root / "whole"), read_lora(root / "whole", ema=False)
    name = "model.diffusion_model.transformer.layers.0.attention.dense.matrix_B.0"
    assert torch.equal(averaged.modules["transformer_blocks.0.attn1.to_out.0"].up, average[name])
    assert not torch.equal(averaged.modules["transformer_blocks.0.attn1.to_out.0"].up, last.modules[
        "transformer_blocks.0.attn1.to_out.0"].up.float())  # fmt: skip


def test_the_run_is_known_and_its_scales_are_those_of_training(root: Path) -> None:
    info = identify(root / "whole")
    assert info.family == "lora" and info.lora_ranks == [2, 4]
    file = read_lora(root / "whole")
    assert file.modules["proj_out"].scale == pytest.approx(4 / 4**0.5)
    assert file.modules["transformer_blocks.0.norm1.linear"].scale == pytest.approx(4 / 2**0.5)
    config = yaml.safe_load((root / "whole" / "config.yaml").read_text())
    assert config["lora"]["rank_pattern"] == {"adaLN_modulations.*": 2}


def test_it_is_exported_and_merged_into_the_weights_before_they_were_rounded(root: Path) -> None:
    """Sampling loads base and LoRA: the merged weights are W + scale B A, and W has all its bits."""
    exported = write_lora(
        read_lora(root / "whole"), root / "a.safetensors", "diffusers", alpha_mode="metadata"
    )
    for lora in (root / "whole", exported):
        config = load_config(
            [CONFIGS / "tiny_t2v.yaml"], [*SMALL, f"load.transformer={root / 'base.pt'}", f"load.lora={lora}"]
        )
        system = VideoDiffusion(config)
        system.load_weights()
        base = torch.load(root / "base.pt")["module"]
        key = "transformer.layers.0.attention.dense.weight"
        part = read_lora(root / "whole").modules["transformer_blocks.0.attn1.to_out.0"]
        expected = base[f"model.diffusion_model.{key}"] + 2.0 * part.up @ part.down
        torch.testing.assert_close(system.transformer.state_dict()[key], expected, atol=1e-6, rtol=1e-6)
