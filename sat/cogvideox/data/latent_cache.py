"""Latents computed once per clip and kept on disk: the VAE is the larger part of a small model's training step.

What is kept are the moments (mean | logvar) of the posterior, so that training still draws a new sample each time.
A file's name holds a fingerprint of the clip's contents, the frame and size settings and the VAE's weights: change any
of them and the latent is computed anew. Each file is written whole or not at all, so a killed run goes on where it was.
The folder can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cogvideox.data.fingerprint import dataset_fingerprint
from cogvideox.data.reader import VideoError

logger = logging.getLogger(__name__)


def weights_fingerprint(tensors: Mapping[str, Tensor], *settings: object) -> str:
    """Digest of named tensors (a state dict), and of whatever else changes the encoder's output (frames per pass)."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class LatentCache(Dataset):
    """A dataset of ``{"moments": (T, 2z, H, W), "caption", "key"}`` in place of videos.

    dataset: items with "video" (F, 3, H, W), and ``describe(index)`` and ``clip_fingerprint(index)`` as ``VideoFolder``
        has; of random crops the first epoch's are kept.
    encoder_fingerprint: ``weights_fingerprint(vae.state_dict(), ...)``.
    memory_limit_gib: latents are held in memory if all of them need no more than this; 0 always reads from the disk.

    First ``fill`` on every rank, then a barrier, then ``load`` on every rank.
    """

    def __init__(
        self, dataset: Dataset, folder: str | Path, encoder_fingerprint: str, memory_limit_gib: float = 1.0
    ):
        self.dataset = dataset
        self.folder = Path(folder)
        self.memory_limit_gib = memory_limit_gib
        self.on_bad_clip = getattr(dataset, "on_bad_clip", "error")
        self.max_bad_fraction = getattr(dataset, "max_bad_fraction", 0.0)
        self.paths = [self._path(index, encoder_fingerprint) for index in range(len(dataset))]
        self.skipped: dict[str, str] = {}
        self._indices: list[int] | None = None  # of the clips that have latents; known after load
        self._memory: list[Tensor] | None = None

    def _path(self, index: int, encoder_fingerprint: str) -> Path:
        text = f"{self.dataset.clip_fingerprint(index)} {encoder_fingerprint}"
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        stem = re.sub(r"[^\w.-]", "_", Path(self.dataset.describe(index)["key"]).stem)[:60]
        return self.folder / digest[:2] / f"{stem}-{digest}.safetensors"

    def missing(self) -> list[int]:
        """Indices whose latents are not on the disk, or not whole."""
        return [index for index, path in enumerate(self.paths) if not _is_whole(path)]

    def fill(
        self,
        encode: Callable[[Tensor], Tensor],
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        show_progress: bool = True,
    ) -> int:
        """Compute this rank's share of the missing latents; returns how many were computed.

        encode: (B, F, 3, H, W) uint8 -> moments (B, T, 2z, H, W), on any device, kept in the dtype it returns.
        A clip that cannot be read is an error, or with on_bad_clip="skip" is noted for ``load`` on all ranks.
        """
        # A share is a slice of all clips, not of the missing ones: ranks look at the disk at different moments.
        mine = [
            index for index in range(rank, len(self.paths), world_size) if not _is_whole(self.paths[index])
        ]
        done = 0
        with tqdm(total=len(mine), desc="latents", unit="clip", disable=not show_progress) as progress:
            for indices, video in self._readable_batches(mine, batch_size):
                with torch.no_grad():
                    moments = encode(video)
                for index, one in zip(indices, moments, strict=True):
                    self._save(index, one)
                done += len(indices)
                progress.update(len(indices))
        return done

    def _readable_batches(self, indices: list[int], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """(indices, videos) in batches, clips that fail noted and left out."""
        batch: list[tuple[int, Tensor]] = []
        for index in indices:
            note = _failure_note(self.paths[index])
            note.unlink(missing_ok=True)  # of an earlier run: the file may have been mended by other means
            try:
                batch.append((index, self.dataset[index]["video"]))
            except VideoError as error:
                if self.on_bad_clip != "skip":
                    raise
                _write_whole(note, lambda path, text=str(error): path.write_text(text, encoding="utf-8"))
            if len(batch) == batch_size:
                yield [i for i, _ in batch], torch.stack([video for _, video in batch])
                batch = []
        if batch:
            yield [i for i, _ in batch], torch.stack([video for _, video in batch])

    def _save(self, index: int, moments: Tensor) -> None:
        if not bool(torch.isfinite(moments).all()):
            raise ValueError(f"{self.dataset.describe(index)['key']}: its latents are NaN or infinite")
        tensors = {"moments": moments.detach().cpu().clone(memory_format=torch.contiguous_format)}
        _write_whole(self.paths[index], lambda path: save_file(tensors, path))

    def load(self) -> None:
        """Make the items available, the same ones on every rank. Call after all ranks have filled their shares.

        ValueError where latents are missing without a reason, or where too many clips failed.
        """
        self.skipped, absent = {}, []
        for index in self.missing():
            note, key = _failure_note(self.paths[index]), self.dataset.describe(index)["key"]
            if note.is_file():
                self.skipped[key] = note.read_text(encoding="utf-8")
            else:
                absent.append(key)
        if absent:
            raise ValueError(
                f"{self.folder}: {len(absent)} clips have no latents yet, first {absent[0]}; fill the cache"
            )
        if self.skipped:
            listed = "\n".join(f"  {key}: {reason}" for key, reason in self.skipped.items())
            message = f"{len(self.skipped)} of {len(self.paths)} clips have no latents:\n{listed}"
            if len(self.skipped) > self.max_bad_fraction * len(self.paths):
                raise ValueError(f"{message}\nMore than data.max_bad_fraction={self.max_bad_fraction}")
            logger.warning("%s", message)
        self._indices = [
            i for i in range(len(self.paths)) if self.dataset.describe(i)["key"] not in self.skipped
        ]
        size = sum(self.paths[index].stat().st_size for index in self._indices)
        self._memory = None
        if size <= self.memory_limit_gib * 2**30:
            self._memory = [_read(self.paths[index]) for index in self._indices]

    def __len__(self) -> int:
        return len(self._loaded())

    def __getitem__(self, place: int) -> dict:
        index = self._loaded()[place]
        moments = _read(self.paths[index]) if self._memory is None else self._memory[place]
        return {"moments": moments, **self.dataset.describe(index)}

    def describe(self, place: int) -> dict:
        """The item without its latents: caption and key."""
        return self.dataset.describe(self._loaded()[place])

    def fingerprint(self) -> str | None:
        """That of the videos: a cache changes where latents come from, not what they are."""
        return dataset_fingerprint(self.dataset)

    def _loaded(self) -> list[int]:
        assert self._indices is not None, "LatentCache.load() comes first"
        return self._indices


def _failure_note(path: Path) -> Path:
    return path.with_suffix(".failed.txt")


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:  # compares the file's length with its header
            return "moments" in file.keys()
    except (FileNotFoundError, SafetensorError):
        return False


def _read(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("moments")


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name of this process, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
