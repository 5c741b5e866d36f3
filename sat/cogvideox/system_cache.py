"""The caches of a run: who made their entries, filling what is missing, and the datasets that read them.

Training fills them before any weight of the network is read (``with_caches``); ``scripts/cache_latents.py`` does the
same and nothing else. The VAE and the text encoder are built and read only where something is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cogvideox import dist
from cogvideox.cache.digests import FileDigests, tensors_digest
from cogvideox.cache.entries import EntryFolder, OtherFolder, digest_of, read_maker
from cogvideox.cache.ranks import Ranks
from cogvideox.conditioning.text import DTYPES as TEXT_DTYPES
from cogvideox.conditioning.text import TextCondition
from cogvideox.conditioning.text_cache import TextCache
from cogvideox.config import Config, ConfigError
from cogvideox.data.latent_cache import LatentCache
from cogvideox.data.with_text import WithTextFeatures
from cogvideox.system_text import load_text_weights, text_condition_alone, text_files, text_identity
from cogvideox.system_vae import DTYPES, FrozenVAE, vae_files, vae_identity
from cogvideox.system_weights import check_weights

logger = logging.getLogger("cogvideox")

LATENTS, TEXT = "latents", "text"


def with_caches(system: Any, sets: Sequence[Dataset], prompts: Sequence[str] = ()) -> list[Dataset]:
    """``sets`` with what the section ``data`` caches in place of videos and captions, every entry there.

    system: a VideoDiffusion without its weights, which are compared first (headers alone): a mistake there must not
    come after hours of encoding. prompts: of previews, encoded with the captions; the system finds them then.
    Every rank must call.
    """
    config = system.config
    if not hasattr(system, "frozen_vae"):
        keys = [key for key in ("latent_cache", "text_cache") if getattr(config.data, key)]
        raise ConfigError(f"data.{keys[0]}: {config.system.target} cannot use it; set it to null")
    check_weights(system)
    caches = Caches(config, run_ranks(), random_vae=system.frozen_vae)
    read = None
    if config.data.text_cache:
        captions = captions_of(sets)
        failed = caches.fill_text(captions, sampling_prompts(config, prompts))
        if failed:
            raise ValueError(f"data.text_cache: {len(failed)} captions cannot be encoded:\n{listed(failed)}")
        caches.text.hold(captions)
        read = caches.text.read
        for embedder in system.conditioner.embedders:
            if isinstance(embedder, TextCondition):
                embedder.cached = caches.text
    result = []
    for dataset in sets:
        if config.data.latent_cache:
            dataset = caches.latent_cache(dataset)
            dataset.load(caches.fill_latents(dataset))
        result.append(dataset if read is None else WithTextFeatures(dataset, read))
    return result


class Caches:
    """What the section ``data`` says of caches, opened.

    random_vae: what stands for ``load.vae`` where that is null.
    """

    def __init__(self, config: Config, ranks: Ranks, random_vae: FrozenVAE | None = None):
        self.config, self.ranks, self._random_vae = config, ranks, random_vae

    # ------------------------------------------------------------------------------------------------------- latents

    @cached_property
    def latents(self) -> EntryFolder:
        """The folder of this VAE's latents. Only the digest of ``load.vae`` is needed, which is remembered."""
        config, data = self.config, self.config.data
        if config.load.vae is None:
            assert self._random_vae is not None
            weights = tensors_digest(self._random_vae.module.state_dict())
            maker = vae_identity(config, weights)
        else:
            files = vae_files(config)  # on every rank: a wrong path is an error on each
            maker = vae_identity(config, self._on_main(partial(self._latent_digests.of_all, files)))
        maker |= {"stored": data.latent_cache_precision or config.vae.precision}
        note = {"load.vae": config.load.vae}
        return EntryFolder(data.latent_cache, LATENTS, maker, config_key="data.latent_cache", note=note)

    @cached_property
    def _latent_digests(self) -> FileDigests:
        return self._digests(self.config.data.latent_cache)

    def latent_cache(self, dataset: Dataset) -> LatentCache:
        """``dataset`` over the entries, after ``look``."""
        cache = LatentCache(
            dataset,
            self.latents,
            self._latent_digests,
            first_frame=self.config.model.has_image_condition,
            memory_limit_gib=self.config.data.cache_in_memory_gib,
            ranks=self.ranks,
        )
        if self.ranks.is_main:
            logger.info("data.latent_cache: looking at %d clips; each new file is read once", len(dataset))
        cache.look()
        return cache

    def fill_latents(self, cache: LatentCache) -> dict[str, str]:
        """Encode what ``cache`` misses; returns the clips that failed, key -> reason."""
        count = len(cache.missing)
        self._say(self.latents, count, len(cache.dataset), "clips")
        if not count:
            return {}
        if self.ranks.is_main:
            self.latents.check_room(count, self.latent_bytes())
        vae, device = self._vae(), dist.device()
        stored = DTYPES[self.latents.maker["stored"]]
        batch_size = self.config.train.batch_size if self.config.train else 1

        def encode(video: Tensor) -> Tensor:
            return vae.moments(video.to(device)).to(stored)

        with vae.in_use(), self._progress("latents", "clip", count) as progress:
            failed = cache.fill(encode, batch_size, progress)
        _give_back_memory()
        return failed

    def latent_shape(self) -> tuple[int, int, int, int]:
        """(T, 2z, h, w) of a clip of the section ``data``."""
        data, vae = self.config.data, self.config.vae
        frames = (data.num_frames - 1) // vae.temporal_compression + 1
        side = vae.spatial_compression
        return frames, 2 * vae.z_channels, data.height // side, data.width // side

    def latent_bytes(self) -> int:
        """Of one entry, its header apart."""
        data, dtype = self.config.data, DTYPES[self.latents.maker["stored"]]
        frame = 3 * data.height * data.width if self.config.model.has_image_condition else 0
        return torch.Size(self.latent_shape()).numel() * dtype.itemsize + frame

    def _vae(self) -> FrozenVAE:
        vae = self._random_vae if self.config.load.vae is None else FrozenVAE(self.config, is_late=True)
        vae.place(dist.device())
        return vae

    # ---------------------------------------------------------------------------------------------------------- text

    @cached_property
    def _text(self) -> tuple[TextCondition, TextCache]:
        config, root = self.config, Path(self.config.data.text_cache).expanduser()
        text = text_condition_alone(config)
        note: dict[str, Any] = {"load.text_encoder": config.load.text_encoder}
        if text.has_encoder:
            files, digests = text_files(text, config), self._digests(root)
            maker = self._on_main(partial(text_identity, text, files, digests.of_all))
            maker |= {"max_length": text.max_length}
        else:
            maker, note = _only_encoder(root, text)
        entries = EntryFolder(root, TEXT, maker, config_key="data.text_cache", note=note)
        width, limit = config.model.transformer.text_hidden_size, config.data.cache_in_memory_gib
        return text, TextCache(entries, text.max_length, width, limit)

    @property
    def text(self) -> TextCache:
        return self._text[1]

    def fill_text(
        self, captions: Sequence[str], prompts: Sequence[str] = (), *, skip: bool = False
    ) -> dict[str, str]:
        """Encode the captions and prompts that are missing; returns those that cannot be, text -> reason.

        prompts: may be empty text, which is what guidance may compare with.
        skip: encode the others then. False: encode nothing.
        """
        text, cache = self._text
        missing = cache.missing([*captions, *prompts], self.ranks)
        self._say(cache.entries, len(missing), len({*captions, *prompts}), "captions")
        if not missing:
            return {}
        if not text.has_encoder:
            shown = ", ".join(map(repr, missing[:3]))
            raise ValueError(
                f"data.text_cache={cache.entries.root} lacks {len(missing)} captions ({shown} ...), and there is no "
                f"text encoder to encode them: set load.text_encoder"
            )
        failed = self._refused(text, missing, {*prompts} - {*captions})
        missing = [caption for caption in missing if caption not in failed]
        if (failed and not skip) or not missing:
            return failed
        if self.ranks.is_main:
            size = text.max_length * cache.width * TEXT_DTYPES[cache.entries.maker["dtype"]].itemsize
            cache.entries.check_room(len(missing), size)
        load_text_weights(text, self.config)
        sample = self.config.sample
        text.stay_on(torch.device((sample and sample.text_encoder_device) or dist.device()))

        @torch.no_grad()
        def encode(caption: str) -> Tensor:
            return text.encode([caption], allow_empty=True)[0].cpu()

        with self._progress("text features", "caption", len(missing)) as progress:
            cache.fill(missing, encode, self.ranks, lambda taken: progress.update(taken - progress.n))
        text.release()
        _give_back_memory()
        return failed

    def _refused(
        self, text: TextCondition, captions: Sequence[str], may_be_empty: set[str]
    ) -> dict[str, str]:
        """Tokenize everything before the encoder is read: caption -> reason, for those that are too long or empty."""
        failed = {}
        for caption in captions[self.ranks.rank :: self.ranks.world_size]:
            try:
                text.tokenize([caption], allow_empty=caption in may_be_empty or None)
            except ValueError as error:
                failed[caption] = str(error)
        return self.ranks.merged(failed)

    # --------------------------------------------------------------------------------------------------------- shared

    def _digests(self, root: str | Path) -> FileDigests:
        return FileDigests(Path(root).expanduser() / "digests", str(self.ranks.rank))

    def _on_main(self, work: Any) -> Any:
        """What ``work()`` gives on rank 0, on every rank: files of 20 GB are read once."""
        return self.ranks.gather(work() if self.ranks.is_main else None)[0]

    @contextmanager
    def _progress(self, what: str, unit: str, total: int) -> Iterator[tqdm]:
        """Of all ranks together, with the time left."""
        with tqdm(
            total=total, desc=what, unit=unit, disable=not self.ranks.is_main, dynamic_ncols=True
        ) as progress:
            yield progress
            progress.update(total - progress.n)  # other ranks took the last ones

    def _say(self, entries: EntryFolder, missing: int, total: int, unit: str) -> None:
        if not self.ranks.is_main:
            return
        key = f"{entries.config_key}={entries.root}"
        if not missing:
            encoder = "the VAE" if entries.kind == LATENTS else "the text encoder"
            logger.info("%s: all %d %s are there; %s is not loaded", key, total, unit, encoder)
            return
        logger.info("%s: %d of %d %s are missing and are encoded now", key, missing, total, unit)
        for other in entries.others():
            logger.warning("%s holds %s: they stay, unused", key, describe_other(other, entries))


def run_ranks() -> Ranks:
    return Ranks(dist.rank(), dist.world_size(), dist.gather, dist.ticket_counter)


def weights_digests(config: Config) -> Callable[[Iterable[Path]], str]:
    """SHA-256 of weight files, as ``weights.provenance.sha256``: those that a cache knows are not read for it."""
    roots = dict.fromkeys(root for root in (config.data.text_cache, config.data.latent_cache) if root)
    folders = [Path(root).expanduser() / "digests" for root in roots]
    return FileDigests(next(iter(folders), None), "weights", folders[1:]).of_all


def captions_of(sets: Sequence[Dataset]) -> list[str]:
    """Each once, in the order of the sets."""
    return list(dict.fromkeys(d.describe(i)["caption"] for d in sets for i in range(len(d))))


def sampling_prompts(config: Config, prompts: Sequence[str]) -> list[str]:
    """``prompts`` and what guidance compares them with; nothing where there are none."""
    section = config.sample
    if not prompts or section is None:
        return []
    negative = section.negative_prompt
    if negative is None and section.unconditional == "empty_prompt":
        negative = ""
    return list(dict.fromkeys([*prompts, *([] if negative is None else [negative])]))


def listed(reasons: dict[str, str], limit: int | None = 10) -> str:
    """One line each."""
    lines = [f"  {name!r:.80}: {reason}" for name, reason in sorted(reasons.items())[:limit]]
    more = len(reasons) - len(lines)
    return "\n".join([*lines, *([f"  ... and {more} more"] if more else [])])


def describe_other(other: OtherFolder, entries: EntryFolder) -> str:
    """``40 entries (0.18 GiB) made with other weights: 1f2e3d4c of /models/vae.pt, not 5a6b7c8d``."""
    found = [
        f"{key} {_short(other.maker.get(key))}, not {_short(value)}"
        for key, value in entries.maker.items()
        if other.maker.get(key) != value
    ]
    where = next(iter(other.note.values()), None)
    size = other.bytes / 2**30
    made = f" of {where}" if where else ""
    return f"{other.count} entries ({size:.2f} GiB, {other.path.name}) by another encoder{made}: {'; '.join(found)}"


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _only_encoder(root: Path, text: TextCondition) -> tuple[dict[str, Any], dict[str, Any]]:
    """(maker, note) of the one encoder in ``root`` whose entries fit: a machine without T5 needs no more."""
    fitting = []
    for folder in sorted(root.glob(f"{TEXT}-*")):
        maker, note = read_maker(folder)
        same = maker.get("max_length") == text.max_length and maker.get("dtype") == text.dtype_name
        if same and folder.name == f"{TEXT}-{digest_of(maker)[:16]}":
            fitting.append((maker, note))
    if len(fitting) != 1:
        raise ConfigError(
            f"data.text_cache={root}: load.text_encoder is null and the folder holds features of {len(fitting)} text "
            f"encoders with max_length={text.max_length}, {text.dtype_name}; set load.text_encoder"
        )
    return fitting[0]


def _give_back_memory() -> None:
    """Once, before training: what encoding took at its peak would stay reserved."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
