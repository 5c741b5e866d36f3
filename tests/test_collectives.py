"""Every collective of ours, who calls it, and which test runs it on two ranks (gloo). DeepSpeed's are its own."""

# ruff: noqa: E501 (rows of tables)
from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest
from workers import launch as launcher

from cogvideox.engine.logging import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sat" / "cogvideox"
# Of torch.distributed: file, function of ours, torch's collective, and a test that runs it on two ranks.
COLLECTIVES = """
dist.py        init      init_process_group     test_collectives.py::test_a_barrier_waits_for_the_last_rank
dist.py        shutdown  destroy_process_group  test_collectives.py::test_a_barrier_waits_for_the_last_rank
dist.py        barrier   barrier                test_collectives.py::test_a_barrier_waits_for_the_last_rank
dist.py        any_rank  all_reduce             test_collectives.py::test_a_flag_of_one_rank_is_true_on_all
dist.py        gather    all_gather_object      test_collectives.py::test_values_are_gathered_in_rank_order
dist.py        any_rank_of_each  all_reduce     test_faults.py::test_a_signal_ends_a_validation_or_preview_at_its_next_piece_and_the_next_start_makes_up_for_it
dist.py        store     PrefixStore            test_faults.py::test_a_rank_that_hangs_is_named_in_time_with_its_last_step_and_phase
engine/ema.py  _swap     broadcast              test_collectives.py::test_an_average_reaches_the_other_ranks
engine/muon.py  _step_slice  all_reduce         test_optimizers.py::test_muon_on_two_ranks_gives_the_losses_of_torchs_muon_and_adamw
"""

# Of dist.py: file, function of dist.py, and a test in which two ranks go through that call.
CALLERS = """
engine/stop.py           any_rank  test_engine.py::test_sigterm_on_one_rank_saves_on_all_and_leaves_with_exit_code_0
engine/skipped.py        gather    test_engine.py::test_a_nan_on_one_rank_is_skipped_on_all_and_counted
engine/trainer.py        gather    test_resume.py::test_a_run_killed_twenty_times_is_bitwise_the_run_that_was_not
engine/summary.py        gather    test_resume.py::test_a_run_killed_twenty_times_is_bitwise_the_run_that_was_not
engine/same_config.py    gather    test_resume.py::test_the_real_model_killed_again_and_again_is_bitwise_the_one_that_was_not
engine/quarantine.py     any_rank  test_faults.py::test_a_resumed_run_keeps_out_what_was_put_aside_though_it_could_be_read_again
engine/quarantine.py     gather    test_faults.py::test_a_resumed_run_keeps_out_what_was_put_aside_though_it_could_be_read_again
engine/watchdog.py       gather    test_faults.py::test_a_rank_that_hangs_is_named_in_time_with_its_last_step_and_phase
engine/watchdog.py       barrier   test_faults.py::test_a_rank_that_hangs_is_named_in_time_with_its_last_step_and_phase
engine/group_norms.py    gather    test_group_norms.py::test_groups_are_those_of_a_plain_loop_on_two_ranks
engine/checkpoint.py     gather    test_collectives.py::test_a_write_that_fails_on_one_rank_is_an_error_on_all
engine/checkpoint.py     barrier   test_resume.py::test_a_run_killed_twenty_times_is_bitwise_the_run_that_was_not
engine/universal.py      gather    test_world_size.py::test_every_number_of_the_state_is_bitwise_the_same_right_after_the_change
engine/universal.py      barrier   test_world_size.py::test_every_number_of_the_state_is_bitwise_the_same_right_after_the_change
evaluation/held_out.py   gather    test_held_out.py::test_the_numbers_before_training_are_bitwise_the_same_on_two_ranks
evaluation/clips.py      gather    test_held_out.py::test_the_numbers_before_training_are_bitwise_the_same_on_two_ranks
system_attention.py      gather    test_resume.py::test_the_real_model_killed_again_and_again_is_bitwise_the_one_that_was_not
engine/shared_folder.py  gather    test_collectives.py::test_a_run_folder_that_a_rank_does_not_see_is_an_error_on_all
engine/shared_folder.py  barrier   test_collectives.py::test_a_run_folder_that_a_rank_does_not_see_is_an_error_on_all
engine/validation.py     gather    test_engine.py::test_the_held_out_loss_is_the_same_on_one_and_two_ranks
engine/logging.py        gather    test_engine.py::test_every_zero_stage_on_two_ranks_gives_the_losses_of_plain_adamw
"""

# Whose tests have one rank only.
ON_ONE_RANK = {
    "sampling/preview.py": "the gathering of what each rank has rendered",
}


def table(text: str) -> dict[tuple[str, ...], str]:
    return {tuple(row[:-1]): row[-1] for row in map(str.split, text.strip().splitlines())}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything here that needs two ranks, in one launch."""
    root = tmp_path_factory.mktemp("collectives")

    def run(name: str, zero: dict, **others) -> dict:
        train = {"steps": 4} | others.pop("train", {})
        return {
            "run_dir": str(root / name),
            "train": train,
            "deepspeed": {"zero_optimization": zero},
            **others,
        }

    runs = [
        run("plain", {"stage": 2}),
        run("offload", {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
        run("plain_3", {"stage": 3}),
        run("offload_3", {"stage": 3, "offload_optimizer": {"device": "cpu"}}),
        *(
            run(f"{policy}_{stage}", {"stage": stage}, policy=policy)
            for stage in (2, 3)
            for policy in ("none", "products", "selective", "full")
        ),
        # Last: it creates a group that the process keeps, and a disk that stays full.
        run("inside_a_node", {"stage": 3, "zero_hpz_partition_size": 2}),
        run("disk_full", {"stage": 2}, train={"ema_decay": 0.9}, disk_full_on=1),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "WORKER", Path(__file__).parent / "workers" / "collectives.py")
        path = os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        patch.setenv("PYTHONPATH", path)
        patch.setattr(launcher, "SECONDS", 400)
        done = launcher.launch(runs, 2, root)
    assert done.returncode == 0, done.stdout
    return root


def found(root: Path) -> list[dict]:
    return [json.loads((root / f"collectives_{rank}.json").read_text()) for rank in (0, 1)]


def losses(root: Path, name: str) -> list[float]:
    return [line["train/loss"] for line in read_metrics(root / name / "metrics.jsonl")]


# ----------------------------------------------------------------------------------------------- what is exchanged


def test_a_barrier_waits_for_the_last_rank(two_ranks: Path) -> None:
    assert [rank["file after barrier"] for rank in found(two_ranks)] == [True, True]


def test_a_flag_of_one_rank_is_true_on_all(two_ranks: Path) -> None:
    assert [rank["any"] for rank in found(two_ranks)] == [[True, False, True]] * 2


def test_values_are_gathered_in_rank_order(two_ranks: Path) -> None:
    """Of different sizes, as pickled objects have."""
    expected = [{"rank": 0, "text": "x"}, {"rank": 1, "text": "x" * 1001}]
    assert [rank["gathered"] for rank in found(two_ranks)] == [expected, expected]


def test_an_average_reaches_the_other_ranks(two_ranks: Path) -> None:
    for rank in found(two_ranks):
        assert rank["owners"] == [0, 1]  # each holds a part
        assert rank["average"] == pytest.approx([1 + (1 - 2 / 11) * 2] * 4)  # float32
        assert rank["back"] == [3.0] * 4


def test_a_run_folder_that_a_rank_does_not_see_is_an_error_on_all(two_ranks: Path) -> None:
    for rank in found(two_ranks):
        assert rank["left in the shared folder"] == []
        assert re.match(r"run.dir=.*disk_of_rank_.*: rank 1 on \S+ cannot see", rank["own disks"])
        assert "all nodes share" in rank["own disks"]


def test_a_write_that_fails_on_one_rank_is_an_error_on_all(two_ranks: Path) -> None:
    errors = [rank["disk_full"] for rank in found(two_ranks)]
    assert all(error.startswith("OSError") and "No space left" in error for error in errors)


# ------------------------------------------------------------------------------------- ZeRO's ways on two ranks


@pytest.mark.parametrize("name", ["", "_3"])
def test_an_offloaded_optimizer_gives_the_same_losses(two_ranks: Path, name: str) -> None:
    """Same arithmetic on other tensors; gradients are added up in fp32 buffers on the host: 1e-6 of fp32 rounding."""
    assert losses(two_ranks, f"offload{name}") == pytest.approx(losses(two_ranks, f"plain{name}"), rel=1e-6)


def test_weights_gathered_inside_a_node_give_the_losses_of_zero_3(two_ranks: Path) -> None:
    """``zero_hpz_partition_size``: a second copy of the slices, one per node; with two ranks the node is the world."""
    assert losses(two_ranks, "inside_a_node") == losses(two_ranks, "plain_3")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("policy", ["products", "selective", "full"])
def test_recomputation_under_zero_gives_the_same_losses_bit_for_bit(
    two_ranks: Path, policy: str, stage: int
) -> None:
    assert losses(two_ranks, f"{policy}_{stage}") == losses(two_ranks, f"none_{stage}")


# ------------------------------------------------------------------------------------------------------- the tables


def names_of_torch_distributed(tree: ast.AST) -> set[str]:
    """The names that a file gives to torch.distributed."""
    names = {"torch.distributed"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname for alias in node.names if alias.name == "torch.distributed" and alias.asname
            }
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            names |= {alias.asname or alias.name for alias in node.names if alias.name == "distributed"}
    return names


LOCAL = {"is_initialized", "get_rank", "get_world_size", "HashStore", "distributed_c10d"}
"""Functions of torch.distributed that exchange nothing."""


def calls(module: re.Pattern | None = None) -> set[tuple[str, str, str]]:
    """(file, enclosing function, called) of every call of torch.distributed, or of a module that ``module`` matches."""
    result = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        names = names_of_torch_distributed(tree)
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                owner = ast.unparse(node.func.value)
                if (module.fullmatch(owner) if module else owner in names) and node.func.attr not in LOCAL:
                    result.add((path.relative_to(PACKAGE).as_posix(), function.name, node.func.attr))
    return result


def test_every_direct_use_of_torch_distributed_has_a_row() -> None:
    assert calls() == table(COLLECTIVES).keys()


def test_every_file_that_exchanges_through_dist_py_has_a_row() -> None:
    exchanging = {
        (file, called)
        for file, _, called in calls(re.compile("dist"))
        if called in {"any_rank", "gather", "barrier"} and file not in ON_ONE_RANK
    }
    assert exchanging == table(CALLERS).keys()


@pytest.mark.parametrize("name", sorted({*table(COLLECTIVES).values(), *table(CALLERS).values()}))
def test_every_test_that_the_tables_name_exists_and_has_two_ranks(name: str) -> None:
    file, test = name.split("::")
    functions = {
        n.name: n for n in ast.walk(ast.parse((ROOT / "tests" / file).read_text())) if hasattr(n, "name")
    }
    # The fixtures that start two ranks, alone or among others.
    several = {"two_ranks", "toys", "forks", "root", "ranks"}
    assert several & {argument.arg for argument in functions[test].args.args}


def test_nothing_of_torch_distributed_is_imported_by_name() -> None:
    """``from torch.distributed import all_reduce`` would hide from the table."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
                assert {alias.name for alias in node.names} <= {"distributed_c10d"}, path
