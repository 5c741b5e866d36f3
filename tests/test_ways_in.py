"""The ways into a video, end to end on tiny random weights, from files to pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_system import PROMPTS, V15, make_system

from cogvideox.sampling import ways_in
from cogvideox.sampling.inputs import read_clip, read_image
from cogvideox.sampling.prompts import Request
from cogvideox.sampling.video_io import write_video
from cogvideox.system import VideoDiffusion
from cogvideox.system_sampling import kept_latents

NEXT = 1_000_003  # what ways_in adds to the seed for each further window


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A clip of 17 frames at 8 fps and two pictures, larger than the model's 32x32."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(17, 3, 6, 8, generator=generator) * 2 - 1
    clip = torch.nn.functional.interpolate(coarse, (48, 64), mode="bilinear")
    write_video(tmp_path / "clip.mp4", clip, fps=8, crf=1)
    for name in ("first", "last"):
        pixels = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
    return {"clip": tmp_path / "clip.mp4", "first": tmp_path / "first.png", "last": tmp_path / "last.png"}


def request(seed: int = 1, **inputs: Path | str) -> Request:
    return Request(0, PROMPTS[0], seed, **inputs)


def run(system: VideoDiffusion, *requests: Request) -> tuple[ways_in.Sampled, list[torch.Tensor]]:
    """The latents, and the video (F, 3, H, W) of each request; the callbacks are as many as announced."""
    calls = []
    with torch.no_grad():
        prepared = ways_in.prepare(system, list(requests))
        sampled = ways_in.denoise(system, list(requests), prepared, callback=calls.append)
        videos = [torch.cat(list(sampled.pixels(system, row))) for row in range(len(requests))]
    assert len(calls) == ways_in.total_steps(system.config, list(requests))
    assert {len(v) for v in videos} == {ways_in.num_frames(system.config, bool(requests[0].continue_from))}
    return sampled, videos


def encoded(system: VideoDiffusion, clip: torch.Tensor) -> torch.Tensor:
    return system.encode_pixels(clip[None])


# ------------------------------------------------------------------------------------------------ video to video


@pytest.mark.parametrize("overrides", [[], V15], ids=["1.0", "1.5"])
def test_strength_goes_from_the_video_itself_to_a_new_one(overrides: list[str], files) -> None:
    system = make_system(*overrides, "sample.steps=5").eval()
    clip = encoded(system, read_clip(files["clip"], system.config))
    (new,) = run(system, request())[0].segments
    distances = []
    for strength in (0.0, 0.2, 0.6, 1.0):
        system.config.sample.strength = strength
        (latents,) = run(system, request(video=files["clip"]))[0].segments
        distances.append((latents - clip).abs().mean().item())
    assert distances[0] == 0 and distances == sorted(distances)
    torch.testing.assert_close(
        latents, new, atol=1e-6, rtol=0
    )  # all from noise: nothing of the video is left


def test_image_to_video_takes_the_first_frame_of_the_video(files) -> None:
    system = make_system("sample.strength=0.6", base="tiny_i2v.yaml").eval()
    clip = read_clip(files["clip"], system.config)
    (_, (video,)) = run(system, request(video=files["clip"]))
    own = system.sample(PROMPTS[:1], seeds=[1], images=clip[:1], video=clip[None], strength=0.6)
    torch.testing.assert_close(video, own[0], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------ given frames and pictures


@pytest.mark.parametrize("overrides", [[], V15], ids=["1.0", "1.5"])
def test_kept_frames_come_out_as_they_are_and_the_others_are_made_to_fit(overrides, files) -> None:
    system = make_system(*overrides, "sample.keep_frames=0-4").eval()
    clip = encoded(system, read_clip(files["clip"], system.config))
    (latents,) = run(system, request(video=files["clip"]))[0].segments
    assert torch.equal(latents[:, :2], clip[:, :2])
    (free,) = run(make_system(*overrides).eval(), request())[0].segments
    assert (latents[:, 2] - clip[:, 2]).abs().mean() > 0.1  # made,
    assert (latents[:, 2] - free[:, 2]).abs().mean() > 1e-3  # and with the kept ones in view


def test_kept_frames_and_a_strength_go_together(files) -> None:
    system = make_system("sample.keep_frames=0-4", "sample.strength=0", "sample.steps=5").eval()
    clip = encoded(system, read_clip(files["clip"], system.config))
    assert torch.equal(run(system, request(video=files["clip"]))[0].segments[0], clip)
    system.config.sample.strength = 0.4
    (latents,) = run(system, request(video=files["clip"]))[0].segments
    assert torch.equal(latents[:, :2], clip[:, :2]) and not torch.equal(latents[:, 2], clip[:, 2])


def test_a_text_model_keeps_a_first_and_a_last_image(files) -> None:
    system = make_system().eval()
    (latents,) = run(system, request(image=files["first"], last_image=files["last"]))[0].segments
    first, last = (read_image(files[name], 32, 32)[None] for name in ("first", "last"))
    assert torch.equal(latents[:, :1], encoded(system, first))
    still = encoded(system, last.expand(9, -1, -1, -1))
    assert torch.equal(latents[:, -1:], still[:, -1:])


def test_an_image_model_is_conditioned_on_the_first_image_and_keeps_the_last(files) -> None:
    system = make_system(base="tiny_i2v.yaml").eval()
    both, other = (
        run(system, request(image=files[name], last_image=files["last"]))[0].segments[0]
        for name in ("first", "last")
    )
    assert torch.equal(both[:, -1], other[:, -1]) and not torch.equal(both[:, 0], other[:, 0])


def test_a_mask_names_whole_latents() -> None:
    assert kept_latents(range(5), 9, 4).flatten().tolist() == [1, 1, 0]
    assert kept_latents([0, 1, 2, 3, 5, 6, 7, 8], 9, 4).flatten().tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"2 frames \(1, 2\) hold no whole latent, which are frame 0, 1-4"):
        kept_latents([1, 2], 9, 4)
    with pytest.raises(ValueError, match=r"frame 9 is outside 0-8 \(sample\.num_frames=9\)"):
        kept_latents([0, 9], 9, 4)


# ------------------------------------------------------------------------------------------------------- windows


def test_by_image_each_window_starts_from_the_last_frame_before_it(files) -> None:
    system = make_system("sample.total_frames=20", base="tiny_i2v.yaml").eval()
    sampled, (video,) = run(system, request(image=files["first"]))
    image, expected = read_image(files["first"], 32, 32)[None], []
    for window in range(3):
        part = system.sample(PROMPTS[:1], seeds=[1 + window * NEXT], images=image)[0]
        expected.append(part[window > 0 :])
        image = part[-1:]
    torch.testing.assert_close(video, torch.cat(expected)[:20], atol=1e-5, rtol=0)
    assert [seam["frame"] for seam in sampled.seams(0)["seams"]] == [9, 17]


@pytest.mark.parametrize("base", ["tiny_t2v.yaml", "tiny_i2v.yaml"])
def test_by_frames_each_window_keeps_the_last_frames_before_it(base: str, files) -> None:
    options = ["sample.total_frames=16", "sample.continue_by=frames", "sample.overlap=2"]
    system = make_system(*options, base=base).eval()
    images = "i2v" in base
    _, (video,) = run(system, request(**({"image": files["first"]} if images else {})))
    image = read_image(files["first"], 32, 32)[None] if images else None
    parts = [system.sample(PROMPTS[:1], seeds=[1], images=image)[0]]
    mask = torch.tensor([1.0, 1, 0]).view(1, 3, 1, 1, 1)
    for window in (1, 2):
        tail = parts[-1][-5:]
        known = torch.cat([encoded(system, tail), torch.zeros(1, 1, 8, 8, 8)], dim=1)
        conditions = system.encode_prompts(PROMPTS[:1], tail[:1] if images else None)
        size = {"num_frames": 9, "height": 32, "width": 32, "steps": 3}
        latents = system.sample_latents(conditions, seeds=[1 + window * NEXT], keep=(known, mask), **size)
        parts.append(torch.cat(list(system.decode(latents)), dim=1)[0])
    expected = torch.cat([parts[0], parts[1][5:], parts[2][5:]])[:16]
    torch.testing.assert_close(video, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("overrides", [[], V15], ids=["1.0", "1.5"])
def test_by_latents_each_window_keeps_the_last_latents_before_it(overrides, files, tmp_path: Path) -> None:
    system = make_system(*overrides, "sample.total_frames=13", "sample.overlap=2").eval()
    (whole,), (video,) = run(system, request())[0].segments, run(system, request())[1]
    assert whole.shape[1] == 4 and len(video) == 13
    # The second window alone, from a file with the latents of the first.
    system.config.sample.total_frames = None
    (first,) = run(system, request())[0].segments
    assert torch.equal(whole[:, :3], first)
    save_file({"latents": first[0].contiguous()}, tmp_path / "first.safetensors")
    (second,) = run(system, request(seed=1 + NEXT, continue_from=tmp_path / "first.safetensors"))[0].segments
    assert torch.equal(second[:, :2], first[:, 1:])
    torch.testing.assert_close(whole[:, 3], second[:, 2], atol=1e-5, rtol=0)


def test_a_video_file_is_continued_from_its_last_frames(files) -> None:
    system = make_system("sample.overlap=2").eval()
    sampled, (video,) = run(system, request(continue_from=files["clip"]))
    config = make_system("sample.num_frames=17").config
    clip = read_clip(files["clip"], config)
    torch.testing.assert_close(sampled.segments[0][:, :2], encoded(system, clip[-5:]), atol=1e-5, rtol=0)
    assert len(video) == 4
    seam = sampled.seams(0)["seams"][0]
    expected = (video[0] - (clip[-1].float() / 127.5 - 1)).abs().mean()
    assert seam["frame"] == 0 and seam["difference"] == pytest.approx(expected.item(), abs=1e-6)


def test_latents_of_another_size_are_refused(tmp_path: Path) -> None:
    system = make_system()
    save_file({"latents": torch.zeros(3, 8, 4, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"latents \(3, 8, 4, 8\): expected \(T, 8, 8, 8\)"):
        ways_in.denoise(
            system, [request(continue_from=tmp_path / "a.safetensors")], ways_in.Prepared(({}, {}))
        )


# ----------------------------------------------------------------------------------------------------- inversion


@pytest.mark.parametrize("shift", [3.0, 1.0], ids=["2b", "5b"])
def test_inversion_reconstructs_and_edits(shift: float, files) -> None:
    system = make_system("sample.invert=true", f"model.schedule.params.snr_shift={shift}").eval()
    clip = encoded(system, read_clip(files["clip"], system.config))

    def error(steps: int, **inputs: str) -> float:
        system.config.sample.steps = steps
        (latents,) = run(system, request(video=files["clip"], **inputs))[0].segments
        return ((latents - clip).abs().mean() / clip.std()).item()

    # Random weights are far rougher than trained ones: the claim here is that it converges.
    coarse, fine = error(15), error(60)
    assert fine < coarse / 2.5 and fine < 0.2
    assert error(60, source_prompt=PROMPTS[1]) > 2 * fine  # another text leads elsewhere


# ------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("overrides", "inputs"),
    [
        ([], {}),
        (["sample.strength=0.7"], {"video": "clip"}),
        (["sample.total_frames=13", "sample.overlap=1"], {}),
        ([], {"last_image": "last"}),
        (["sample.invert=true"], {"video": "clip"}),
    ],
    ids=["text", "video", "windows", "last image", "inversion"],
)
def test_an_item_is_the_same_alone_and_in_a_batch(overrides: list[str], inputs: dict, files) -> None:
    system = make_system(*overrides).eval()
    given = {name: files[file] for name, file in inputs.items()}
    batch = [Request(i, prompt, 5 + i, **given) for i, prompt in enumerate(PROMPTS)]
    together = run(system, *batch)[0].segments[0]
    for item, alone in zip(together, batch, strict=True):
        torch.testing.assert_close(item[None], run(system, alone)[0].segments[0], atol=1e-5, rtol=1e-5)
    assert not torch.equal(together[0], together[1])
