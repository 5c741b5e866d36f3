"""What the cache tests share: a frozen T5 and a VAE in files, a configuration over them, and the doors."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

import train_video
from cogvideox.command_line import run_door
from cogvideox.config import Config, load_config
from cogvideox.engine.logging import read_metrics
from cogvideox.system_vae import build_vae
from scripts import cache_latents

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "sample"
TINY = ROOT / "configs" / "tiny_t2v.yaml"
FROZEN = """
model:
  transformer: {num_layers: 1}
  conditions:
    - target: cogvideox.conditioning.text.TextCondition
      params: {max_length: 32, dropout: 0.1, tokenizer: byt5}
train: {batch_size: 1, steps: 3, save_every: 100, log_every: 1, ema_decay: null}
"""
T5 = dict(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=384, dropout_rate=0.0)


class Materials:
    """Files of a small model below ``folder``, and command lines that use them."""

    def __init__(self, folder: Path):
        from transformers import T5Config, T5EncoderModel

        self.folder = folder
        self.overlay, self.vae, self.t5 = folder / "frozen.yaml", folder / "vae.safetensors", folder / "t5"
        self.overlay.write_text(FROZEN)
        self.make_vae(self.vae, seed=7)
        torch.manual_seed(7)
        T5EncoderModel(T5Config(**T5)).save_pretrained(self.t5)
        for path in [self.vae, *self.t5.iterdir()]:
            # Older than two seconds, as files are that are not being written: their digests are remembered.
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))

    @staticmethod
    def make_vae(path: Path, seed: int) -> None:
        torch.manual_seed(seed)
        save_file(build_vae(load_config([TINY])).state_dict(), path)

    def arguments(self, *overrides: str, data: Path = SAMPLE) -> list[str]:
        known = [f"data.path={data}", f"load.vae={self.vae}", f"load.text_encoder={self.t5}"]
        return ["--base", str(TINY), str(self.overlay), *known, *map(str, overrides)]

    def config(self, *overrides: str, data: Path = SAMPLE) -> Config:
        arguments = self.arguments(*overrides, data=data)
        return load_config(arguments[1:3], arguments[3:])

    def cached(self, root: Path) -> list[str]:
        return [f"data.latent_cache={root}", f"data.text_cache={root}"]

    def train(self, run: Path, *overrides: str, data: Path = SAMPLE) -> list[float]:
        """The losses of a run, each step's."""
        arguments = self.arguments(f"run.dir={run}", *overrides, data=data)
        assert run_door(train_video.main, ["--traceback", *arguments]) == 0
        return [r["train/loss"] for r in read_metrics(run / "metrics.jsonl") if "train/loss" in r]

    def fill(self, *arguments: str, data: Path = SAMPLE) -> int:
        return run_door(cache_latents.main, self.arguments(*arguments, data=data))


def entries(root: Path, kind: str = "latents") -> list[Path]:
    return sorted(p for p in root.glob(f"{kind}-*/**/*.safetensors") if not p.name.startswith("."))
