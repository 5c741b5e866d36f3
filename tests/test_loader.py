"""The loader: order from (seed, step) alone, whatever the ranks, workers and interruptions."""

from __future__ import annotations

import json
import os
from itertools import islice

import pytest
import torch
from torch.utils.data import Dataset
from workers.launch import descendants

from cogvideox.data.loader import ResumableLoader, collate
from cogvideox.data.reader import VideoError


class Numbers(Dataset):
    """Item i is the number i; the numbers in ``bad`` cannot be read."""

    def __init__(self, n: int, bad=(), max_bad_fraction=0.5):
        self.n, self.bad = n, set(bad)
        self.max_bad_fraction = max_bad_fraction

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


def test_with_no_bad_clip_allowed_the_first_is_an_error_that_names_it():
    # max_bad_fraction alone decides while training; on_bad_clip is the choice of the scan before it.
    with pytest.raises(VideoError, match="clip3: damaged(.|\n)*data.params.max_bad_fraction"):
        take(ResumableLoader(Numbers(5, bad=[3], max_bad_fraction=0.0), 1, seed=0), 5)


def test_a_bad_clip_is_put_aside_and_replaced_by_the_next_in_order(caplog):
    good = sum(take(ResumableLoader(Numbers(8), 1, seed=0), 16), [])
    loader = ResumableLoader(Numbers(8, bad=[2, 5]), 1, seed=0)
    seen = sum(take(loader, 16), [])
    for first in (0, 8):
        epoch = good[first : first + 8]
        for place, number in enumerate(epoch):
            following = [n for n in epoch[place:] + epoch[:place] if n not in (2, 5)]
            assert seen[first + place] == following[0], number
    found = {entry["clip"]: entry["reason"] for entry in loader.quarantine.entries}
    assert found == {"clip2": "clip2: damaged", "clip5": "clip5: damaged"}
    assert "put aside clip2" in caplog.text
    resumed = ResumableLoader(Numbers(8, bad=[2, 5]), 1, seed=0)
    assert sum(take(resumed, 11, 5), []) == seen[5:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_was_put_aside_stays_out_after_a_resume_though_it_could_be_read_again(num_workers):
    loader = ResumableLoader(Numbers(8, bad=[2, 5]), 2, seed=0, num_workers=num_workers)
    batches = loader.iterate()
    seen, kept = [], []
    for _ in range(12):
        seen.append(next(batches)["video"].flatten().tolist())
        kept.append(json.dumps(loader.quarantine.entries))
    batches.close()
    for start in (1, 4, 7):
        resumed = ResumableLoader(Numbers(8, bad=[]), 2, seed=0, num_workers=num_workers)
        entries = json.loads(kept[start - 1])
        resumed.quarantine.load(entries)
        numbers = take(resumed, 12 - start, 2 * start)
        if len(entries) == 2:
            assert numbers == seen[start:]
    assert len(json.loads(kept[4])) == 2  # so that starts 4 and 7 were such


def test_a_clip_put_aside_is_out_at_once_though_it_was_read_ahead():
    # Clip 1 is read ahead for the position behind; it must not be used there once the ranks have put it aside.
    loader = ResumableLoader(Numbers(4), 1, seed=0, num_workers=1, shuffle=False)
    batches = loader.iterate()
    assert next(batches)["video"].item() == 0
    loader.quarantine.load([{"clip": "clip1", "reason": "another rank's", "step": 1, "rank": 1}])
    assert [next(batches)["video"].item() for _ in range(5)] == [2, 2, 3, 0, 2]
    batches.close()


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_too_many_bad_clips_stop_the_run(fraction):
    dataset = Numbers(8, bad=range(8), max_bad_fraction=fraction)
    with pytest.raises(VideoError, match="clips"):
        take(ResumableLoader(dataset, 1, seed=0), 1)


@pytest.mark.timeout(120)
def test_workers_change_nothing_and_end_with_the_generator():
    alone = take(ResumableLoader(Numbers(9, bad=[4]), 2, seed=3), 9)
    before = descendants(os.getpid())
    loader = ResumableLoader(Numbers(9, bad=[4]), 2, seed=3, num_workers=2)
    state = torch.get_rng_state()
    assert take(loader, 9) == alone
    assert torch.equal(torch.get_rng_state(), state)  # the training's own generator is not touched
    assert [entry["clip"] for entry in loader.quarantine.entries] == ["clip4"]
    assert descendants(os.getpid()) == before

    failing = ResumableLoader(Numbers(3, bad=[0, 1, 2], max_bad_fraction=0), 1, seed=3, num_workers=1)
    with pytest.raises(VideoError, match="damaged") as caught:
        take(failing, 1)
    assert "Traceback" not in str(caught.value)  # of the worker
    assert descendants(os.getpid()) == before


def test_collate_stacks_tensors_and_lists_the_rest():
    batch = collate(
        [{"video": torch.zeros(2, 3), "caption": "a"}, {"video": torch.ones(2, 3), "caption": "b"}]
    )
    assert batch["video"].shape == (2, 2, 3) and batch["caption"] == ["a", "b"]
    with pytest.raises(ValueError, match="'video' has the shapes"):
        collate([{"video": torch.zeros(2)}, {"video": torch.zeros(3)}])
