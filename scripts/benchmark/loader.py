"""Training clips from a video file: this project's dataset, and decord in the way of the published code.

One clip of 49 frames at 8 frames per second, 480 x 720, from 8 s of 1280 x 720 H.264 at 24 frames per second, which is
made here once: moving textures with grain, about 5 Mb/s, a key frame every two seconds. All of it is work of a CPU,
also where there is a GPU: the time is that of one core, decoding threads included.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cogvideox.data.transforms import cover_size, crop, resize_to_cover
from cogvideox.data.video_folder import VideoFolder
from scripts.benchmark.memory import peak_of
from scripts.benchmark.pairs import Candidate, max_difference, paired
from scripts.benchmark.results import Row
from scripts.benchmark.settings import Settings

FPS = 8
BUDGET_S = 14.0
_RECIPE = 1  # of the pictures and the encoder; another one needs another number
_LOOP = 8  # frames of grain that repeat


@dataclass(frozen=True)
class Case:
    """source_*: of the file.  num_frames, height, width: of the training clip.  bit_rate: in bits per second."""

    source_height: int = 720
    source_width: int = 1280
    source_fps: int = 24
    seconds: int = 8
    bit_rate: int = 5_000_000
    num_frames: int = 49
    height: int = 480
    width: int = 720

    @property
    def title(self) -> str:
        return (
            f"{self.num_frames} x {self.height} x {self.width} of {self.source_width} x {self.source_height} "
            f"H.264, {self.source_fps} to {FPS} frames per second"
        )

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


QUICK = Case(90, 160, seconds=2, bit_rate=200_000, num_frames=9, height=48, width=72)


def run(settings: Settings) -> list[Row]:
    case = QUICK if settings.quick else Case()
    folder = clip_folder(case)
    candidates = [Candidate(name, work(case, folder)) for name, work in works().items()]
    # Never events of a device: whatever trains, a CPU decodes.
    on_cpu = replace(settings, device="cpu", warmups=min(settings.warmups, 1))
    times = paired(candidates, on_cpu, budget_s=BUDGET_S)
    rows = []
    for name in times.seconds:
        is_ours = name == "ours"
        peak = peak_of("scripts.benchmark.loader:memory_case", name, settings.quick)
        rows.append(
            Row(
                "loader",
                case.title,
                name,
                times.median(name),
                None if is_ours else times.ratio(name, "ours"),
                None if is_ours else max_difference(times.results["ours"], levels(times.results[name])),
                {"above": peak.above, "total": peak.total},
                note=f"{1 / times.median(name):.2f} clips per core-second"
                + ("" if is_ours else "; difference in levels of 0 to 255"),
            )
        )
    return rows


def memory_case(name: str, quick: bool) -> Callable[[], Tensor]:
    case = QUICK if quick else Case()
    return works()[name](case, clip_folder(case))


def works() -> dict[str, Callable[[Case, Path], Callable[[], Tensor]]]:
    """Name of a candidate -> what makes its work; the work gives (F, 3, H, W), uint8 or float32 in [-1, 1]."""
    read = decord_frames
    try:
        import decord  # noqa: F401
    except (ImportError, OSError):  # no wheel for this machine, or one that does not load
        read = pyav_frames
    by = read.__name__.removesuffix("_frames")
    return {
        "ours": ours,
        f"{by}, all frames, as published": lambda case, folder: lambda: as_published(case, folder, read),
        f"{by}, wanted frames": lambda case, folder: lambda: wanted_frames(case, folder, read),
    }


def ours(case: Case, folder: Path) -> Callable[[], Tensor]:
    dataset = VideoFolder(folder, case.num_frames, case.height, case.width, FPS)
    return lambda: dataset[0]["video"]


def as_published(case: Case, folder: Path, read: Callable[[Path, list[int]], np.ndarray]) -> Tensor:
    """All source frames to RGB, every third of them kept, resized as floats (torchvision's bicubic), normalised."""
    stop = int(case.num_frames / FPS * case.source_fps)
    frames = read(folder / "videos" / "clip.mp4", list(range(stop)))[:: stop // case.num_frames]
    video = torch.from_numpy(frames[: case.num_frames]).permute(0, 3, 1, 2).float()
    size = cover_size((case.source_height, case.source_width), case.size)
    video = F.interpolate(video, size, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return crop(video, case.size).sub_(127.5).div_(127.5)


def wanted_frames(case: Case, folder: Path, read: Callable[[Path, list[int]], np.ndarray]) -> Tensor:
    """The best that a script makes of the library: only the wanted frames, and uint8 to the end."""
    stride = case.source_fps // FPS
    frames = read(folder / "videos" / "clip.mp4", list(range(0, stride * case.num_frames, stride)))
    return crop(resize_to_cover(torch.from_numpy(frames).permute(0, 3, 1, 2), case.size), case.size)


def decord_frames(path: Path, indices: list[int]) -> np.ndarray:
    import decord

    return decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()


def pyav_frames(path: Path, indices: list[int]) -> np.ndarray:
    import av

    wanted, frames = set(indices), []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number > indices[-1]:
                break
            if number in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
    return np.stack(frames)


def levels(video: Tensor) -> Tensor:
    """uint8 as it is; floats in [-1, 1] -> 0 to 255."""
    return video if video.dtype == torch.uint8 else video * 127.5 + 127.5


# ------------------------------------------------------------------------------------------------------- the clip


def clip_folder(case: Case) -> Path:
    """A dataset of one clip in the system's folder for temporary files, made if it is not there."""
    recipe = hashlib.sha256(repr((_RECIPE, astuple(case))).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"cogvideox-benchmark-{recipe}"
    path = folder / "videos" / "clip.mp4"
    if not path.is_file():
        for name in ("videos", "labels"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "labels" / "clip.txt").write_text("textures that move")
        unfinished = path.with_suffix(f".{os.getpid()}")
        write_clip(unfinished, case)
        unfinished.replace(path)
    return folder


def write_clip(path: Path, case: Case) -> None:
    """Two textures with the spectrum of natural pictures, one moving before the other, under grain."""
    import av

    height, width = case.source_height, case.source_width
    rng = np.random.default_rng(0)
    back = 128 + 40 * texture(rng, height * 6 // 5, width * 6 // 5)
    front = 128 + 50 * texture(rng, height // 3, width // 4)
    grain = 3 * rng.standard_normal((_LOOP, height, width, 1))
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=case.source_fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.bit_rate, stream.options = case.bit_rate, {"g": str(2 * case.source_fps)}
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        for k in range(case.seconds * case.source_fps):
            top, left = (int(room / 10 * (1 + np.sin(k / 40))) for room in (height, width))
            picture = back[top : top + height, left : left + width].copy()
            top, left = int(height / 4 * (1 + np.sin(k / 15))), int(width / 3 * (1 + np.cos(k / 20)))
            picture[top : top + len(front), left : left + front.shape[1]] = front
            pixels = np.clip(picture + grain[k % _LOOP], 0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3): amplitudes 1/f^1.2, random phases; mean 0 and deviation 1, mostly grey."""

    def plane() -> np.ndarray:
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        phases = np.exp(2j * np.pi * rng.random(frequency.shape))
        values = np.fft.irfft2(np.maximum(frequency, 1 / width) ** -1.2 * phases, s=(height, width))
        return (values - values.mean()) / values.std()

    grey = plane()
    return np.stack([0.9 * grey + 0.44 * plane() for _ in range(3)], axis=-1)
