"""The demo's clips: drawn as mp4 files with captions, then checked by the detector that will judge the samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from cogvideox.data.moving_shapes import FPS, Combination, make_dataset
from cogvideox.sampling.video_io import write_video
from scripts.demo.scores import Verdict, judge, score

if TYPE_CHECKING:
    from scripts.demo.plan import Demo

# The detector must know true clips, or its scores of sampled ones say nothing.
LOWEST_SCORE_OF_REAL_CLIPS = 0.98


def draw_and_check(demo: Demo) -> None:
    """Write ``data/{vae,train,validation,held_out,lora}`` in SAT's layout (videos/, labels/) and check every clip.

    The VAE's set holds the new colour too: it learns to encode pixels, without captions. The transformer's does not.
    """
    clip, scale = demo.config.data, demo.scale
    if clip.fps != FPS or clip.height != clip.width:
        raise ValueError(
            f"data.fps={clip.fps}, {clip.height}x{clip.width}: the drawn clips are square, at {FPS} fps"
        )
    sets = {
        "vae": (demo.seen + demo.new, scale.vae_clips),
        "train": (demo.seen, scale.clips),
        "validation": (demo.seen, scale.few_clips),
        "held_out": (demo.held_out, scale.few_clips),
        "lora": (demo.new, scale.few_clips),
    }
    total = sum(len(combos) * clips for combos, clips in sets.values())
    written: dict[Path, Combination] = {}
    with tqdm(total=total, desc="drawing", unit="clip") as bar:

        def write(path: Path, video, fps: float, **options) -> None:
            write_video(path, video, fps, **options)
            bar.update()

        for seed, (name, (combos, clips)) in enumerate(sets.items()):
            paths = make_dataset(
                demo.data(name),
                combos,
                clips,
                seed,
                write_video=write,
                num_frames=clip.num_frames,
                size=clip.height,
                held_out=demo.held_out,
            )
            written |= dict(zip(paths, (combo for combo in combos for _ in range(clips)), strict=True))
    check([judge(path, wanted) for path, wanted in tqdm(written.items(), desc="checking", unit="clip")])


def check(verdicts: Sequence[Verdict]) -> None:
    """ValueError where the detector does not find in true clips what was drawn; names the first ones."""
    found = score(verdicts)["all"]
    if found < LOWEST_SCORE_OF_REAL_CLIPS:
        wrong = [v for v in verdicts if not v.all_right]
        examples = "; ".join(
            f"{v.video}: drawn {'/'.join(v.wanted)}, found {'/'.join(v.found)}" for v in wrong[:3]
        )
        raise ValueError(
            f"the detector recognises {found:.3f} of the drawn clips, expected {LOWEST_SCORE_OF_REAL_CLIPS} or more: "
            f"{len(wrong)} of {len(verdicts)} are wrong, such as {examples}"
        )
