"""The latent cache: each latent once, whole or not at all, computed anew when anything changes."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from cogvideox.cache import digests
from cogvideox.cache.digests import FileDigests, tensors_digest
from cogvideox.cache.entries import DamagedEntry, EntryFolder, is_whole, read_tensors
from cogvideox.cache.ranks import Ranks
from cogvideox.data.latent_cache import LatentCache
from cogvideox.data.loader import ResumableLoader
from cogvideox.data.reader import VideoError
from cogvideox.data.with_text import WithTextFeatures


class Clips(torch.utils.data.Dataset):
    on_bad_clip, max_bad_fraction = "error", 0.5

    def __init__(self, n: int, bad=()):
        self.values, self.bad, self.reads = list(range(n)), set(bad), 0

    def __len__(self) -> int:
        return len(self.values)

    def describe(self, index: int) -> dict:
        return {"caption": f"caption {index}", "key": f"videos/clip {index}.mp4"}

    def clip_fingerprint(self, index: int, digest) -> str:
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

    def __init__(self, die_after: int | None = None, seconds: float = 0.0):
        self.clips, self.die_after, self.seconds = 0, die_after, seconds

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        assert video.dtype == torch.uint8
        if self.clips == self.die_after:
            raise KeyboardInterrupt
        time.sleep(self.seconds)
        self.clips += len(video)
        return video[:, ::4, :1, :2, :2].float().expand(-1, -1, 4, -1, -1)


def folder_of(root: Path, vae: str = "vae") -> EntryFolder:
    return EntryFolder(root, "latents", {"weights": vae}, config_key="data.latent_cache")


def cache_of(clips: Clips, root: Path, vae: str = "vae", **options) -> LatentCache:
    cache = LatentCache(clips, folder_of(root, vae), **options)
    cache.look()
    return cache


def fill(cache: LatentCache, encode=None, **options) -> int:
    """How many were computed."""
    encode = encode or Encode()
    cache.load(cache.fill(encode, **options))
    return encode.clips


@pytest.mark.parametrize("memory_limit_gib", [0, 1])
def test_items_carry_moments_in_place_of_videos(tmp_path, memory_limit_gib):
    clips = Clips(5)
    cache = cache_of(clips, tmp_path, memory_limit_gib=memory_limit_gib)
    assert fill(cache, batch_size=2) == 5
    assert len(cache) == 5
    assert set(cache[3]) == {"moments", "caption", "key"} and cache[3]["caption"] == "caption 3"
    assert torch.equal(cache[3]["moments"], torch.full((3, 4, 2, 2), 3.0))
    reads = clips.reads
    batch = next(ResumableLoader(cache, 4, seed=0).iterate())
    assert batch["moments"].shape == (4, 3, 4, 2, 2) and len(batch["caption"]) == 4
    assert clips.reads == reads  # no video is opened any more


@pytest.mark.parametrize("num_workers", [0, 1])
def test_text_features_come_with_the_items_of_a_loader(tmp_path, num_workers):
    cache = cache_of(Clips(4), tmp_path)
    fill(cache)
    both = WithTextFeatures(cache, lambda caption: torch.full((2, 3), float(caption.split()[1])))
    batches = ResumableLoader(both, 2, seed=0, num_workers=num_workers).iterate()
    batch = next(batches)
    batches.close()
    values = [float(caption.split()[1]) for caption in batch["caption"]]
    assert batch["text_features"].shape == (2, 2, 3) and batch["text_features"][:, 0, 0].tolist() == values
    assert batch["moments"][:, 0, 0, 0, 0].tolist() == values


def test_a_damaged_text_entry_is_a_clip_that_the_loader_can_leave_out(tmp_path):
    def read(caption: str) -> torch.Tensor:
        if caption == "caption 1":
            raise ValueError("x.safetensors is damaged")
        return torch.zeros(1)

    clips = Clips(4)
    clips.on_bad_clip = "skip"
    loader = ResumableLoader(WithTextFeatures(clips, read), 4, seed=0)
    assert "caption 1" not in next(loader.iterate())["caption"]
    (entry,) = loader.quarantine.entries
    assert (entry["clip"], entry["reason"]) == (
        "videos/clip 1.mp4",
        "data.text_cache: x.safetensors is damaged",
    )


def test_a_second_run_computes_nothing_and_a_change_computes_only_itself(tmp_path):
    assert fill(cache_of(Clips(4), tmp_path)) == 4
    assert fill(cache_of(Clips(4), tmp_path)) == 0
    changed = Clips(4)
    changed.values[2] = 99
    cache = cache_of(changed, tmp_path)
    assert cache.missing == [2] and fill(cache) == 1
    assert cache[2]["moments"].unique().tolist() == [99]
    assert cache_of(Clips(4), tmp_path, "another vae").missing == [0, 1, 2, 3]
    (other,) = folder_of(tmp_path, "another vae").others()
    assert other.count == 5 and other.maker == {"weights": "vae"}


def test_an_entry_moved_to_the_folder_of_another_vae_is_not_found(tmp_path):
    fill(cache_of(Clips(1), tmp_path))
    shutil.copytree(folder_of(tmp_path).folder, folder_of(tmp_path, "another vae").folder)
    assert cache_of(Clips(1), tmp_path, "another vae").missing == [0]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(cache_of(Clips(6), tmp_path), Encode(die_after=4), batch_size=2)
    cache = cache_of(Clips(6), tmp_path)
    assert cache.missing == [4, 5] and fill(cache) == 2
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_a_cut_file_is_computed_anew_and_reported(tmp_path, caplog):
    cache = cache_of(Clips(2), tmp_path)
    fill(cache)
    cache.paths[1].write_bytes(cache.paths[1].read_bytes()[:-7])
    cache = cache_of(Clips(2), tmp_path)
    assert cache.missing == [1] and "1 entries are damaged" in caplog.text and "clip 1.mp4" in caplog.text
    assert fill(cache) == 1 and cache_of(Clips(2), tmp_path).missing == []


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    cache = cache_of(Clips(3), tmp_path)
    fill(cache)
    data = bytearray(cache.paths[1].read_bytes())
    data[-5] ^= 1
    cache.paths[1].write_bytes(data)
    assert is_whole(cache.paths[1], {"moments"}) and not is_whole(cache.paths[1], {"moments"}, deep=True)
    assert cache_of(Clips(3), tmp_path).missing == [1]  # small enough for memory: all are read at the start
    large = cache_of(Clips(3), tmp_path, memory_limit_gib=0)
    large.load()
    with pytest.raises(VideoError, match=r"data\.latent_cache: .*its checksum is wrong; delete it"):
        large[1]
    check = large.check((3, 4, 2, 2))
    assert check.sound == 2 and list(check.damaged) == ["videos/clip 1.mp4"] and not check.missing
    assert large.check((3, 4, 2, 4)).sound == 0  # another shape than the configuration's


class Board:
    """Ranks in threads of one process: gather by a barrier, tickets by one counter each."""

    def __init__(self, size: int):
        self.barrier, self.values = threading.Barrier(size, timeout=60), [None] * size
        self.counters, self.lock = {}, threading.Lock()

    def rank(self, rank: int) -> Ranks:
        made = itertools.count()

        def gather(value):
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        def tickets():
            with self.lock:
                counter = self.counters.setdefault(next(made), itertools.count())
            return counter.__next__

        return Ranks(rank, len(self.values), gather, tickets)


def test_ranks_share_what_is_missing_and_the_slow_one_does_less(tmp_path):
    fill(cache_of(Clips(40), tmp_path))
    missing = [4, 8, 12, 16, 20, 24, 28, 32, 36, 0]  # all of one rank's slice, if slices were the rule
    paths = cache_of(Clips(40), tmp_path).paths
    for index in missing:
        paths[index].unlink()
    board = Board(4)
    encoders = [Encode(seconds=0.3 if rank == 0 else 0.03) for rank in range(4)]
    caches: dict[int, LatentCache] = {}

    def work(rank: int) -> None:
        caches[rank] = cache_of(Clips(40), tmp_path, ranks=board.rank(rank))
        assert caches[rank].missing == sorted(missing)
        fill(caches[rank], encoders[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    counts = [encoder.clips for encoder in encoders]
    assert sum(counts) == 10 and counts[0] < max(counts)
    assert all(len(caches[rank]) == 40 for rank in range(4))


def test_bad_clips_are_an_error_that_lists_all_or_are_left_out_on_all_ranks(tmp_path, caplog):
    clips = Clips(4, bad=[1, 3])
    with pytest.raises(
        VideoError, match=r"2 of 4 clips have no latents:\n.*clip 1: damaged\n.*clip 3: damaged"
    ):
        fill(cache_of(clips, tmp_path))
    clips.on_bad_clip = "skip"
    cache = cache_of(clips, tmp_path)
    assert cache.missing == [1, 3]  # the good ones were kept
    fill(cache, batch_size=8)
    assert [cache[i]["caption"] for i in range(len(cache))] == ["caption 0", "caption 2"]
    assert cache.skipped["videos/clip 1.mp4"] == "clip 1: damaged" and "clip 3" in caplog.text
    clips.max_bad_fraction = 0.4
    with pytest.raises(ValueError, match=r"max_bad_fraction=0\.4"):
        fill(cache_of(clips, tmp_path))
    clips.bad = set()
    mended = cache_of(clips, tmp_path)
    assert fill(mended) == 2 and len(mended) == 4


def test_latents_that_are_not_finite_are_never_written(tmp_path):
    cache = cache_of(Clips(1), tmp_path)
    failed = cache.fill(lambda video: torch.full((1, 3, 4, 2, 2), float("nan")))
    assert failed == {"videos/clip 0.mp4": "its latents are NaN or infinite"}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_first_frame_is_kept_where_it_is_needed_and_completes_older_entries(tmp_path):
    fill(cache_of(Clips(2), tmp_path))
    cache = cache_of(Clips(2), tmp_path, first_frame=True)
    assert cache.missing == [0, 1] and fill(cache) == 2
    assert torch.equal(cache[1]["image"], torch.full((3, 8, 8), 1, dtype=torch.uint8))
    plain = cache_of(Clips(2), tmp_path)
    plain.load()
    assert plain.missing == [] and "image" not in plain[1]


def test_random_crops_are_refused(tmp_path):
    clips = Clips(1)
    clips.varies_by_epoch = True
    with pytest.raises(ValueError, match="crop=random asks for another one"):
        cache_of(clips, tmp_path)


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_told_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    with pytest.raises(ValueError, match=r"3 missing entries need 1\.50 GiB, the disk has 1\.00 GiB"):
        folder_of(tmp_path).check_room(3, 2**29)
    folder_of(tmp_path).check_room(2, 2**29)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="7 entries are missing and none can be written there"):
        folder_of(tmp_path / "file").check_room(7, 1)


def test_a_disk_that_fills_up_leaves_whole_entries_and_says_so(tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target):
        if "clip_1-" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"data\.latent_cache=.*the disk is full .*the same command goes on"):
        fill(cache_of(Clips(3), tmp_path))
    monkeypatch.undo()
    assert cache_of(Clips(3), tmp_path).missing == [1, 2]
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_a_complete_cache_that_cannot_be_written_is_used(tmp_path, monkeypatch):
    fill(cache_of(Clips(2), tmp_path))

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert fill(cache_of(Clips(2), tmp_path)) == 0


def test_a_file_that_is_no_entry_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no entry")
    with pytest.raises(DamagedEntry, match=r"x\.safetensors: damaged"):
        read_tensors(tmp_path / "x.safetensors", {"moments"})


# ----------------------------------------------------------------------------------------------------------- digests


def settled(path: Path, data: bytes) -> Path:
    """A file that was written a minute ago."""
    path.write_bytes(data)
    os.utime(path, (time.time() - 60,) * 2)
    return path


def test_a_files_digest_is_read_once_and_anew_after_any_change(tmp_path):
    data = bytes(5 << 20)
    path = settled(tmp_path / "a.mp4", data)
    first = FileDigests(tmp_path / "index")
    digest = first(path)
    assert digest == digests.hashlib.sha256(data).hexdigest() and first.hashed_bytes == len(data)
    second = FileDigests(tmp_path / "index", writer="1")  # another process, another rank
    assert second(path) == digest and second.hashed_bytes == 0
    changed = data[: 2 << 20] + b"1" + data[(2 << 20) + 1 :]  # one byte in the middle, the same length
    path.write_bytes(changed)
    assert second(path) == digests.hashlib.sha256(changed).hexdigest()


def test_a_file_that_was_just_written_is_not_remembered(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"first")
    remembering = FileDigests(tmp_path / "index")
    first, stamp = remembering(path), path.stat()
    path.write_bytes(b"other")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # within the resolution of the time stamp
    assert remembering(path) != first


def test_a_line_cut_by_a_kill_costs_only_its_file(tmp_path):
    paths = [settled(tmp_path / name, name.encode()) for name in "ab"]
    FileDigests(tmp_path / "index").read_ahead(paths)
    index = tmp_path / "index" / "0.jsonl"
    index.write_text(index.read_text()[:-9])
    again = FileDigests(tmp_path / "index")
    again.read_ahead(paths)
    assert again.hashed_bytes == 1


def test_the_digest_of_weights_sees_every_number():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    first = tensors_digest(weights)
    assert first == tensors_digest(dict(reversed(weights.items())))  # order of the dict is no matter
    weights["a"][1, 2] += 1e-6
    assert first != tensors_digest(weights)
