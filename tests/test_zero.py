"""Weights that DeepSpeed has split over ranks come back bit for bit, from its own files and ours, and without it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workers import launch as launcher
from workers.save_zero import save

from cogvideox import dist
from cogvideox.weights.check import check_values
from cogvideox.weights.files.headers import position, read_headers
from cogvideox.weights.files.locate import locate
from cogvideox.weights.files.zero import stage
from cogvideox.weights.identify import identify
from cogvideox.weights.reader import WeightsReader

ROOT = Path(__file__).resolve().parents[1]
CASES = [(s, p) for s in (0, 1, 2, 3) for p in ("fp32", "bf16") if (s, p) != (0, "fp32")]
# Settings that change how the flat vectors are laid out: gaps and another order; several vectors for one group.
LAYOUTS = {
    (2, "bf16"): {"parameter_alignment": True, "round_robin_gradients": True},
    (3, "bf16"): {"sub_group_size": 10},
}
FROZEN = {"frozen.weight", "frozen.bias"}
AGAIN = {"again.weight", "again.bias"}  # a module under two names, which DeepSpeed's tool does not look for


def entry(root: Path, zero_stage: int, precision: str) -> dict:
    folder = root / f"{zero_stage}_{precision}"
    folder.mkdir()
    train = {
        "steps": 2,
        "precision": precision,
        "ema_decay": 0.9 if (zero_stage, precision) == (3, "bf16") else None,
    }
    deepspeed = {"zero_optimization": {"stage": zero_stage, **LAYOUTS.get((zero_stage, precision), {})}}
    return {"run_dir": str(folder), "train": train, "deepspeed": deepspeed, "stage": zero_stage}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Ranks -> a folder with one run of each case; do not change them."""
    roots = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    dist.init(timeout_minutes=2.0, model_parallel=False)
    for case in CASES:
        save(entry(roots[1], *case))
    entries = [entry(roots[2], *case) for case in CASES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "WORKER", Path(__file__).parent / "workers" / "save_zero.py")
        patch.setenv(
            "PYTHONPATH",
            os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        )
        done = launcher.launch(entries, 2, roots[2])
    assert done.returncode == 0, done.stdout
    return roots


def read(path: Path, **choice: bool) -> dict[str, torch.Tensor]:
    reader = WeightsReader(path, "transformer", **{"ema": False} | choice)
    return {name: reader.tensor(name) for name in reader.tensors}


def of_deepspeed(folder: Path, *, frozen: bool = True) -> dict[str, torch.Tensor]:
    """fp32 masters as DeepSpeed's own tool puts them together (buffers and frozen weights cast to fp32)."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder), exclude_frozen_parameters=not frozen)


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    different = [name for name in ours if not torch.equal(ours[name].float(), theirs[name].float())]
    assert not different


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("zero_stage", "precision"), [case for case in CASES if case[0]])
def test_masters_are_those_of_deepspeeds_own_tool(
    runs: dict[int, Path], ranks: int, zero_stage: int, precision: str
) -> None:
    run = runs[ranks] / f"{zero_stage}_{precision}"
    masters, theirs = read(run / "full", masters=True), of_deepspeed(run / "full")
    own = load_file(run / "own.safetensors")
    if zero_stage < 3:
        theirs |= {name: theirs[name.replace("again", "last")] for name in AGAIN}
    if zero_stage == 1:  # their tool loses what was frozen
        theirs |= {name: own[name] for name in FROZEN}
    assert_equal(masters, theirs)
    assert {masters[name].dtype for name in masters.keys() - FROZEN} == {torch.float32}
    ours = read(run, masters=True)  # a checkpoint of ours: without the frozen layer
    assert_equal(ours, {name: masters[name] for name in masters.keys() - FROZEN})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("zero_stage", "precision"), CASES)
def test_weights_are_the_modules_own(
    runs: dict[int, Path], ranks: int, zero_stage: int, precision: str
) -> None:
    run = runs[ranks] / f"{zero_stage}_{precision}"
    own, weights = load_file(run / "own.safetensors"), read(run / "full")
    if zero_stage == 3:
        own = {name: own[name] for name in own.keys() - AGAIN}
    rounded = {name: weight.to(own[name].dtype) for name, weight in weights.items()}
    assert_equal(rounded, own)
    assert zero_stage == 3 or all(weights[name].dtype == own[name].dtype for name in own)


def test_headers_tell_names_shapes_and_stage_without_torch(runs: dict[int, Path]) -> None:
    for zero_stage in (1, 2, 3):
        source = locate(runs[2] / f"{zero_stage}_bf16")
        assert stage(source.folder) == zero_stage
    run = runs[2] / "3_bf16"
    own = {name: t for name, t in load_file(run / "own.safetensors").items() if name not in AGAIN}
    headers = read_headers(locate(run / "full").files)
    assert {name: tensor.shape for name, tensor in headers.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in own.items()
    }
    assert headers.metadata["zero_stage"] == 3 and headers.metadata["ds_version"]
    assert not headers.foreign_globals
    info = identify(run)
    assert (info.step, info.has_optimizer, info.dtype) == (2, True, "float32")
    code = (
        "import sys\nfrom cogvideox.weights.files.headers import read_headers\n"
        "from cogvideox.weights.files.locate import locate\n"
        f"assert len(read_headers(locate({str(run)!r}).files).tensors) == {len(own) - len(FROZEN)}\n"
        "assert not {'torch', 'numpy', 'deepspeed', 'huggingface_hub'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "sat")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_averages_of_a_zero_3_run_come_in_place_of_its_weights(runs: dict[int, Path]) -> None:
    run = runs[2] / "3_bf16"
    shares = [load_file(path) for path in sorted((run / "checkpoints" / "2").glob("ema_rank_*.safetensors"))]
    averages = shares[0] | shares[1]
    assert len(shares) == 2 and averages.keys() == load_file(run / "own.safetensors").keys() - FROZEN - AGAIN - {
        "table", "tied.weight", "tied.bias"
    }  # fmt: skip
    weights = read(run, ema=True)
    assert all(torch.equal(weights[name], averages[name]) for name in averages)


def test_deepspeed_is_not_needed_and_nothing_of_it_runs(runs: dict[int, Path]) -> None:
    code = (
        "import sys\nsys.modules['deepspeed'] = None\n"
        "from cogvideox.weights.reader import WeightsReader\n"
        f"reader = WeightsReader({str(runs[2] / '2_bf16')!r}, 'transformer', ema=False, masters=True)\n"
        "assert reader.tensor('first.weight').dtype.itemsize == 4"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "sat")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def copy(runs: dict[int, Path], tmp_path: Path) -> Path:
    """A ZeRO-3 checkpoint of two ranks to spoil."""
    return shutil.copytree(runs[2] / "3_bf16" / "checkpoints" / "2", tmp_path / "2")


def test_a_nan_in_the_slice_of_one_rank_is_found(copy: Path) -> None:
    assert check_values(copy) == []
    header = read_headers(locate(copy).files).tensors["first.weight"]
    second = header.slices[1]
    assert header.shape == (15, 6) and second.shape == (45,) and "pp_rank_1" in second.file.name
    with second.file.open("r+b") as file:
        file.seek(position(second) + 4 * 5)
        file.write(struct.pack("<f", float("nan")))
    # The averages, which are apart, are whole.
    assert check_values(copy) == ["first.weight: 1 NaN and 0 inf of 90 values, the first at [8, 2]"]


RANK_0, RANK_1 = (
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
)


@pytest.mark.parametrize("remove, error", [
    (["zero_pp_rank_0_mp_rank_00_model_states.pt"], "model_states file of rank 0 is missing"),
    (["zero_pp_rank_1_mp_rank_00_model_states.pt"], "model_states of 1 ranks, optim_states of 2"),
    ([RANK_0], "optim_states file of rank 0 is missing"),
    ([RANK_1], "model_states of 2 ranks, optim_states of 1"),
    ([RANK_1, "zero_pp_rank_1_mp_rank_00_model_states.pt"], "saved by 2 ranks, optim_states of 1 are here"),
])  # fmt: skip
def test_a_missing_rank_is_one_clear_error(copy: Path, remove: list[str], error: str) -> None:
    for name in remove:
        (copy / name).unlink()
    with pytest.raises(ValueError, match=error):
        identify(copy)


def test_files_of_two_runs_are_not_mixed(copy: Path, runs: dict[int, Path]) -> None:
    shutil.copy(copy / RANK_0, copy / RANK_0.removeprefix("bf16_"))
    with pytest.raises(ValueError, match="files of two runs"):
        identify(copy)
    (copy / RANK_0.removeprefix("bf16_")).unlink()
    other = runs[2] / "2_bf16" / "checkpoints" / "2" / RANK_1
    shutil.copy(other, copy / RANK_1)
    with pytest.raises(ValueError, match=f"{RANK_1}: no fp32_flat_groups"):
        identify(copy)


def test_a_truncated_file_is_named(copy: Path) -> None:
    whole = (copy / RANK_1).read_bytes()
    for length in (0, 2, 100, len(whole) // 2, len(whole) - 1):
        (copy / RANK_1).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=RANK_1):
            identify(copy)


def test_masters_that_are_not_there_are_asked_for_in_vain(runs: dict[int, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[1] / "2_bf16" / "checkpoints" / "2", tmp_path / "2")
    (folder / RANK_0).unlink()
    with pytest.raises(ValueError, match="no fp32 masters in it"):
        read(folder, masters=True)
    with pytest.raises(ValueError, match="only a run of DeepSpeed has them"):
        read(runs[1] / "2_bf16" / "own.safetensors", masters=True)
