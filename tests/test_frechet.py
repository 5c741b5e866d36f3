"""The Frechet distance on Gaussians with a known answer, and features of videos by a network from a file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cogvideox.command_line import run_door
from cogvideox.evaluation.frechet import Gaussian, bias_of_unit_gaussians, frechet_distance
from cogvideox.evaluation.video_features import FeatureNetwork, NetworkInput, features_of, read_frames
from cogvideox.sampling.video_io import write_video
from scripts.evaluate.__main__ import main

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_draws_alone_and_among_others() -> None:
    RNG.bit_generator.state = START


def covariance(d: int) -> np.ndarray:
    root = RNG.normal(size=(d, d + 2))
    return root @ root.T / d


def gaussian(mean: np.ndarray, cov: np.ndarray) -> Gaussian:
    return Gaussian(np.asarray(mean, dtype=float), np.asarray(cov, dtype=float), 1000)


def newton_schulz_root(matrix: np.ndarray, steps: int = 60) -> np.ndarray:
    """The square root of a product of two positive matrices, without eigenvalues (Denman & Beavers 1976)."""
    y, z = matrix.copy(), np.eye(len(matrix))
    for _ in range(steps):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return y


# ---------------------------------------------------------------------------------------------------- the distance


def test_diagonal_gaussians_are_as_far_apart_as_their_deviations() -> None:
    """In one dimension W2^2 = (m - n)^2 + (s - r)^2, and independent dimensions add up."""
    m, n, s, r = RNG.normal(size=(4, 6))
    s, r = np.abs(s), np.abs(r)
    found = frechet_distance(gaussian(m, np.diag(s**2)), gaussian(n, np.diag(r**2)))
    assert found == pytest.approx(((m - n) ** 2 + (s - r) ** 2).sum(), rel=1e-12)


def test_translation_adds_the_squared_length_of_the_shift() -> None:
    cov, shift = covariance(5), RNG.normal(size=5)
    assert frechet_distance(gaussian(shift, cov), gaussian(np.zeros(5), cov)) == pytest.approx(shift @ shift)


def test_scaling_by_c_costs_c_minus_one_squared_times_the_trace() -> None:
    cov = covariance(5)
    found = frechet_distance(gaussian(np.zeros(5), cov), gaussian(np.zeros(5), 9 * cov))
    assert found == pytest.approx(4 * np.trace(cov))


def test_a_rotation_of_both_changes_nothing_and_the_order_does_not_matter() -> None:
    a, b = (gaussian(RNG.normal(size=6), covariance(6)) for _ in range(2))
    q = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    turned = [gaussian(q @ g.mean, q @ g.covariance @ q.T) for g in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_it_is_the_formula_with_a_matrix_root_found_by_iteration() -> None:
    a, b = (gaussian(RNG.normal(size=8), covariance(8)) for _ in range(2))
    root = newton_schulz_root(a.covariance @ b.covariance)
    d = a.mean - b.mean
    expected = d @ d + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_features_give_mean_and_covariance_as_numpy_has_them() -> None:
    x = RNG.normal(size=(30, 4)).astype(np.float32)
    g = Gaussian.of(x)
    np.testing.assert_allclose(g.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(g.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_fewer_samples_than_features_are_no_special_case() -> None:
    """10 samples of 400 features that live on 3 axes: the distance is the one on these axes."""
    a, b = RNG.normal(size=(10, 3)), 2 + 3 * RNG.normal(size=(12, 3))
    axes = np.linalg.qr(RNG.normal(size=(400, 3)))[0].T
    small = frechet_distance(Gaussian.of(a), Gaussian.of(b))
    large = frechet_distance(Gaussian.of(a @ axes), Gaussian.of(b @ axes))
    assert large == pytest.approx(small, rel=1e-9)
    assert frechet_distance(Gaussian.of(a @ axes), Gaussian.of(a @ axes)) < 1e-10


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_the_features_does_not_matter(scale: float) -> None:
    a, b = RNG.normal(size=(9, 20)), RNG.normal(size=(11, 20)) + 1
    reference = frechet_distance(Gaussian.of(a), Gaussian.of(b))
    found = frechet_distance(Gaussian.of(scale * a), Gaussian.of(scale * b))
    assert found == pytest.approx(scale**2 * reference, rel=1e-9)


def test_samples_of_one_gaussian_are_apart_by_the_stated_bias() -> None:
    d, n, m = 20, 2000, 1000
    found = [
        frechet_distance(Gaussian.of(RNG.normal(size=(n, d))), Gaussian.of(RNG.normal(size=(m, d))))
        for _ in range(20)
    ]
    # First order in 1 / n leaves some D / n, 2 %; the mean of 20 is certain to 1 or 2 %.
    assert np.mean(found) == pytest.approx(bias_of_unit_gaussians(d, n, m), rel=0.08)


@pytest.mark.parametrize(
    ("features", "complaint"),
    [
        (np.zeros((1, 4)), "at least 2"),
        (np.zeros(4), "at least 2"),
        (np.array([[0.0, 1], [np.nan, 0], [1, 2]]), "1 of 3 videos are NaN"),
    ],
)
def test_features_that_have_no_gaussian_are_an_error(features: np.ndarray, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Gaussian.of(features)


# ---------------------------------------------------------------------------------------------- features of videos


class Statistics(nn.Module):
    """Mean and deviation of each channel: (N, 3, T, H, W) -> (N, 6)."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        flat = scale * x.flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], dim=1)


class Map(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of 8 videos, 9 frames at 8 fps, and networks."""
    root = tmp_path_factory.mktemp("fvd")
    generator = torch.Generator().manual_seed(0)
    for folder, level in (("real", 90), ("sampled", 150)):
        for i in range(8):
            grey = level + 20 * torch.randn(1, 3, 1, 1, generator=generator)
            video = grey + 10 * torch.randn(9, 3, 32, 32, generator=generator)
            write_video(root / folder / f"{i}.mp4", video.clamp(0, 255).to(torch.uint8), 8, crf=8)
    for name, network in (("statistics", Statistics()), ("map", Map())):
        torch.jit.script(network).save(str(root / f"{name}.pt"))
    torch.save(Statistics().state_dict(), root / "weights.pt")
    save_file({"x": torch.zeros(1)}, root / "weights.safetensors")
    return root


def evaluate(*argv: object) -> int:
    return run_door(main, ["fvd", *map(str, argv)])


def test_what_the_network_is_fed_with_is_what_the_options_say() -> None:
    video = torch.randint(0, 256, (5, 3, 16, 24), dtype=torch.uint8)
    x = NetworkInput(size=None, frames=None).of(video)
    torch.testing.assert_close(x[0].permute(1, 0, 2, 3), video / 127.5 - 1)
    x = NetworkInput(size=8, low=0, high=255, layout="NTHWC").of(video)
    assert x.shape == (1, 5, 8, 8, 3) and 0 <= x.min() and x.max() <= 255
    black, white = (
        NetworkInput(low=0, high=1).of(torch.full((1, 3, 4, 4), v, dtype=torch.uint8)) for v in (0, 255)
    )
    assert black.max() == 0 and white.shape == (1, 3, 1, 224, 224)
    torch.testing.assert_close(white, torch.ones_like(white))


def test_frames_at_a_rate_are_every_second_one_of_a_file_twice_as_fast(tmp_path: Path) -> None:
    video = (torch.arange(17).view(17, 1, 1, 1) * 15).expand(17, 3, 32, 32).to(torch.uint8)
    write_video(tmp_path / "fast.mp4", video, 16, crf=1)
    frames = read_frames(tmp_path / "fast.mp4", NetworkInput(frames=5, fps=8))
    levels = frames.float().mean((1, 2, 3))
    assert torch.allclose(
        levels, torch.arange(5) * 30.0, atol=3
    )  # H.264 in limited range rounds a level or two
    with pytest.raises(
        ValueError, match=r"has 9 frames at 8 fps, the network is fed with 10: lower --frames"
    ):
        read_frames(tmp_path / "fast.mp4", NetworkInput(frames=10, fps=8))


def test_the_command_measures_two_folders_and_says_what_the_number_is_worth(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--network", files / "statistics.pt", "--frames", 9, "--size", "own"]
    result = tmp_path / "fvd.json"
    assert evaluate(files / "real", files / "sampled", *common, "--json", result) == 0
    found, output = json.loads(result.read_text()), capsys.readouterr().out
    videos = {
        name: [read_frames(p, NetworkInput(frames=9)) for p in sorted((files / name).iterdir())]
        for name in ("real", "sampled")
    }
    by_hand = {}
    for name, clips in videos.items():
        pixels = [(clip.double() / 127.5 - 1).permute(1, 0, 2, 3).flatten(1) for clip in clips]
        by_hand[name] = np.stack([np.concatenate([p.mean(1), p.std(1)]) for p in pixels])
    expected = frechet_distance(*(Gaussian.of(by_hand[name]) for name in ("real", "sampled")))
    assert found["distance"] == pytest.approx(expected, rel=1e-4)  # the features are float32
    assert found["half_of_real_to_other_half"] < found["distance"] and found["features"] == 6
    assert "9 frames, their own size, values -1 to 1, float32 NCTHW" in output
    assert "singular" not in output  # 8 videos, 6 features

    assert evaluate(files / "real", files / "sampled", *common, "--most", 5) == 0
    assert "5 real videos for 6 features: fewer than 7" in capsys.readouterr().out
    scaled = [*common, "--arguments", '{"scale": 2.0}', "--json", result]
    assert evaluate(files / "real", files / "sampled", *scaled) == 0
    assert json.loads(result.read_text())["distance"] == pytest.approx(4 * expected, rel=1e-4)


def test_kept_features_are_used_again_and_never_for_other_files(files: Path, tmp_path: Path) -> None:
    videos = [shutil.copy(p, tmp_path / p.name) for p in sorted((files / "real").iterdir())][:3]
    videos = [Path(p) for p in videos]
    calls: list[int] = []

    def features(takes: NetworkInput) -> np.ndarray:
        network = FeatureNetwork(files / "statistics.pt", takes, CPU)
        return features_of(videos, network, cache=tmp_path / "kept", advance=lambda: calls.append(1))

    takes = NetworkInput(frames=9, size=None)
    first = features(takes)
    np.testing.assert_array_equal(features(takes), first)
    assert len(calls) == 3
    features(NetworkInput(frames=5, size=None))
    assert len(calls) == 6
    shutil.copy(files / "sampled" / "0.mp4", videos[0])
    assert not np.array_equal(features(takes), first) and len(calls) == 9


def test_frame_rates_that_differ_are_reported(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        write_video(tmp_path / f"{i}.mp4", torch.full((9, 3, 32, 32), 40 + i, dtype=torch.uint8), 4)
    common = ["--network", files / "statistics.pt", "--frames", 4, "--size", "own"]
    assert evaluate(files / "real", tmp_path, *common) == 0
    assert "frames per second differ (real 8; sampled 4)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--network", "{root}/none.pt"], "none.pt: there is no such file"),
        (["--network", "{root}/weights.pt"], "is not a TorchScript file"),
        (["--network", "{root}/weights.safetensors"], "is not a TorchScript file"),
        (["--network", "{root}/map.pt"], r"returns \(1, 3, 224, 224\) for one video: expected one vector"),
        (["--network", "{root}/statistics.pt", "--frames", "16"], "has 9 frames, the network is fed with 16"),
        (["--network", "{root}/statistics.pt", "--arguments", '{{"size": 3}}'], "does not take"),
        (["--network", "{root}/statistics.pt", "--arguments", "3"], "--arguments 3: expected"),
        (["--network", "{root}/statistics.pt", "--size", "big"], "--size big: expected a number, or own"),
        (["--network", "{root}/statistics.pt", "--layout", "HWC"], "layout 'HWC': expected one of NCTHW"),
        (["--network", "{root}/statistics.pt", "--range", "1", "0"], "range 1 to 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    files: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [text.format(root=files) for text in arguments]
    if "--frames" not in arguments:
        arguments += ["--frames", "9"]
    assert evaluate(files / "real", files / "sampled", *arguments) == 2
    error = capsys.readouterr().err
    assert re.search(complaint, error) and error.startswith("error: ")


def test_folders_without_enough_videos_are_an_error(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ["--network", files / "statistics.pt"]
    assert evaluate(tmp_path / "none", files / "real", *network) == 2
    assert "none: there is no such folder of videos" in capsys.readouterr().err
    (tmp_path / "one").mkdir()
    shutil.copy(files / "real" / "0.mp4", tmp_path / "one")
    assert evaluate(files / "real", tmp_path / "one", *network) == 2
    assert "one holds 1 videos" in capsys.readouterr().err
