"""Runs of the toy module, saved in our way and in DeepSpeed's own: ``save_zero.py RUNS.json`` (see train_toy.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from workers.train_toy import WIDTH, Toy, make_trainer

from cogvideox import dist
from cogvideox.command_line import leave


class Odd(Toy):
    """The toy in odd sizes, with a buffer, and with a second name of parameters and of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, 15), nn.LayerNorm(15), nn.Linear(15, 1)
        self.register_buffer("table", torch.arange(5.0) / 3.0)
        self.again = self.last
        self.tied = nn.Linear(15, 1)
        self.tied.weight, self.tied.bias = self.last.weight, self.last.bias


def save(run: dict[str, Any]) -> None:
    """``checkpoints/2``: ours, without what is frozen; ``full/step2``: DeepSpeed's; ``own.safetensors``: the module."""
    folder = Path(run["run_dir"])
    trainer = make_trainer(run, Odd())
    trainer.run()
    trainer.engine.save_checkpoint(str(folder / "full"), tag="step2")
    parameters = list(trainer.engine.module.parameters())
    with dist.import_deepspeed().zero.GatheredParameters(parameters, enabled=run["stage"] == 3):
        if dist.is_main():
            own = {name: t.detach().clone() for name, t in trainer.engine.module.state_dict().items()}
            save_file(own, folder / "own.safetensors")
    dist.barrier()


if __name__ == "__main__":
    dist.init(timeout_minutes=2.0, model_parallel=False)
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        save(entry)
    dist.shutdown()
    leave(0)
