"""Videos longer than the model's window: which frames each window makes, what it takes over, and how well they join.

A window takes over from the one before it either
* by ``image``: its last frame, through the model's image condition (image-to-video models);
* by ``frames``: its last 4 (k - 1) + 1 frames, encoded to k latents that are kept at every step. The first of them is
  then the latent of a single frame, as in every clip that the weights were trained on;
* by ``latents``: its last k latents as they are, kept at every step. They are decoded in one stream, without a cut, but
  the first of them stands where the weights know only latents of a single frame.
The last two need no training (``diffusion.constraints.KeepRegion``) and work for every model.

torch is not imported, so that a plan that cannot work is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogvideox.config import Config, ConfigError
from cogvideox.sampling.prompts import takes_image

if TYPE_CHECKING:
    from torch import Tensor

WAYS = ("image", "frames", "latents")


@dataclass(frozen=True)
class Plan:
    """How a video is cut into windows. Frames are pixel frames."""

    by: str
    kept: int
    # Latent frames that a window takes over; 0 by image.
    shared: int
    # Frames that a window has in common with what came before it.
    window: int
    total: int
    # Frames of the result.
    continued: bool
    # The first window goes on from a file; the result holds only what is new.

    @property
    def added(self) -> int:
        """Frames that a window adds."""
        return self.window - self.shared

    @property
    def windows(self) -> int:
        rest = self.total if self.continued else max(self.total - self.window, 0)
        return (not self.continued) + -(-rest // self.added)

    @property
    def seams(self) -> list[int]:
        """The frames of the result that begin a window and follow another one, or the file (0)."""
        first = 0 if self.continued else self.window
        return list(range(first, self.total, self.added))

    @property
    def drops(self) -> list[int]:
        """Frames left out at the start of each segment, as they were shown before. By latents there is one segment."""
        first = self.shared if self.continued else 0
        return [first] if self.by == "latents" else [first] + [self.shared] * (self.windows - 1)


def plan(config: Config, continued: bool = False) -> Plan:
    """The windows of the section ``sample``. Raises ConfigError with what to change."""
    section, compression = config.sample, config.vae.temporal_compression
    latents = (section.num_frames - 1) // compression + 1
    total = section.total_frames
    by = _check_way(config)
    if total is not None and total < 1:
        raise ConfigError(f"sample.total_frames={total}: expected at least 1")
    if not continued and (total or 0) <= section.num_frames:
        return Plan(by, 0, 0, section.num_frames, total or section.num_frames, continued)
    if section.num_frames == 1:
        raise ConfigError("sample.num_frames=1: a window of one frame adds nothing to a longer video")
    kept = 0 if by == "image" else max(latents // 4, 1) if section.overlap is None else section.overlap
    if by != "image" and not 1 <= kept < latents:
        raise ConfigError(
            f"sample.overlap={kept}: a window of sample.num_frames={section.num_frames} has {latents} latent frames, "
            f"of which 1 to {latents - 1} can be shared"
        )
    shared = 1 if by == "image" else compression * (kept - 1) + 1
    return Plan(by, kept, shared, section.num_frames, total or section.num_frames - shared, continued)


def _check_way(config: Config) -> str:
    by, image_model = config.sample.continue_by, takes_image(config)
    if by is None:
        return "image" if image_model else "latents"
    if by not in WAYS:
        raise ConfigError(f"sample.continue_by={by!r}: expected one of {', '.join(WAYS)}")
    if by == "image" and not image_model:
        raise ConfigError(
            "sample.continue_by=image needs an image-to-video model; this one takes frames or latents"
        )
    if by == "latents" and image_model:
        raise ConfigError(
            "sample.continue_by=latents: an image-to-video model also needs the first frame of each window as a "
            "picture; use image or frames"
        )
    return by


def joined(segments: Iterable[Iterable[Tensor]], plan: Plan) -> Iterator[Tensor]:
    """The video of decoded segments, iterators of chunks (f, 3, H, W): overlaps dropped, cut to ``plan.total``."""
    left = plan.total
    for chunks, drop in zip(segments, plan.drops, strict=True):
        for chunk in chunks:
            chunk, drop = chunk[drop:][:left], max(drop - len(chunk), 0)
            left -= len(chunk)
            if len(chunk):
                yield chunk
            if not left:
                return


class SeamMeter:
    """How visible the seams are: the mean |difference| of the two frames there against that inside the windows.

    seams: indices of frames that begin a window (``Plan.seams``).  before: (3, H, W), the frame before frame 0, for a
    seam at 0.  All frames in one unit, such as [-1, 1].
    """

    def __init__(self, seams: Sequence[int], before: Tensor | None = None):
        self._seams, self._last, self._frame = set(seams), before, 0
        self._across: list[tuple[int, float]] = []
        self._inside: list[float] = []

    def watch(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The chunks (f, 3, H, W), measured as they pass."""
        for chunk in chunks:
            for frame in chunk:
                if self._last is not None:
                    difference = (frame - self._last.to(frame)).abs().mean().item()
                    if self._frame in self._seams:
                        self._across.append((self._frame, difference))
                    else:
                        self._inside.append(difference)
                self._last, self._frame = frame, self._frame + 1
            yield chunk

    def report(self) -> dict[str, Any] | None:
        """``{"inside": mean, "seams": [{"frame", "difference", "ratio"}]}``; ratio 1 is a seam that nobody sees.

        None where there is no seam. ratio is None for windows in which nothing moves.
        """
        if not self._across:
            return None
        inside = sum(self._inside) / len(self._inside) if self._inside else 0.0
        seams = [
            {"frame": frame, "difference": value, "ratio": value / inside if inside else None}
            for frame, value in self._across
        ]
        return {"inside": inside, "seams": seams}
