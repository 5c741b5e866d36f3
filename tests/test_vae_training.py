"""Training the VAE: the loss terms against their definitions, and a few real steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cogvideox.vae.autoencoder import CausalVAE
from cogvideox.vae.losses import ReconstructionKL, gradient_error, kl_divergence, psnr
from cogvideox.vae.training import VAETraining, pixels_to_float

TINY = dict(channels=8, channel_multipliers=[1, 2, 2], num_res_blocks=1, z_channels=4, norm_groups=4)


def make(loss=None, **config) -> VAETraining:
    torch.manual_seed(0)
    return VAETraining(CausalVAE(**(TINY | config)), loss)


def rng(seed: int = 0) -> SimpleNamespace:
    return SimpleNamespace(local=torch.Generator().manual_seed(seed))


def squares(num_frames: int = 5, batch: int = 2) -> torch.Tensor:
    """uint8 clips of a bright square that moves by a pixel per frame on a dark ground."""
    video = torch.full((batch, num_frames, 3, 16, 16), 20, dtype=torch.uint8)
    for i in range(batch):
        for frame in range(num_frames):
            video[i, frame, i % 3, 4 + i : 10 + i, 2 + frame : 8 + frame] = 230
    return video


def test_training_lowers_the_loss():
    module = make()
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        loss, metrics = module({"video": squares()}, rng(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["psnr"] > 10


def test_every_parameter_gets_a_gradient_and_metrics_carry_none():
    module = make(ReconstructionKL(l1=1.0, mse=1.0, gradient=1.0, kl=1e-3))
    loss, metrics = module({"video": squares()}, rng())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert metrics.keys() == {"loss/rec", "loss/kl", "psnr"}
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_checkpointing_and_frame_batches_train_with_the_same_gradients():
    gradients = []
    for config in ({}, dict(checkpoint_activations=True), dict(encode_frames_per_pass=8)):
        module = make(**config)
        module({"video": squares(num_frames=9)}, rng())[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])  # one batch of nine frames


def test_bytes_and_floats_are_the_same_video():
    module = make()
    video = squares()
    assert pixels_to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    from_bytes, _ = module({"video": video}, rng())
    from_floats, _ = module({"video": video.float() / 127.5 - 1}, rng())
    assert torch.equal(from_bytes, from_floats)


def test_the_loss_depends_on_the_generator_alone():
    module = make(ReconstructionKL(kl=1e-3))
    batch = {"video": squares()}
    assert torch.equal(module(batch, rng(1))[0], module(batch, rng(1))[0])
    assert not torch.equal(module(batch, rng(1))[0], module(batch, rng(2))[0])


def test_single_frames_train_too():
    loss, _ = make(ReconstructionKL(gradient=1.0))({"video": squares(num_frames=1)}, rng())
    assert loss.isfinite()


def test_bfloat16_parameters_train_with_a_float32_loss():
    loss, metrics = make().bfloat16()({"video": squares()}, rng())
    loss.backward()
    assert loss.dtype == metrics["psnr"].dtype == torch.float32


def test_parameters_are_stored_under_first_stage_model():
    assert {key.split(".")[0] for key in make().state_dict()} == {"first_stage_model"}
    module = make()
    module.load_state_dict(module.state_dict() | {"first_stage_model.loss.logvar": torch.zeros(())})


def test_the_loss_can_be_swapped():
    def only_first_frame(reconstruction, video, moments):
        return (reconstruction - video)[:, 0].square().mean(), {"loss/first": torch.tensor(1.0)}

    _, metrics = make(only_first_frame)({"video": squares()}, rng())
    assert metrics.keys() == {"loss/first", "psnr"}


def test_frames_that_are_not_4k_plus_1_are_refused():
    with pytest.raises(ValueError, match="6 frames.*5 or 9"):
        make()({"video": squares(num_frames=6)}, rng())


def test_kl_is_the_divergence_of_two_gaussians():
    moments = torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, logvar = moments.chunk(2, dim=2)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(moments), expected)


def test_gradient_error_compares_neighbours_in_height_width_and_time():
    edge = torch.zeros(1, 2, 1, 4, 4)
    edge[..., 2:] = 1.0  # a vertical edge: one of three horizontal differences in each row
    assert gradient_error(edge) == pytest.approx(1 / 3)
    flash = torch.zeros(1, 2, 1, 4, 4)
    flash[:, 1] = 0.5
    assert gradient_error(flash) == pytest.approx(0.5)
    assert gradient_error(torch.full((1, 3, 3, 4, 4), 0.7)) == 0


def test_psnr_is_that_of_the_peak_to_peak_range():
    video = torch.zeros(1, 1, 3, 4, 4)
    assert psnr(video + 0.2, video) == pytest.approx(20.0)  # 10 log10(2^2 / 0.2^2)
    assert psnr(torch.full_like(video, 5.0), torch.ones_like(video)) > 100  # beyond the range: clamped


def test_loss_is_the_weighted_sum_of_its_terms():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 5, 3, 8, 8, generator=generator) for _ in range(2))
    moments = torch.randn(1, 2, 8, 2, 2, generator=generator)
    loss, metrics = ReconstructionKL(l1=0.5, mse=2.0, gradient=3.0, kl=0.1)(a, b, moments)
    rec = 0.5 * (a - b).abs().mean() + 2.0 * (a - b).square().mean() + 3.0 * gradient_error(a - b)
    torch.testing.assert_close(metrics["loss/rec"], rec)
    torch.testing.assert_close(loss, rec + 0.1 * kl_divergence(moments))
