"""Ranks, groups and random streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch.distributed import distributed_c10d

from cogvideox import dist
from cogvideox.dist import RandomStreams

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in launcher} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def draw(generator: torch.Generator) -> list[float]:
    return torch.rand(4, generator=generator).tolist()


def test_streams_are_a_function_of_seed_step_micro_step_and_rank() -> None:
    places = [(s, k, m, r) for s in (0, 1) for k in (0, 1) for m in (0, 1) for r in (0, 1)]
    first = {place: draw(RandomStreams.at(*place, world_size=2).local) for place in places}
    again = {place: draw(RandomStreams.at(*place, world_size=2).local) for place in reversed(places)}
    assert first == again
    assert len({tuple(values) for values in first.values()}) == len(places)


def test_the_shared_stream_is_the_same_on_every_rank_and_the_local_one_is_not() -> None:
    zero, one = (RandomStreams.at(3, 5, rank=rank, world_size=2) for rank in (0, 1))
    assert draw(zero.shared) == draw(one.shared)
    assert draw(zero.local) != draw(one.local)
    assert (one.rank, one.world_size) == (1, 2)
    assert draw(RandomStreams.at(3, 6).shared) != draw(RandomStreams.at(3, 5).shared)


def test_global_dropout_follows_the_step_and_differs_between_ranks() -> None:
    def mask(step: int, rank: int) -> list[float]:
        RandomStreams.at(0, step, rank=rank, world_size=2).seed_global()
        return torch.nn.functional.dropout(torch.ones(64)).tolist()

    assert mask(4, 0) == mask(4, 0)
    assert mask(4, 0) != mask(5, 0) and mask(4, 0) != mask(4, 1)


def test_alone_without_a_launcher_there_is_a_group_of_one() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)
    group = torch_dist.group.WORLD
    dist.init(timeout_minutes=2.0, model_parallel=False)
    assert torch_dist.group.WORLD is group
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert dist.any_rank(True) and not dist.any_rank(False)
    assert dist.gather({"a": 1}) == [{"a": 1}]
    first, second = dist.ticket_counter(), dist.ticket_counter()
    assert [first(), first(), second(), first()] == [0, 1, 0, 2]


def test_the_timeout_reaches_groups_made_by_others() -> None:
    dist.init(timeout_minutes=2.0, model_parallel=False)
    group = torch_dist.new_group([0])
    dist.set_timeout(3.0)
    for each in (group, torch_dist.group.WORLD):
        assert each._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 180
    assert group in distributed_c10d._world.pg_map


def test_tensors_move_in_nested_batches_and_the_rest_stays() -> None:
    batch = {"video": torch.zeros(2), "caption": ["a", "b"], "pair": (torch.ones(1), 3)}
    moved = dist.to_device(batch, torch.device("meta"))
    assert moved["video"].is_meta and moved["pair"][0].is_meta
    assert moved["caption"] == ["a", "b"] and moved["pair"][1] == 3


def test_half_a_launcher_is_one_clear_error() -> None:
    run = python("from cogvideox import dist; dist.init()", RANK="0", WORLD_SIZE="2")
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError") and "LOCAL_RANK" in last and "torchrun" in last


def test_importing_is_light_and_the_group_can_be_left_and_joined_again_with_sat_and_deepspeed() -> None:
    code = (
        "import sys, torch, logging\n"
        "from cogvideox import dist\n"
        "assert not {'deepspeed', 'sat', 'transformers'} & sys.modules.keys()\n"
        "for _ in range(2):\n"
        "    dist.init(2.0)\n"
        "    from sat import mpu\n"
        "    assert mpu.get_model_parallel_world_size() == 1\n"
        "    net = torch.nn.Linear(2, 2)\n"
        "    config = {'train_micro_batch_size_per_gpu': 1, 'zero_optimization': {'stage': 2}}\n"
        "    opt = torch.optim.AdamW(net.parameters())\n"
        "    engine = dist.import_deepspeed().initialize(model=net, optimizer=opt, config=config)[0]\n"
        "    engine.backward(engine(torch.ones(1, 2)).sum()); engine.step()\n"
        "    dist.shutdown()\n"
        "dist.shutdown()\n"
        "print('done')"
    )
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "done"  # and nothing of SAT's or DeepSpeed's chatter
