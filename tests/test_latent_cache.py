"""The latent cache: each latent once, whole or not at all, computed anew when anything changes."""

from __future__ import annotations

import pytest
import torch

from cogvideox.data.latent_cache import LatentCache, weights_fingerprint
from cogvideox.data.loader import ResumableLoader
from cogvideox.data.reader import VideoError


class Clips(torch.utils.data.Dataset):
    on_bad_clip, max_bad_fraction = "error", 0.5

    def __init__(self, n: int, bad=()):
        self.values, self.bad, self.reads = list(range(n)), set(bad), 0

    def __len__(self) -> int:
        return len(self.values)

    def describe(self, index: int) -> dict:
        return {"caption": f"caption {index}", "key": f"videos/clip {index}.mp4"}

    def clip_fingerprint(self, index: int) -> str:
        return f"content {self.values[index]}"

    def __getitem__(self, index: int) -> dict:
        if index in self.bad:
            raise VideoError(f"clip {index}: damaged")
        self.reads += 1
        return {
            "video": torch.full((9, 3, 8, 8), self.values[index], dtype=torch.uint8),
            **self.describe(index),
        }


class Encode:
    """(B, 9, 3, 8, 8) -> (B, 3, 4, 2, 2), full of the clip's value; counts, and can be killed."""

    def __init__(self, die_after: int | None = None):
        self.clips, self.die_after = 0, die_after

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        assert video.dtype == torch.uint8
        if self.clips == self.die_after:
            raise KeyboardInterrupt
        self.clips += len(video)
        return video[:, ::4, :1, :2, :2].float().expand(-1, -1, 4, -1, -1)


def fill(cache: LatentCache, encode=None, **options) -> int:
    return cache.fill(encode or Encode(), show_progress=False, **options)


@pytest.mark.parametrize("memory_limit_gib", [0, 1])
def test_items_carry_moments_in_place_of_videos(tmp_path, memory_limit_gib):
    clips = Clips(5)
    cache = LatentCache(clips, tmp_path, "vae", memory_limit_gib)
    assert fill(cache, batch_size=2) == 5
    cache.load()
    assert len(cache) == 5
    assert set(cache[3]) == {"moments", "caption", "key"} and cache[3]["caption"] == "caption 3"
    assert torch.equal(cache[3]["moments"], torch.full((3, 4, 2, 2), 3.0))
    reads = clips.reads
    batch = next(ResumableLoader(cache, 4, seed=0).iterate())
    assert batch["moments"].shape == (4, 3, 4, 2, 2) and len(batch["caption"]) == 4
    assert clips.reads == reads  # no video is opened any more


def test_a_second_run_computes_nothing_and_a_change_computes_only_itself(tmp_path):
    assert fill(LatentCache(Clips(4), tmp_path, "vae")) == 4
    assert fill(LatentCache(Clips(4), tmp_path, "vae")) == 0
    changed = Clips(4)
    changed.values[2] = 99
    cache = LatentCache(changed, tmp_path, "vae")
    assert cache.missing() == [2] and fill(cache) == 1
    cache.load()
    assert cache[2]["moments"].unique().tolist() == [99]
    assert LatentCache(Clips(4), tmp_path, "another vae").missing() == [0, 1, 2, 3]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(LatentCache(Clips(6), tmp_path, "vae"), Encode(die_after=4), batch_size=2)
    cache = LatentCache(Clips(6), tmp_path, "vae")
    assert cache.missing() == [4, 5]
    with pytest.raises(ValueError, match="2 clips have no latents yet, first videos/clip 4.mp4"):
        cache.load()
    assert fill(cache) == 2
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_a_cut_file_is_computed_anew(tmp_path):
    cache = LatentCache(Clips(2), tmp_path, "vae")
    fill(cache)
    cache.paths[1].write_bytes(cache.paths[1].read_bytes()[:-7])
    assert cache.missing() == [1] and fill(cache) == 1 and cache.missing() == []


def test_ranks_share_the_work(tmp_path):
    counts = [
        fill(LatentCache(Clips(7), tmp_path, "vae"), rank=rank, world_size=3, batch_size=2)
        for rank in range(3)
    ]
    assert counts == [3, 2, 2]
    LatentCache(Clips(7), tmp_path, "vae").load()


def test_a_bad_clip_is_an_error_or_is_left_out_on_all_ranks(tmp_path, caplog):
    clips = Clips(4, bad=[1, 3])
    with pytest.raises(VideoError, match="clip 1: damaged"):
        fill(LatentCache(clips, tmp_path, "vae"))
    clips.on_bad_clip = "skip"
    cache = LatentCache(clips, tmp_path, "vae")
    fill(cache, batch_size=8)
    other_rank = LatentCache(clips, tmp_path, "vae")  # has not seen the failures itself
    other_rank.load()
    assert [other_rank[i]["caption"] for i in range(len(other_rank))] == ["caption 0", "caption 2"]
    assert other_rank.skipped["videos/clip 1.mp4"] == "clip 1: damaged" and "clip 3" in caplog.text
    clips.max_bad_fraction = 0.4
    with pytest.raises(ValueError, match="max_bad_fraction=0.4"):
        LatentCache(clips, tmp_path, "vae").load()
    clips.bad, clips.max_bad_fraction = set(), 0.5
    mended = LatentCache(clips, tmp_path, "vae")
    assert fill(mended) == 2
    mended.load()
    assert len(mended) == 4


def test_latents_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match="clip 0.mp4: its latents are NaN"):
        fill(LatentCache(Clips(1), tmp_path, "vae"), lambda video: torch.full((1, 3, 4, 2, 2), float("nan")))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_weights_fingerprint_sees_every_number():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    first = weights_fingerprint(weights, 8)
    assert first == weights_fingerprint(dict(reversed(weights.items())), 8)  # order of the dict is no matter
    assert first != weights_fingerprint(weights, None)
    weights["a"][1, 2] += 1e-6
    assert first != weights_fingerprint(weights, 8)
