"""A folder of videos with captions as a map-style dataset of equal clips.

All files are looked at before training starts, without decoding; what is missing, damaged or too short is an error or
a counted and listed skip, never silent. The layouts on disk: ``layouts.py``.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cogvideox.cache.digests import FileDigests
from cogvideox.data.fingerprint import clips_fingerprint
from cogvideox.data.frames import FRAME_RULE, FrameSelection, check_frame_count, select_frames
from cogvideox.data.layouts import Clip, find_clips
from cogvideox.data.reader import DECODE_RULES, DECODERS, VideoError, VideoReader, open_video, verify_video
from cogvideox.data.transforms import CROPS, RESIZE_RULE, cover_size, crop_corner, resize_to_cover

logger = logging.getLogger(__name__)

_CHOICES = ("error", "skip")


class VideoFolder(Dataset):
    """Clips of ``num_frames`` frames at ``fps``, ``height`` x ``width``, cut from the start of each video.

    path: a folder or metadata file, or a list of them.
    num_frames: frame_multiple * k + 1. frame_multiple: 4; CogVideoX 1.5 takes 16.
    skip_frames: frames of the video left out at both ends (title cards, cuts).
    crop: "center", or "random": another place each epoch, drawn from (seed, epoch, clip).
    on_missing_caption, on_bad_clip: "error", or "skip", which leaves the clip out, counts and lists it; a clip is bad
        that cannot be read or is too short. More than max_bad_fraction of such clips are an error all the same.
    scan: "headers" reads no pictures; "decode" also decodes every frame once, strictly, which alone finds damage inside
        a file; None looks at nothing before training.
    decoder: "auto" (PyAV, else decord), "decord", "pyav".

    Item: video (F, 3, H, W) uint8, caption, key (path within the folder), fps (real, as a float; see ``report``).
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        num_frames: int,
        height: int,
        width: int,
        fps: float,
        skip_frames: int = 0,
        frame_multiple: int = 4,
        crop: str = "center",
        seed: int = 0,
        on_missing_caption: str = "error",
        on_bad_clip: str = "error",
        max_bad_fraction: float = 0.1,
        layout: str | None = None,
        video_column: str | None = None,
        caption_column: str | None = None,
        scan: str | None = "headers",
        decoder: str = "auto",
    ):
        check_frame_count(num_frames, frame_multiple, "data.num_frames")
        for name, value, choices in (
            ("crop", crop, CROPS),
            ("on_missing_caption", on_missing_caption, _CHOICES),
            ("on_bad_clip", on_bad_clip, _CHOICES),
            ("scan", scan, ("headers", "decode", None)),
            ("decoder", decoder, DECODERS),
        ):
            if value not in choices:
                raise ValueError(f"data.{name}={value!r}: expected one of {', '.join(map(str, choices))}")
        self.num_frames, self.frame_multiple = num_frames, frame_multiple
        self.size = (height, width)
        self.fps, self.skip_frames = float(fps), skip_frames
        self.crop, self.seed = crop, seed
        self.on_bad_clip, self.max_bad_fraction = on_bad_clip, max_bad_fraction
        self.decoder = decoder

        self.roots = [Path(p) for p in ([path] if isinstance(path, str | Path) else path)]
        clips, self.layouts = self._find(self.roots, layout, video_column, caption_column)
        self.skipped: dict[str, str] = {}  # key -> reason
        self.flagged: dict[str, str] = {}  # used, but not at the wanted frame rate
        with_caption = [clip for clip in clips if clip.caption is not None]
        missing = {clip.key: "has no caption" for clip in clips if clip.caption is None}
        self._refuse_or_skip(missing, on_missing_caption, "on_missing_caption", len(clips))
        bad = {} if scan is None else self._scan(with_caption, decode=scan == "decode")
        self._refuse_or_skip(bad, on_bad_clip, "on_bad_clip", len(clips))
        self.clips = [clip for clip in with_caption if clip.key not in bad]
        if len(self.skipped) > max_bad_fraction * len(clips) or not self.clips:
            raise ValueError(
                f"{len(self.skipped)} of {len(clips)} clips are unusable, more than data.max_bad_fraction="
                f"{max_bad_fraction}:\n{_listed(self.skipped)}"
            )
        if self.skipped or self.flagged:
            logger.warning("%s", self.report())

    @staticmethod
    def _find(
        roots: list[Path], layout: str | None, video_column: str | None, caption_column: str | None
    ) -> tuple[list[Clip], list[str]]:
        if not roots:
            raise ValueError("data.path is an empty list: expected at least one folder")
        clips, layouts = [], []
        for root in roots:
            name, found = find_clips(root, layout, video_column, caption_column)
            layouts.append(name)
            prefix = f"{root.as_posix()}/" if len(roots) > 1 else ""
            clips += [Clip(prefix + clip.key, clip.path, clip.caption) for clip in found]
        repeated = [key for key, count in Counter(clip.key for clip in clips).items() if count > 1]
        if repeated:
            raise ValueError(f"data.path: listed more than once: {', '.join(repeated[:3])}")
        return clips, layouts

    def _refuse_or_skip(self, reasons: dict[str, str], choice: str, option: str, total: int) -> None:
        if reasons and choice == "error":
            raise ValueError(
                f"{len(reasons)} of {total} clips cannot be used:\n{_listed(reasons)}\n"
                f"Mend them, or set data.{option}=skip to leave them out"
            )
        self.skipped |= reasons

    def _scan(self, clips: list[Clip], decode: bool) -> dict[str, str]:
        """key -> reason of the bad ones; flags the clips at another frame rate."""

        def look(clip: Clip) -> tuple[str | None, str | None]:
            try:
                if decode:
                    verify_video(clip.path)
                selection = self._select(clip)[1]
            except VideoError as error:
                return str(error), None
            if selection.has_wrong_fps:
                return None, f"gives {selection.fps:.2f} distinct frames per second instead of {self.fps:g}"
            return None, None

        bad: dict[str, str] = {}
        with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as threads:  # FFmpeg releases the GIL
            for clip, (reason, flag) in zip(clips, threads.map(look, clips), strict=True):
                if reason is not None:
                    bad[clip.key] = reason
                if flag is not None:
                    self.flagged[clip.key] = flag
        return bad

    def _select(self, clip: Clip) -> tuple[VideoReader, FrameSelection]:
        """An open reader and exactly num_frames frames of it; VideoError where the video is too short."""
        reader = open_video(clip.path, self.decoder)
        selection = select_frames(
            reader.timestamps, self.fps, self.num_frames, self.skip_frames, self.frame_multiple
        )
        if len(selection.indices) != self.num_frames:
            usable = max(0, reader.num_frames - 2 * self.skip_frames)
            raise VideoError(
                f"{clip.path}: too short, {usable} usable frames at {reader.average_fps:.4g} fps give "
                f"{len(selection.indices)} frames at {self.fps:g} fps; data.num_frames={self.num_frames}"
            )
        return reader, selection

    def report(self) -> str:
        """Counts, then every skipped and flagged clip with its reason."""
        lines = [f"{len(self.clips)} clips in the layout {', '.join(dict.fromkeys(self.layouts))}"]
        if self.skipped:
            lines += [f"{len(self.skipped)} skipped:", _listed(self.skipped, limit=None)]
        if self.flagged:
            lines += [
                f"{len(self.flagged)} at another frame rate than asked:",
                _listed(self.flagged, limit=None),
            ]
        return "\n".join(lines)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        return self.item(index, epoch=0)

    def item(self, index: int, epoch: int) -> dict:
        """The clip as this epoch shows it (the crop may be random). ``VideoError`` where it cannot be decoded."""
        clip = self.clips[index]
        reader, selection = self._select(clip)
        generator = None
        if self.crop == "random":
            text = f"{self.seed}/{epoch}/{clip.key}"
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        video = self._read(reader, selection.indices, generator)
        return {"video": video, "caption": clip.caption, "key": clip.key, "fps": selection.fps}

    def _read(self, reader: VideoReader, indices: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """(num_frames, 3, H, W) uint8. Each picture is brought to its size as it comes, so that only one is whole."""
        height, width = self.size
        video = torch.empty(len(indices), 3, height, width, dtype=torch.uint8)
        places = defaultdict(list)  # a slow source shows a frame more than once
        for place, index in enumerate(indices):
            places[index].append(place)
        shape, top, left = None, 0, 0
        for index, picture in reader.frames(indices):
            if shape is None:
                shape = picture.shape
                top, left = crop_corner(cover_size(shape[:2], self.size), self.size, self.crop, generator)
            if picture.shape != shape:
                raise VideoError(
                    f"{reader.path}: its pictures change from {shape[:2]} to {picture.shape[:2]}"
                )
            # The batch's dimension first: only so does torch see that the channels come last.
            resized = resize_to_cover(torch.from_numpy(picture[None]).permute(0, 3, 1, 2), self.size)
            video[places[index]] = resized[..., top : top + height, left : left + width]
        return video

    def describe(self, index: int) -> dict:
        """The item without its pixels: caption and key."""
        return {"caption": self.clips[index].caption, "key": self.clips[index].key}

    def fingerprint(self) -> str:
        """Of the whole set, for the records of a run; see ``fingerprint.py``."""
        roots = [root.parent if root.is_file() else root for root in self.roots]
        return clips_fingerprint(self.clips, roots, self._settings())

    @property
    def varies_by_epoch(self) -> bool:
        """Whether ``item(index, epoch)`` depends on the epoch."""
        return self.crop == "random"

    def clip_path(self, index: int) -> Path:
        """The clip's video file."""
        return self.clips[index].path

    def clip_fingerprint(self, index: int, digest: Callable[[Path], str] | None = None) -> str:
        """Text that changes whenever the pixels of ``self[index]`` may change: the file's bytes, which of its frames
        are taken and what is done to them.

        digest: of a file's bytes; a callable that remembers what it read saves the time of reading it again.
        """
        read = (digest or FileDigests(None))(self.clip_path(index))
        rules = f"{FRAME_RULE}; {DECODE_RULES[self.decoder]}; {RESIZE_RULE}"
        return f"{read} {rules} {self._settings()}"

    def _settings(self) -> list:
        """All that changes which pixels of a file are seen."""
        settings = [self.num_frames, self.frame_multiple, self.size, self.fps, self.skip_frames, self.crop]
        return [*settings, self.seed] if self.crop == "random" else settings


def _listed(reasons: dict[str, str], limit: int | None = 10) -> str:
    lines = [f"  {key}: {reason}" for key, reason in list(reasons.items())[:limit]]
    if limit is not None and len(reasons) > limit:
        lines.append(f"  ... and {len(reasons) - limit} more")
    return "\n".join(lines)
