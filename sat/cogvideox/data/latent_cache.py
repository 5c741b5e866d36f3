"""A dataset whose videos are latents, computed once per clip and kept on disk: training then needs no VAE.

What is kept are the moments (mean | logvar) of the posterior, so that training still draws a new sample each time.
An entry's name holds a digest of the video file's bytes, of which frames are taken, at which rate, and how they are
resized and cut; its folder is that of one VAE (``cache/entries.py``). Change any of them and the latents are computed
anew, beside the old ones.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cogvideox.cache.digests import FileDigests
from cogvideox.cache.entries import DamagedEntry, EntryFolder, digest_of, is_whole, read_tensors
from cogvideox.cache.ranks import Ranks
from cogvideox.data.fingerprint import dataset_fingerprint
from cogvideox.data.reader import VideoError

logger = logging.getLogger("cogvideox")


@dataclass
class EntryCheck:
    """What ``LatentCache.check`` found: clip's key -> reason, and how many entries are sound."""

    sound: int
    missing: dict[str, str]
    damaged: dict[str, str]


class LatentCache(Dataset):
    """A dataset of ``{"moments": (T, 2z, H, W), "caption", "key"}`` in place of videos.

    dataset: items with "video" (F, 3, H, W), and ``describe(index)`` and ``clip_fingerprint(index, digest)`` as
        ``VideoFolder`` has. One whose items change from epoch to epoch (``varies_by_epoch``) is refused.
    entries: the folder of the VAE that ``fill`` is given.  digest: of the bytes of a file.
    first_frame: items also have ``image`` (3, H, W), the clip's first frame as the dataset gives it, for conditions
        that noise its pixels in every step.
    memory_limit_gib: latents are held in memory if all of them need no more than this; 0 always reads from the disk.

    First ``look`` on every rank, then ``fill``, then ``load``: all three exchange between the ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        entries: EntryFolder,
        digest: Callable[[Path], str] | None = None,
        *,
        first_frame: bool = False,
        memory_limit_gib: float = 1.0,
        ranks: Ranks | None = None,
    ):
        if getattr(dataset, "varies_by_epoch", False):
            raise ValueError(
                "data.latent_cache keeps one picture of each clip, and data.params.crop=random asks for another one "
                "in every epoch: set crop=center, or data.latent_cache=null"
            )
        self.dataset, self.entries = dataset, entries
        self.digest = digest or FileDigests(None)
        self.names = {"moments", "image"} if first_frame else {"moments"}
        self.memory_limit_gib, self.ranks = memory_limit_gib, ranks or Ranks()
        self.on_bad_clip = getattr(dataset, "on_bad_clip", "error")
        self.max_bad_fraction = getattr(dataset, "max_bad_fraction", 0.0)
        self.paths: list[Path] = []  # of the entries, by index; known after look
        self.missing: list[int] = []  # indices without a whole entry; known after look
        self.skipped: dict[str, str] = {}
        self._indices: list[int] | None = None  # of the clips that have latents; known after load
        self._memory: list[dict[str, Tensor]] | None = None

    def look(self) -> list[int]:
        """Find each clip's entry; returns the indices of those that have none, or one that is not whole.

        Each rank reads a part of the videos (their bytes are hashed, unless remembered) and of the entries.
        """
        count, ranks = len(self.dataset), self.ranks
        mine = range(ranks.rank, count, ranks.world_size)
        if isinstance(self.digest, FileDigests) and hasattr(self.dataset, "clip_path"):
            self.digest.read_ahead(self.dataset.clip_path(index) for index in mine)
        paths = ranks.merged({index: self._path(index) for index in mine})
        self.paths = [paths[index] for index in range(count)]
        # Entries that will be held in memory are read anyway: then their checksums are compared now.
        limit = self.memory_limit_gib * 2**30 / max(count, 1)
        bad = {}
        for index in mine:
            path = self.paths[index]
            size = path.stat().st_size if path.is_file() else 0
            if not is_whole(path, self.names, deep=size <= limit):
                bad[index] = size > 0
        bad = ranks.merged(bad)
        self.missing = sorted(bad)
        damaged = [index for index in self.missing if bad[index]]
        if damaged and ranks.is_main:
            logger.warning(
                "%s: %d entries are damaged or lack the first frame and are computed anew, first that of %s",
                self.entries.folder,
                len(damaged),
                self._key(damaged[0]),
            )
        return self.missing

    def _path(self, index: int) -> Path:
        fingerprint = self.dataset.clip_fingerprint(index, self.digest)
        stem = re.sub(r"[^\w.-]", "_", Path(self._key(index)).stem)[:60]
        return self.entries.path(f"{stem}-{digest_of([fingerprint, self.entries.maker])}")

    def _key(self, index: int) -> str:
        return self.dataset.describe(index)["key"]

    def fill(
        self,
        encode: Callable[[Tensor], Tensor],
        batch_size: int = 1,
        progress: tqdm | None = None,
    ) -> dict[str, str]:
        """Compute what is missing, shared out over the ranks; returns the clips that failed, key -> reason.

        encode: (B, F, 3, H, W) uint8 -> moments (B, T, 2z, H, W), on any device, kept in the dtype it returns.
        progress: of all ranks together; the same call on every rank.
        """
        failed: dict[str, str] = {}
        for indices, video in self._readable_batches(batch_size, failed, progress):
            with torch.no_grad():
                moments = encode(video).detach().cpu()
            for index, pixels, one in zip(indices, video, moments, strict=True):
                if not bool(torch.isfinite(one).all()):
                    failed[self._key(index)] = "its latents are NaN or infinite"
                    continue
                tensors = {"moments": one, "image": pixels[0]}
                # Not views: a file holds the whole storage of what it is given.
                whole = {
                    name: tensors[name].clone(memory_format=torch.contiguous_format) for name in self.names
                }
                self.entries.write_tensors(self.paths[index], whole)
        return self.ranks.merged(failed)

    def _readable_batches(
        self, batch_size: int, failed: dict[str, str], progress: tqdm | None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """(indices, videos) in batches, clips that cannot be read noted and left out."""
        batch: list[tuple[int, Tensor]] = []
        # Tickets, not slices: clips differ in length and ranks in speed, and no rank waits for the slowest.
        ticket = self.ranks.tickets()
        while (place := ticket()) < len(self.missing):
            if progress is not None:
                progress.update(place + 1 - progress.n)  # of the tickets that all ranks have taken
            index = self.missing[place]
            try:
                batch.append((index, self.dataset[index]["video"]))
            except VideoError as error:
                failed[self._key(index)] = str(error)
            if len(batch) == batch_size:
                yield [i for i, _ in batch], torch.stack([video for _, video in batch])
                batch = []
        if batch:
            yield [i for i, _ in batch], torch.stack([video for _, video in batch])

    def load(self, failed: dict[str, str] | None = None) -> None:
        """Make the items available, the same ones on every rank. failed: what ``fill`` returned.

        VideoError where a clip failed and ``on_bad_clip`` is "error"; ValueError where too many failed.
        """
        self.skipped = dict(failed or {})
        if self.skipped:
            listed = "\n".join(f"  {key}: {reason}" for key, reason in sorted(self.skipped.items()))
            message = f"{len(self.skipped)} of {len(self.paths)} clips have no latents:\n{listed}"
            if self.on_bad_clip != "skip":
                raise VideoError(f"{message}\nMend them, or set data.on_bad_clip=skip to leave them out")
            if len(self.skipped) > self.max_bad_fraction * len(self.paths):
                raise ValueError(f"{message}\nMore than data.max_bad_fraction={self.max_bad_fraction}")
            logger.warning("%s", message)
        self._indices = [index for index in range(len(self.paths)) if self._key(index) not in self.skipped]
        size = sum(self.paths[index].stat().st_size for index in self._indices)
        self._memory = None
        if size <= self.memory_limit_gib * 2**30:
            self._memory = [self._read(index) for index in self._indices]

    def check(self, shape: tuple[int, ...]) -> EntryCheck:
        """Read every entry of the dataset whole: checksum, finite numbers, moments of this shape (T, 2z, H, W)."""
        found = EntryCheck(0, {}, {})
        for index in range(self.ranks.rank, len(self.paths), self.ranks.world_size):
            key, path = self._key(index), self.paths[index]
            if not path.is_file():
                found.missing[key] = f"{path.name} is not there"
                continue
            try:
                moments = read_tensors(path, self.names)["moments"]
            except DamagedEntry as error:
                found.damaged[key] = str(error)
                continue
            if tuple(moments.shape) != shape or not bool(torch.isfinite(moments).all()):
                found.damaged[key] = f"{path}: {tuple(moments.shape)}, expected finite numbers {shape}"
            else:
                found.sound += 1
        parts = self.ranks.gather(found)
        return EntryCheck(
            sum(part.sound for part in parts),
            {key: reason for part in parts for key, reason in part.missing.items()},
            {key: reason for part in parts for key, reason in part.damaged.items()},
        )

    def _read(self, index: int) -> dict[str, Tensor]:
        try:
            tensors = read_tensors(self.paths[index], self.names)
        except DamagedEntry as error:
            raise VideoError(f"data.latent_cache: {error}") from error  # what the loader knows how to skip
        return {name: tensors[name] for name in sorted(self.names)}

    def __len__(self) -> int:
        return len(self._loaded())

    def __getitem__(self, place: int) -> dict:
        index = self._loaded()[place]
        tensors = self._read(index) if self._memory is None else self._memory[place]
        return {**tensors, **self.dataset.describe(index)}

    def describe(self, place: int) -> dict:
        """The item without its latents: caption and key."""
        return self.dataset.describe(self._loaded()[place])

    def fingerprint(self) -> str | None:
        """That of the videos: a cache changes where latents come from, not what they are."""
        return dataset_fingerprint(self.dataset)

    def _loaded(self) -> list[int]:
        assert self._indices is not None, "LatentCache.load() comes first"
        return self._indices
