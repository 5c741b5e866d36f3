"""Communication against computation on many GPUs, calculated: the table of docs/cluster.md.

python -m scripts.plan_cluster
"""

from __future__ import annotations

from pathlib import Path

from cogvideox.config import load_config
from cogvideox.gpus import gpu_named
from cogvideox.planning.communication import Cluster, exposed_seconds, seconds, step_volumes
from cogvideox.planning.memory import method_of
from cogvideox.planning.step_time import step_time

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUNS = {
    "2B full": ("cogvideox_2b", "sft"),
    "2B LoRA": ("cogvideox_2b", "lora"),
    "5B full": ("cogvideox_5b", "sft"),
    "5B LoRA": ("cogvideox_5b", "lora"),
}


def rows(gpu: str = "h200") -> list[str]:
    """A row for each run, ranks and ZeRO stage: one clip per GPU, cached, selective recomputation."""
    lines = [
        "| run | GPUs | ZeRO | sent per GPU and step | time of it | behind one 400 Gb/s card a node | computation | "
        "waited for |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    wide, narrow = Cluster(gpu_named(gpu)), Cluster(gpu_named(gpu), cards_per_node=1)
    for name, files in RUNS.items():
        for ranks in (8, 64):
            for stage in (2, 3):
                overrides = [
                    "data.latent_cache=cache",
                    "data.text_cache=cache",
                    "model.transformer.checkpoint_activations=selective",
                    f"deepspeed.zero_optimization.stage={stage}",
                ]
                config = load_config([CONFIGS / f"{file}.yaml" for file in files], overrides)
                method, time = method_of(config, ranks), step_time(config, wide, ranks)
                volume = sum(step_volumes(method).values())
                computed = time.forward + time.backward + time.recomputation + time.update
                waited = exposed_seconds(method, wide, time.forward, time.backward + time.recomputation)
                slow = sum(seconds(method, narrow).values()) if ranks > wide.gpus_per_node else None
                sent = sum(seconds(method, wide).values())
                lines.append(
                    f"| {name} | {ranks} | {stage} | {volume / 1e9:.2f} GB | {_ms(sent)} | "
                    f"{_ms(slow) if slow is not None else '-'} | {computed:.2f} s | {waited / time.total:.1%} |"
                )
    return lines


def _ms(count: float) -> str:
    return f"{count * 1e3:,.0f} ms" if count >= 1e-3 else "< 1 ms"


if __name__ == "__main__":
    print("\n".join(rows()))
