"""What ranks exchange: ``collectives.py RUNS.json``, on every rank; each writes ``collectives_RANK.json`` beside it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformer_cases import inputs, randomise, tiny
from workers.train_toy import make_trainer

from cogvideox import dist
from cogvideox.command_line import leave
from cogvideox.engine.ema import EMA
from cogvideox.engine.shared_folder import check_shared


class Network(nn.Module):
    """A tiny transformer on a fixed input, another on each rank."""

    def __init__(self, policy: Any):
        super().__init__()
        self.net = randomise(tiny("5b", checkpoint_activations=policy))
        self.arguments = inputs(self.net)
        self.arguments["x"] = self.arguments["x"] * (1 + dist.rank())

    def forward(self, batch: Any, rng: dist.RandomStreams) -> tuple[Tensor, dict[str, Tensor]]:
        return self.net(**self.arguments).square().mean(), {}


def exchanges(folder: Path) -> dict[str, Any]:
    """The functions of dist.py, and the broadcast of an average to the ranks that do not hold it."""
    rank = dist.rank()
    late = folder / "late"
    if rank == 0:
        time.sleep(0.5)
        late.write_text("written before the barrier")
    dist.barrier()
    found: dict[str, Any] = {"file after barrier": late.exists()}
    found["any"] = [dist.any_rank(rank == 1), dist.any_rank(False), dist.any_rank(True)]
    found["gathered"] = dist.gather({"rank": rank, "text": "x" * (1 + 1000 * rank)})

    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
        average = EMA(module, 0.9)
        found["owners"] = sorted(set(average.owners.values()))
        for parameter in module.parameters():
            parameter.fill_(3.0)
    average.update()  # d = min(0.9, 2 / 11) in the first update: 1 + (1 - 2 / 11) 2
    with average.applied():
        found["average"] = [float(p.flatten()[0]) for p in module.parameters()]
    check_shared(folder / "shared")
    found["left in the shared folder"] = [path.name for path in (folder / "shared").iterdir()]
    try:
        check_shared(folder / f"disk_of_rank_{rank}")
        found["own disks"] = "no error"
    except ValueError as error:
        found["own disks"] = str(error)
    found["back"] = [float(p.flatten()[0]) for p in module.parameters()]
    return found


def main(runs: list[dict[str, Any]], folder: Path) -> None:
    found = exchanges(folder)
    for run in runs:
        if run.get("disk_full_on") == dist.rank():
            EMA.save = full_disk
        try:
            make_trainer(run, Network(run["policy"]) if "policy" in run else None).run()
        except OSError as error:
            found[Path(run["run_dir"]).name] = f"OSError: {error}"
    (folder / f"collectives_{dist.rank()}.json").write_text(json.dumps(found))


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    listing = Path(sys.argv[1])
    dist.init(timeout_minutes=2.0, model_parallel=False)
    main(json.loads(listing.read_text()), listing.parent)
    dist.shutdown()
    leave(0)
