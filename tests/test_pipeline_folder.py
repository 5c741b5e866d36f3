"""A converted pipeline folder is opened by diffusers' own pipeline class, which samples what this project samples."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipeline_case as case
import pytest
import torch
from torch import Tensor

import cogvideox
from cogvideox.diffusion.samplers import noise_source
from cogvideox.system import VideoDiffusion
from cogvideox.weights.files.headers import read_headers
from cogvideox.weights.load import load_transformer, load_vae
from scripts.convert_weights import main as convert

KINDS = list(case.KINDS)
PROMPT, NEGATIVE = case.PROMPTS[:2]
STEPS, SCALE = 2, 2.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """kind -> (SAT folder, the diffusers folder made from it, the SAT folder made from that)."""
    pytest.importorskip("diffusers")
    root, made = tmp_path_factory.mktemp("pipelines"), {}

    def of(kind: str) -> tuple[Path, Path, Path]:
        if kind not in made:
            sat = case.write_sat(root / kind / "sat", kind)
            config = case.write_config(root / kind / "model.yaml", kind)
            there, back = root / kind / "diffusers", root / kind / "back"
            # No tensor tells a tiny network's native size. Small models are verified by default.
            assert convert([str(sat), str(there), "--to", "diffusers", "--config", str(config)]) == 0
            assert convert([str(there), str(back), "--to", "sat", "--no-verify"]) == 0
            made[kind] = sat, there, back
        return made[kind]

    return of


@pytest.fixture
def pipeline(folders, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], Any]]:
    """kind -> diffusers' pipeline of the converted folder, opened without a word of warning."""
    import diffusers
    import transformers

    # Both libraries log to handlers of their own; this lets caplog see it.
    libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [library.propagate for library in libraries]
    diffusers.logging.enable_propagation()
    transformers.logging.enable_propagation()

    def of(kind: str) -> Any:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error", UserWarning)
            opened = diffusers.DiffusionPipeline.from_pretrained(folders(kind)[1])
        assert [
            r.getMessage() for r in caplog.records if r.name.startswith(("diffusers", "transformers"))
        ] == []
        opened.set_progress_bar_config(disable=True)
        return opened

    yield of
    for library, value in zip(libraries, before, strict=True):
        library.propagate = value


def system_of(kind: str, tmp_path: Path, source: Path) -> VideoDiffusion:
    """Our system with the weights in ``source``, a SAT or a diffusers folder."""
    sat_t5 = source / "t5-v1_1-xxl"
    load = {
        "transformer": source,
        "vae": source / "vae",
        "text_encoder": sat_t5 if sat_t5.is_dir() else source,
    }
    system = VideoDiffusion(cogvideox.load_config([case.write_config(tmp_path / "model.yaml", kind, **load)]))
    system.load_weights()
    system.prepare_sampling(torch.device("cpu"))
    return system


class DiffusersTable:
    """Our schedule with diffusers' sqrt(alpha_cumprod), which differ by design (CONVENTIONS section 5: 1.2e-3)."""

    def __init__(self, scheduler: Any, ours: Any):
        self.timesteps, self.predict_x0 = ours.timesteps, ours.predict_x0
        self._table = scheduler.alphas_cumprod.double().sqrt()

    def alphas(self, steps: int) -> Tensor:
        return torch.cat([self._table[self.timesteps(steps)], torch.ones(1, dtype=torch.float64)])

    @staticmethod
    def quantise(alpha: Tensor) -> tuple[None, Tensor]:
        return None, alpha


# ------------------------------------------------------------------------------------------------ opens and samples


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_samples_what_this_project_samples(
    kind: str, folders, pipeline, tmp_path, monkeypatch
) -> None:
    """DDIM with constant guidance, from the same noise, image and prompts, in diffusers' schedule: the same video."""
    import diffusers
    from diffusers.pipelines.cogvideo import pipeline_cogvideox_image2video as image_to_video

    opened, system = pipeline(kind), system_of(kind, tmp_path, folders(kind)[0])
    expected = "CogVideoXImageToVideoPipeline" if "i2v" in kind else "CogVideoXPipeline"
    assert type(opened).__name__ == expected
    # The eps of one norm is known to differ (2e-5); everything else is held to float32.
    opened.transformer.norm_out.norm.eps = 1e-6
    opened.scheduler = diffusers.CogVideoXDDIMScheduler.from_config(opened.scheduler.config)
    # diffusers draws the image's latent from the posterior, we take its mean.
    monkeypatch.setattr(image_to_video, "retrieve_latents", lambda output, *_: output.latent_dist.mode())

    frames = 4 if kind.startswith("1.5") else 3
    noise = noise_source([5])(torch.empty(1, frames, case.Z_CHANNELS, case.HEIGHT // 8, case.WIDTH // 8))
    image = torch.rand(1, 3, case.HEIGHT, case.WIDTH, generator=torch.Generator().manual_seed(6))
    theirs = opened(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        latents=noise.clone(),
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        max_sequence_length=case.text_length(kind),
        num_frames=case.FRAMES,
        output_type="pt",
        **({"image": image} if "i2v" in kind else {}),
    ).frames

    system.schedule = DiffusersTable(opened.scheduler, system.schedule)
    # 1.5-I2V is given z / 0.7 (invert_scale_latents in the VAE's config), 1.0-I2V 0.7 z.
    system.config.sample.image_latent_scale = "diffusers" if kind == "1.5_i2v" else "training"
    with torch.no_grad():
        conditions = system.encode_prompts(
            [PROMPT], image * 2 - 1 if "i2v" in kind else None, NEGATIVE, case.FRAMES
        )
        size = {"num_frames": case.FRAMES, "height": case.HEIGHT, "width": case.WIDTH}
        latents = system.sample_latents(conditions, seeds=[5], steps=STEPS, **size)
        ours = torch.cat(list(system.decode(latents)), dim=1) / 2 + 0.5
    assert theirs.shape == ours.shape == (1, case.FRAMES, 3, case.HEIGHT, case.WIDTH)
    assert theirs.std() > 0.1  # a video, not one grey
    # Two steps of float32 networks, guidance 2 and a decoder of random weights on top: 1e-5 is measured.
    torch.testing.assert_close(theirs, ours, atol=3e-5, rtol=0)


@pytest.mark.parametrize("kind", ["2b", "5b_i2v"])
def test_the_recommended_scheduler_samples_too(kind: str, pipeline) -> None:
    opened = pipeline(kind)
    image = {"image": torch.rand(1, 3, case.HEIGHT, case.WIDTH)} if "i2v" in kind else {}
    # Height and width are left to the folder's configuration.
    video = opened(
        prompt=PROMPT,
        num_frames=case.FRAMES,
        num_inference_steps=2,
        use_dynamic_cfg=True,
        output_type="pt",
        **image,
    ).frames
    assert video.shape == (1, case.FRAMES, 3, case.HEIGHT, case.WIDTH) and video.isfinite().all()


def test_text_encoders_and_tokenizers_agree(folders, pipeline, tmp_path: Path) -> None:
    text = system_of("5b", tmp_path, folders("5b")[0]).conditioner.embedders[0]
    with torch.no_grad():  # with gradients torch takes another attention kernel
        encoded = pipeline("5b").encode_prompt(PROMPT, NEGATIVE)
    for prompt, theirs in zip((PROMPT, NEGATIVE), encoded, strict=True):
        torch.testing.assert_close(theirs, text.encode([prompt]), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------ what no tensor tells


@pytest.mark.parametrize("kind", KINDS)
def test_the_configurations_are_those_of_the_published_kind(kind: str, folders) -> None:
    """Against what diffusers itself writes for the same model (pipeline_case.write_diffusers)."""
    folder = folders(kind)[1]
    reference = case.write_diffusers(folder.parent / "reference", kind)
    # Which release wrote it; the size of the VAE's tiles, which no tensor tells and nothing depends on without tiling.
    loose = {"_diffusers_version", "_name_or_path"}
    for file in (
        "transformer/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ):
        ours, theirs = (json.loads((root / file).read_text()) for root in (folder, reference))
        skipped = loose | ({"sample_height", "sample_width"} if file.startswith("vae") else set())
        wrong = {
            key: (ours.get(key), theirs[key])
            for key in theirs.keys() - skipped
            if ours.get(key) != theirs[key]
        }
        assert wrong == {}, file


def test_only_1_5_inverts_the_latent_scale(folders) -> None:
    flags = {kind: json.loads((folders(kind)[1] / "vae" / "config.json").read_text()) for kind in KINDS}
    assert {kind for kind, config in flags.items() if config["invert_scale_latents"]} == {"1.5", "1.5_i2v"}
    assert {config["scaling_factor"] for kind, config in flags.items() if kind != "2b"} == {0.7}
    assert flags["2b"]["scaling_factor"] == 1.15258426


def test_the_fixed_table_of_2b_and_dead_values_are_not_in_the_diffusers_folder(folders) -> None:
    for kind in KINDS:
        names = read_headers(
            [folders(kind)[1] / "transformer" / "diffusion_pytorch_model.safetensors"]
        ).tensors
        assert ("patch_embed.pos_embedding" in names) == (kind == "5b_i2v")
        assert not [name for name in names if "freqs" in name or "position_embeddings" in name]
        vae = read_headers([folders(kind)[1] / "vae" / "diffusion_pytorch_model.safetensors"]).tensors
        assert not [name for name in vae if name.startswith("loss.")]


# ------------------------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_to_sat_is_bit_identical_and_loads_strictly(kind: str, folders) -> None:
    _, _, back = folders(kind)
    for module, load, source in (
        (case.network(kind, seed=9), load_transformer, case.network(kind)),
        (case.autoencoder(seed=9), load_vae, case.autoencoder()),
    ):
        path = back / "transformer" if load is load_transformer else back / "vae" / "3d-vae.pt"
        report = load(module, path)
        assert report.missing == report.unexpected == []
        own, expected = module.state_dict(), source.state_dict()
        assert [name for name in expected if not torch.equal(own[name], expected[name])] == []
    assert (back / "t5-v1_1-xxl" / "spiece.model").is_file()


@pytest.mark.parametrize("kind", ["2b", "1.5_i2v"])
def test_this_project_samples_the_same_from_all_three_folders(kind: str, folders, tmp_path: Path) -> None:
    images = torch.rand(1, 3, case.HEIGHT, case.WIDTH) * 2 - 1 if "i2v" in kind else None
    videos = [system_of(kind, tmp_path, folder).sample([PROMPT], images=images) for folder in folders(kind)]
    assert torch.equal(videos[0], videos[1]) and torch.equal(videos[0], videos[2])
