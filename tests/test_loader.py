"""The loader: order from (seed, step) alone, whatever the ranks, workers and interruptions."""

from __future__ import annotations

import multiprocessing
import os
import signal
from itertools import islice

import pytest
import torch
from torch.utils.data import Dataset

from cogvideox.data.loader import ResumableLoader, collate
from cogvideox.data.reader import VideoError


class Numbers(Dataset):
    """Item i is the number i; the numbers in ``bad`` cannot be read."""

    def __init__(self, n: int, bad=(), on_bad_clip="error", max_bad_fraction=0.5):
        self.n, self.bad = n, set(bad)
        self.on_bad_clip, self.max_bad_fraction = on_bad_clip, max_bad_fraction

    def __len__(self) -> int:
        return self.n

    def describe(self, index: int) -> dict:
        return {"key": f"clip{index}"}

    def item(self, index: int, epoch: int) -> dict:
        if index in self.bad:
            raise VideoError(f"clip{index}: damaged")
        return {"video": torch.tensor([index]), "key": f"clip{index}", "epoch": epoch}


def take(loader: ResumableLoader, steps: int, start: int = 0) -> list[list[int]]:
    batches = loader.iterate(start)
    numbers = [batch["video"].flatten().tolist() for batch in islice(batches, steps)]
    batches.close()
    return numbers


def test_every_clip_comes_once_per_epoch_across_batch_borders():
    numbers = sum(
        take(ResumableLoader(Numbers(10), 4, seed=1), 15), []
    )  # 60 = 6 epochs of 10 in batches of 4
    epochs = [numbers[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6  # each in an order of its own


def test_starting_after_some_clips_gives_the_batches_of_an_uninterrupted_run():
    loader = ResumableLoader(Numbers(7), 3, seed=5)
    whole = take(loader, 12)
    for start in (1, 2, 6, 11):
        assert take(ResumableLoader(Numbers(7), 3, seed=5), 12 - start, 3 * start) == whole[start:]
    assert take(ResumableLoader(Numbers(7), 3, seed=6), 12) != whole


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_are_slices_of_the_same_global_batch(world_size):
    whole = take(ResumableLoader(Numbers(11), 12, seed=2), 5)
    ranks = [
        take(ResumableLoader(Numbers(11), 12 // world_size, seed=2, rank=rank, world_size=world_size), 5)
        for rank in range(world_size)
    ]
    assert [sum((rank[step] for rank in ranks), []) for step in range(5)] == whole


def test_a_batch_larger_than_the_data_wraps_around():
    first = take(ResumableLoader(Numbers(3), 8, seed=0), 3)
    numbers = sum(first, [])
    assert all(sorted(numbers[i : i + 3]) == [0, 1, 2] for i in range(0, 24, 3))


def test_without_shuffling_the_order_is_that_of_the_folder():
    assert take(ResumableLoader(Numbers(5), 2, seed=0, shuffle=False), 5) == [
        [0, 1],
        [2, 3],
        [4, 0],
        [1, 2],
        [3, 4],
    ]


def test_more_ranks_than_data_is_an_error():
    with pytest.raises(ValueError, match="more ranks than data: 4 ranks, 3 clips"):
        ResumableLoader(Numbers(3), 1, seed=0, rank=0, world_size=4)
    with pytest.raises(ValueError, match="batch_size=0"):
        ResumableLoader(Numbers(3), 0, seed=0)


def test_a_bad_clip_is_an_error_that_names_it():
    with pytest.raises(VideoError, match="clip3: damaged(.|\n)*on_bad_clip=skip"):
        take(ResumableLoader(Numbers(5, bad=[3]), 1, seed=0), 5)


def test_a_bad_clip_is_replaced_by_the_next_in_order_also_after_a_resume(caplog):
    good = sum(take(ResumableLoader(Numbers(8), 1, seed=0), 16), [])
    loader = ResumableLoader(Numbers(8, bad=[2, 5], on_bad_clip="skip"), 1, seed=0)
    seen = sum(take(loader, 16), [])
    for first in (0, 8):
        epoch = good[first : first + 8]
        for place, number in enumerate(epoch):
            following = [n for n in epoch[place:] + epoch[:place] if n not in (2, 5)]
            assert seen[first + place] == following[0], number
    assert loader.skipped == {"clip2": "clip2: damaged", "clip5": "clip5: damaged"}
    assert "skipped clip2" in caplog.text
    resumed = ResumableLoader(Numbers(8, bad=[2, 5], on_bad_clip="skip"), 1, seed=0)
    assert sum(take(resumed, 11, 5), []) == seen[5:]


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_too_many_bad_clips_stop_the_run(fraction):
    dataset = Numbers(8, bad=range(8), on_bad_clip="skip", max_bad_fraction=fraction)
    with pytest.raises(VideoError, match="clips"):
        take(ResumableLoader(dataset, 1, seed=0), 1)


@pytest.mark.timeout(120)
def test_workers_change_nothing_and_end_with_the_generator():
    def dataset() -> Numbers:
        return Numbers(9, bad=[4], on_bad_clip="skip")

    alone = take(ResumableLoader(dataset(), 2, seed=3), 9)
    before = {process.pid for process in multiprocessing.active_children()}
    loader = ResumableLoader(dataset(), 2, seed=3, num_workers=2, timeout_seconds=60)
    state = torch.get_rng_state()
    assert take(loader, 9) == alone
    assert torch.equal(torch.get_rng_state(), state)  # the training's own generator is not touched
    assert loader.skipped == {"clip4": "clip4: damaged"}
    assert {process.pid for process in multiprocessing.active_children()} == before

    failing = ResumableLoader(Numbers(3, bad=[0, 1, 2]), 1, seed=3, num_workers=1, timeout_seconds=60)
    with pytest.raises(VideoError, match="damaged") as caught:
        take(failing, 1)
    assert "Traceback" not in str(caught.value)  # of the worker
    assert {process.pid for process in multiprocessing.active_children()} == before


def test_collate_stacks_tensors_and_lists_the_rest():
    batch = collate(
        [{"video": torch.zeros(2, 3), "caption": "a"}, {"video": torch.ones(2, 3), "caption": "b"}]
    )
    assert batch["video"].shape == (2, 2, 3) and batch["caption"] == ["a", "b"]
    with pytest.raises(ValueError, match="'video' has the shapes"):
        collate([{"video": torch.zeros(2)}, {"video": torch.zeros(3)}])


def test_workers_outlive_the_signals_that_the_launcher_sends_to_the_whole_session() -> None:
    # torchrun signals loader workers too; the rank needs them until its last step is saved.
    loader = ResumableLoader(Numbers(8), 1, seed=0, num_workers=1, timeout_seconds=60)
    batches = loader.iterate()
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    later = [next(batches)["video"].item() for _ in range(5)]
    batches.close()
    assert len(set(later)) == 5
    assert not multiprocessing.active_children()
