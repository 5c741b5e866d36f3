"""What a demo consists of: how much of everything, the prompts, the folders, and the command of each stage."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox.config import Config, load_config
from cogvideox.data import moving_shapes
from cogvideox.data.moving_shapes import DIRECTIONS, NEW_COLOURS, SHAPES, Combination, combinations
from scripts.demo.clips import draw_and_check
from scripts.demo.stage import Stage
from scripts.demo.vae import reconstruct

VAE, T2V, LORA = Path("configs/tiny_vae.yaml"), Path("configs/tiny_t2v.yaml"), Path("configs/lora.yaml")

# Each rank holds some 0.8 GiB (libraries, mostly), and the demo is meant to stay below 6 GiB.
MAX_RANKS = 4
# train.batch_size of the tiny files is per rank, for two ranks: other rank counts keep the global batch, if they can.
RANKS_OF_FILES = 2
LORA_GLOBAL_BATCH = 16
# configs/lora.yaml is for billions of parameters in bf16.
LORA_OVERRIDES = (
    "lora.rank=16",
    "lora.alpha=16",
    "train.precision=fp32",
    "train.gradient_clipping=1.0",
    "train.optimizer.params.lr=2e-3",
)
SEED = 1
# Prompts whose videos are rendered while the transformer trains, and steps between them.
PREVIEWS, PREVIEW_EVERY = 3, 700


@dataclass(frozen=True)
class Scale:
    """How much one demo does. The defaults are those of ``make demo``."""

    clips: int = 24
    # Training clips per combination.
    vae_clips: int = 12
    # Of the VAE's own training set.
    few_clips: int = 2
    # Clips per combination of the validation, the held-out and the LoRA set.
    num_frames: int | None = None
    # None: as in the YAML files.
    step_factor: float = 1.0
    # Times train.steps of the YAML files.
    lora_steps: int = 400
    sample_steps: int | None = None
    # None: as in the YAML file.
    repeats: int = 3
    # Samples of each held-out and each LoRA prompt. Each of the (more numerous) seen prompts is sampled once.
    max_combinations: int = 36
    # Of each set: there are 36 seen, 12 held-out, 12 new ones.


SCALES = {
    "normal": Scale(),
    "long": Scale(num_frames=17, step_factor=3.0, lora_steps=1000),
    "quick": Scale(
        clips=4,
        vae_clips=4,
        few_clips=4,
        step_factor=0.002,
        lora_steps=3,
        sample_steps=2,
        repeats=1,
        max_combinations=4,
    ),
}


@dataclass(frozen=True)
class Demo:
    """The prompts, folders and commands of one demo."""

    output: Path
    scale: Scale
    ranks: int

    @functools.cached_property
    def seen(self) -> list[Combination]:
        return spread(combinations()[0], self.scale.max_combinations)

    @functools.cached_property
    def held_out(self) -> list[Combination]:
        return spread(combinations()[1], self.scale.max_combinations)

    @functools.cached_property
    def new(self) -> list[Combination]:
        """The concept of the LoRA: a colour that no clip of the base model has."""
        every = [Combination(c, s, d) for c in NEW_COLOURS for s in SHAPES for d in DIRECTIONS]
        return spread(every, self.scale.max_combinations)

    @functools.cached_property
    def prompts(self) -> dict[str, list[Combination]]:
        """Model -> what it is asked for, one per line of its prompt file."""
        new = self.new * self.scale.repeats
        return {
            "trained": self.seen + self.held_out * self.scale.repeats + new,
            "lora": new,
            "untrained": self.seen,
        }

    @functools.cached_property
    def config(self) -> Config:
        """Of the text-to-video model. The VAE trains on shorter pieces of such clips."""
        return load_config([T2V], self._clip_overrides())

    def data(self, name: str) -> Path:
        return self.output / "data" / name

    def true_clips(self, *names: str) -> list[Path]:
        """The drawn videos of these data sets."""
        return [path for name in names for path in sorted((self.data(name) / "videos").glob("*.mp4"))]

    def run(self, name: str) -> Path:
        return self.output / "runs" / name

    def samples(self, name: str) -> Path:
        return self.output / "samples" / name

    def prompt_file(self, name: str) -> Path:
        return self.output / "prompts" / f"{name}.txt"

    def write_prompt_files(self) -> None:
        for name, wanted in self.prompts.items():
            self.prompt_file(name).parent.mkdir(parents=True, exist_ok=True)
            self.prompt_file(name).write_text("".join(f"{combination.caption}\n" for combination in wanted))

    # -------------------------------------------------------------------------------------------------- stages

    def clips_stage(self) -> Stage:
        return Stage(
            name="clips",
            title="1/6 drawing the clips and checking them",
            action=lambda: draw_and_check(self),
            folder=self.output / "data",
            settings=repr(self.scale),
            inputs=[Path(moving_shapes.__file__), T2V],
        )

    def vae_stage(self, clips: Stage) -> Stage:
        overrides = [
            f"data.path={self.data('vae')}",
            f"data.validation_path={self.data('validation')}",
            *self._training_overrides(VAE),
            f"train.precision={'bf16' if has_bf16_instructions() else 'fp32'}",
        ]
        return self._training_stage("vae", "2/6 training the VAE", [VAE], overrides, after=[clips])

    def reconstruction_stage(self, vae: Stage) -> Stage:
        return Stage(
            name="reconstruction",
            title="3/6 true clips through the VAE: the scale of its latents, and the best that samples can be",
            action=lambda: reconstruct(self),
            folder=self.samples("reconstructed"),
            after=[vae],
        )

    def generation_stages(self, reconstruction: Stage, scale_factor: float) -> list[Stage]:
        """Transformer, LoRA, samples. scale_factor: ``vae.scale_factor`` as measured on the trained VAE."""
        vae = [f"vae.scale_factor={scale_factor:.4g}", f"load.vae={self.run('vae')}"]
        model = [*self._clip_overrides(), *vae]
        base = [f"load.transformer={self.run('t2v')}", f"load.text_encoder={self.run('t2v')}"]
        cache = f"data.latent_cache={self.output / 'latents'}"

        transformer = self._training_stage(
            "t2v",
            "4/6 training the transformer (and its text encoder)",
            [T2V],
            [
                f"data.path={self.data('train')}",
                f"data.validation_path={self.data('validation')}",
                cache,
                *model,
                *self._training_overrides(T2V),
                *self._preview_overrides(),
            ],
            after=[reconstruction],
        )
        lora = self._training_stage(
            "lora",
            f"5/6 fine-tuning with LoRA on a new colour, {', '.join(NEW_COLOURS)}",
            [T2V, LORA],
            [
                f"data.path={self.data('lora')}",
                cache,
                *model,
                *base,
                *LORA_OVERRIDES,
                f"train.steps={self.scale.lora_steps}",
                f"train.batch_size={LORA_GLOBAL_BATCH // self.ranks}",
            ],
            after=[transformer],
        )
        return [
            transformer,
            lora,
            self._sampling_stage("trained", [*model, *base], after=[transformer]),
            self._sampling_stage("lora", [*model, *base, f"load.lora={self.run('lora')}"], after=[lora]),
            self._sampling_stage(
                "untrained", [*model, base[1], "load.transformer=null"], after=[transformer]
            ),
        ]

    def _training_stage(
        self, name: str, title: str, files: Sequence[Path], overrides: Sequence[str], after: Sequence[Stage]
    ) -> Stage:
        arguments = ["--base", *map(str, files), f"run.dir={self.run(name)}", *overrides]
        command = self._torchrun("train_video.py", *arguments)
        return Stage(
            name, title, command, self.run(name), inputs=files, after=after, environment=self.environment
        )

    def _sampling_stage(self, name: str, overrides: Sequence[str], after: Sequence[Stage]) -> Stage:
        prompts, folder = self.prompt_file(name), self.samples(name)
        if self.scale.sample_steps is not None:
            overrides = [*overrides, f"sample.steps={self.scale.sample_steps}"]
        where = ["--prompt-file", str(prompts), "--output-dir", str(folder), "--seed", str(SEED)]
        return Stage(
            name=f"sample_{name}",
            title=f"6/6 sampling {len(self.prompts[name])} videos, {name} model",
            action=self._torchrun("sample_video.py", "--base", str(T2V), *overrides, *where),
            folder=folder,
            inputs=[T2V, prompts],
            after=after,
            environment=self.environment,
        )

    def _torchrun(self, *arguments: str) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        return [sys.executable, *launcher, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        # The demo is a CPU demo on every machine: two ranks cannot share one GPU.
        return {"OMP_NUM_THREADS": str(max(1, available_cores() // self.ranks)), "CUDA_VISIBLE_DEVICES": ""}

    def _clip_overrides(self) -> list[str]:
        if self.scale.num_frames is None:
            return []
        keys = ("data.num_frames", "sample.num_frames", "model.transformer.num_frames")
        return [f"{key}={self.scale.num_frames}" for key in keys]

    def _preview_overrides(self) -> list[str]:
        """Videos of a few prompts in the transformer's own report: how they come about."""
        captions = ", ".join(combination.caption for combination in spread(self.seen, PREVIEWS))
        every = max(1, round(PREVIEW_EVERY * self.scale.step_factor))
        return [f"train.preview_prompts=[{captions}]", f"train.preview_every={every}"]

    def _training_overrides(self, file: Path) -> list[str]:
        section = load_config([file]).train
        overrides = []
        if self.scale.step_factor != 1.0:
            overrides.append(f"train.steps={max(1, round(section.steps * self.scale.step_factor))}")
        if self.ranks != RANKS_OF_FILES:
            overrides.append(f"train.batch_size={max(1, section.batch_size * RANKS_OF_FILES // self.ranks)}")
        return overrides


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` items, evenly from first to last."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies in bf16: the VAE then trains 1.4 times as fast; elsewhere it would be far slower."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and bool({"avx512_bf16", "amx_bf16"} & set(cpuinfo.read_text().split()))


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_ranks(cores: int) -> int:
    """The largest power of two that the cores and MAX_RANKS allow: the global batch must divide by it."""
    ranks = 1
    while ranks * 2 <= min(cores, MAX_RANKS):
        ranks *= 2
    return ranks
