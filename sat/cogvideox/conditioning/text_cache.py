"""Encoded captions on disk, one entry each, so that training needs no text encoder.

An entry is a file of ``features.py`` with one prompt, under the digest of caption, length and encoder: the folder of
one encoder can be given to ``sample.text_features`` as it is. Dropped captions are zeros and need no entry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cogvideox.cache.entries import EntryFolder, is_whole
from cogvideox.cache.ranks import Ranks
from cogvideox.conditioning.features import feature_key, read_features, write_features


class TextCache:
    """The features of captions by one text encoder.

    entries: its folder; ``entries.maker`` identifies the encoder.  max_length, width: L and D.
    memory_limit_gib: see ``hold``.
    """

    def __init__(self, entries: EntryFolder, max_length: int, width: int, memory_limit_gib: float = 1.0):
        self.entries, self.max_length, self.width = entries, max_length, width
        self.memory_limit_gib = memory_limit_gib
        self._memory: dict[str, Tensor] = {}
        self._known: set[str] = set()  # captions whose entries were looked at

    def path(self, caption: str) -> Path:
        # All in one folder, which sample.text_features can read.
        return (
            self.entries.folder / f"{feature_key(caption, self.max_length, self.entries.maker)}.safetensors"
        )

    def __contains__(self, caption: str) -> bool:
        if caption not in self._known and is_whole(self.path(caption), set()):
            self._known.add(caption)
        return caption in self._known

    def missing(self, captions: Iterable[str], ranks: Ranks) -> list[str]:
        """Of the captions, each once, those without a whole entry. Every rank looks at a part and learns of all."""
        distinct = list(dict.fromkeys(captions))
        mine = distinct[ranks.rank :: ranks.world_size]
        absent = ranks.merged({caption: True for caption in mine if caption not in self})
        self._known = {caption for caption in distinct if caption not in absent}
        return [caption for caption in distinct if caption in absent]

    def fill(
        self,
        captions: Sequence[str],
        encode: Callable[[str], Tensor],
        ranks: Ranks,
        advance: Callable[[int], object] = lambda taken: None,
    ) -> None:
        """Encode and write, shared out over the ranks. captions: distinct, the same list on every rank.

        encode: a caption -> (L, D).  advance(n): n captions are taken by all ranks together.
        """
        ticket = ranks.tickets()
        while (place := ticket()) < len(captions):
            advance(place + 1)
            features = {captions[place]: encode(captions[place]).detach()}
            write = functools.partial(
                write_features, features=features, encoder=self.entries.maker, metadata={}
            )
            self.entries.write(self.path(captions[place]), write)
        ranks.gather(None)  # all are written
        self._known |= set(captions)

    def hold(self, captions: Iterable[str]) -> None:
        """Keep the features of all captions in memory if they need no more than ``memory_limit_gib``.

        Before the loader's processes start: they share what is there then.
        """
        captions = list(dict.fromkeys(captions))
        size = sum(self.path(caption).stat().st_size for caption in captions)
        if size <= self.memory_limit_gib * 2**30:
            self._memory = {caption: self.read(caption) for caption in captions}

    def read(self, caption: str) -> Tensor:
        """(L, D) on the CPU, in the encoder's dtype.  ValueError where the entry is missing or damaged."""
        if caption in self._memory:
            return self._memory[caption]
        return read_features(self.path(caption), caption, self.max_length, self.width, self.entries.maker)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, L, D) on the CPU."""
        return torch.stack([self.read(caption) for caption in captions])
