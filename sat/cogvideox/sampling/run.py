"""Make the videos of a list of targets: batches of one rank, progress, files with sidecars."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from cogvideox import environment
from cogvideox.config import Config
from cogvideox.sampling import sidecar, ways_in
from cogvideox.sampling.out_of_memory import OutOfMemory, advice, is_out_of_memory
from cogvideox.sampling.outputs import write_latents, write_pixels
from cogvideox.sampling.progress import Stages
from cogvideox.sampling.step_pictures import step_pictures
from cogvideox.sampling.targets import Target
from cogvideox.sampling.ways_in import Sampled
from cogvideox.system import VideoDiffusion


def sample_all(
    system: VideoDiffusion,
    targets: Sequence[Target],
    *,
    rank: int = 0,
    world_size: int = 1,
    keep_text_encoder: bool = False,
) -> list[Target]:
    """Make this rank's share of ``targets``; returns those. The files of a video appear together or not at all.

    Out of memory is one ValueError that says what needs less. It and Ctrl-C leave what is finished, and the same
    command goes on from there.
    """
    section = system.config.sample
    batches = list(_batches(targets, section.batch_size))[rank::world_size]
    share = [target for batch in batches for target in batch]
    stages = Stages(system.device, len(share), is_shown=rank == 0)
    written: list[Target] = []
    with keeping(written, share, system.config):
        # All prompts first: a T5-XXL is as large as the network and is not needed after them.
        prepared = []
        with stages("prompts and pictures", len(share), "prompt") as advance:
            for batch in batches:
                prepared.append(ways_in.prepare(system, [target.request for target in batch]))
                advance(len(batch))
        if not keep_text_encoder:
            system.conditioner.release()
        for batch in batches:
            start = time.perf_counter()
            # Taken out of the list, so that a batch's conditions are freed with it.
            sampled = _denoise(system, batch, prepared.pop(0), stages, f"{len(written) + 1}/{len(share)}")
            for row, target in enumerate(batch):
                name = f"decoding {len(written) + 1}/{len(share)}"
                with stages(name, frames_of(system.config, target), "frame") as advance:
                    write_sample(system, sampled, row, target, start, advance=advance)
                written.append(target)
            stages.finished(len(batch), time.perf_counter() - start)
    return written


def _denoise(
    system: VideoDiffusion, batch: Sequence[Target], prepared: Any, stages: Stages, number: str
) -> Sampled:
    every = system.config.sample.preview_every
    picture = step_pictures(system, batch, every) if every else None
    requests = [target.request for target in batch]
    with stages(f"denoising {number}", ways_in.total_steps(system.config, requests), "step") as advance:

        def callback(state: dict[str, Any]) -> None:
            advance(1)
            if picture is not None:
                picture(state)

        return ways_in.denoise(system, requests, prepared, callback)


@contextmanager
def keeping(written: Sequence[Target], share: Sequence[Target], config: Config) -> Iterator[None]:
    """Say what is finished when the work is cut off by Ctrl-C or by a lack of memory."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = _kept(written, share)
        raise KeyboardInterrupt(f"interrupted: {kept}; the same command goes on with the rest") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory: {_kept(written, share)}. To go on: the same command with {advice(config)}"
        ) from error


def _kept(written: Sequence[Target], share: Sequence[Target]) -> str:
    where = f" in {written[0].folder}" if written else ""
    return f"{len(written)} of {len(share)} videos are finished{where}"


def _batches(targets: Sequence[Target], size: int) -> Iterator[list[Target]]:
    """Runs of at most ``size`` targets whose requests have the same kinds of input."""
    batch: list[Target] = []
    for target in targets:
        if batch and (len(batch) == size or batch[0].request.way != target.request.way):
            yield batch
            batch = []
        batch.append(target)
    if batch:
        yield batch


def write_sample(
    system: VideoDiffusion,
    sampled: Sampled,
    row: int,
    target: Target,
    start: float,
    config: Config | None = None,
    advance: Callable[[int], None] = lambda count: None,
    kept: Mapping[str, str] | None = None,
    observe: Callable[[Tensor], None] = lambda pixels: None,
) -> dict[str, Any]:
    """Decode item ``row`` into the files of ``target``, then write its sidecar; returns what that says.

    start: ``time.perf_counter()`` at the beginning of the work.  config: what makes this video again, where it is not
    the system's own.  advance: called with the number of frames after each chunk.  kept: kind -> name of files of this
    video that are there already.  observe: called with all pixels, chunk by chunk, (f, 3, H, W) uint8.
    """
    section, tree = system.config.sample, dataclasses.asdict(config or system.config)
    request = sidecar.request_record(target.request)
    size = {"num_frames": frames_of(system.config, target), "height": section.height, "width": section.width}
    record = request | {"files": {}} | size | {"fps": section.fps, "steps": section.steps}
    if "latents" in target.outputs:
        known = {"sample": request | {"fingerprint": target.fingerprint}, "config": tree}
        write_latents(target.path("latents"), [segment[row] for segment in sampled.segments], known)
    if set(target.outputs) - {"latents"}:
        chunks = _counted(sampled.pixels(system, row), advance)
        record["pixels_sha256"] = write_pixels(target, chunks, section.fps, observe)
        record["seams"] = sampled.seams(row)
    record |= {
        "files": {**(kept or {}), **{kind: target.path(kind).name for kind in target.outputs}},
        "seconds": round(time.perf_counter() - start, 3),
        "device": str(system.device),
        "attention": getattr(getattr(system, "transformer", None), "attention_backend", None),
        "versions": environment.versions(),
        "fingerprint": target.fingerprint,
        "config": tree,
    }
    _remove_others(target, record["files"])
    sidecar.write(target.sidecar, record)
    target.preview.unlink(missing_ok=True)
    return record


def _remove_others(target: Target, files: dict[str, str]) -> None:
    """What the name's older sidecar lists and the new one does not: it shows another video by now."""
    older = sidecar.read_if_any(target.sidecar) or {}
    for name in older.get("files", {}).values():
        path = target.folder / Path(name).name
        if name not in files.values() and path.is_dir():
            shutil.rmtree(path)
        elif name not in files.values():
            path.unlink(missing_ok=True)


def frames_of(config: Config, target: Target) -> int:
    """Pixel frames of the result."""
    return ways_in.num_frames(config, continued=target.request.continue_from is not None)


def _counted(chunks: Iterable[Tensor], advance: Callable[[int], None]) -> Iterator[Tensor]:
    for chunk in chunks:
        yield chunk
        advance(len(chunk))
