"""The faults that a run is tested against: ``python tests/fault_matrix.py`` prints the table of ``docs/faults.md``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    what: str
    ranks: str
    injected: str
    end: str
    tests: tuple[str, ...]
    """FILE::TEST, in ``tests/``."""


def _here(*names: str) -> tuple[str, ...]:
    return tuple(f"test_faults.py::{name}" for name in names)


_CLIPS = "test_clips_that_fail_while_training_are_put_aside_listed_and_the_run_goes_on"
_LAYER = "test_a_skipped_step_names_its_clips_and_the_first_bad_layer"
_HANG = "test_a_rank_that_hangs_is_named_in_time_with_its_last_step_and_phase"
_STOP = "test_a_signal_ends_a_validation_or_preview_at_its_next_piece_and_the_next_start_makes_up_for_it"

MATRIX = (
    Fault(
        "kill -9 at twenty moments",
        "1 and 2",
        "random moments: in steps, saves, prunes, validations, previews; full and LoRA",
        "bitwise the run that was not killed",
        (
            "test_resume.py::test_a_run_killed_twenty_times_is_bitwise_the_run_that_was_not",
            "test_resume.py::test_the_real_model_killed_again_and_again_is_bitwise_the_one_that_was_not",
        ),
    ),
    Fault(
        "newest checkpoint damaged",
        "1",
        "files missing, truncated, a byte flipped, no state.json",
        "said, kept under another name; the one before takes its place",
        ("test_damaged_checkpoint.py::test_the_checkpoint_before_takes_the_place_of_a_damaged_one",),
    ),
    Fault(
        "`latest` missing or wrong",
        "1",
        "removed, emptied, naming nothing",
        "said; the newest whole checkpoint",
        ("test_damaged_checkpoint.py::test_a_pointer_to_nothing_is_said_and_the_newest_checkpoint_taken",),
    ),
    Fault(
        "all checkpoints damaged",
        "1",
        "all truncated",
        "one error that names each, nothing touched",
        (
            "test_damaged_checkpoint.py::test_when_all_are_damaged_one_error_names_each_and_nothing_is_touched",
        ),
    ),
    Fault(
        "disk full while saving",
        "1",
        "in the middle of a file",
        "error on all ranks, the last checkpoint is whole",
        (
            "test_checkpoint.py::test_a_disk_that_fills_up_in_the_middle_of_a_save_leaves_the_last_checkpoint_whole",
        ),
    ),
    Fault(
        "another number of ranks",
        "1 and 2",
        "2 to 1, 1 to 2, ZeRO 0 to 3",
        "the same command goes on; every state bitwise the same after the change",
        ("test_world_size.py::test_every_number_of_the_state_is_bitwise_the_same_right_after_the_change",),
    ),
    Fault(
        "no room to convert a checkpoint",
        "2",
        "a disk that is almost full",
        "one error, nothing written",
        ("test_world_size.py::test_without_room_for_the_conversion_nothing_is_written",),
    ),
    Fault(
        "another LoRA rank, model or configuration",
        "1",
        "the same run folder",
        "refused by key, with the ways out",
        (
            "test_checkpoint.py::test_another_lora_rank_is_refused_with_the_parameter_its_two_shapes_and_the_key",
            "test_same_config.py::test_what_changes_the_training_is_refused_by_its_key_with_the_ways_out",
        ),
    ),
    Fault(
        "cache killed while it is filled",
        "2",
        "kill -9",
        "whole entries stay, the others are made",
        ("test_cache_latents.py::test_killed_while_it_writes_two_ranks_go_on_where_it_was",),
    ),
    Fault(
        "clip truncated, empty or rubbish",
        "2",
        "files ruined before the run, no scan",
        "put aside, run goes on",
        _here(_CLIPS),
    ),
    Fault(
        "clip whose decoder hangs",
        "2",
        "native code that holds the GIL for ever",
        "cut off in time, put aside, run goes on",
        _here(_CLIPS),
    ),
    Fault(
        "clip that crashes its decoder",
        "1",
        "SIGSEGV in the reading process",
        "tried three times, put aside, run goes on",
        ("test_worker_pool.py::test_a_clip_that_kills_its_reader_three_times_is_to_blame",),
    ),
    Fault(
        "too many failing clips",
        "1",
        "5 of 8 files emptied",
        "stops, lists them",
        _here("test_a_run_with_too_many_failing_clips_stops_and_lists_them"),
    ),
    Fault(
        "clips mended before a resume",
        "2",
        "stopped, files restored, started again",
        "stay aside: bitwise the undisturbed run",
        _here("test_a_resumed_run_keeps_out_what_was_put_aside_though_it_could_be_read_again"),
    ),
    Fault(
        "reading process killed",
        "1",
        "kill -9 of all of them",
        "replaced, no clip lost",
        ("test_worker_pool.py::test_a_killed_process_is_replaced_and_its_clip_tried_again",),
    ),
    Fault(
        "training process killed, its readers left",
        "1",
        "kill -9, exit in three ways",
        "readers end too",
        ("test_worker_pool.py::test_processes_end_with_the_one_that_made_them_however_that_ends",),
    ),
    Fault(
        "loss not finite on one rank",
        "2, ZeRO 0, 2, 3",
        "a layer divides by zero",
        "skipped on all, counted; clips and layer named",
        ("test_engine.py::test_a_nan_on_one_rank_is_skipped_on_all_and_counted", *_here(_LAYER)),
    ),
    Fault(
        "gradient not finite on one rank",
        "2, ZeRO 0, 2, 3",
        "a layer's backward gives infinity",
        "skipped on all, counted; rank and layer named (not under ZeRO-3)",
        _here(_LAYER),
    ),
    Fault(
        "search for the bad layer",
        "2, ZeRO 0, 2, 3",
        "the runs above, without the search",
        "bitwise the same run",
        _here("test_the_search_for_the_bad_layer_leaves_no_trace_in_the_run"),
    ),
    Fault(
        "losses not finite for good",
        "2",
        "NaN in every batch",
        "stops at the limit, on all ranks",
        ("test_engine.py::test_too_many_nans_in_a_row_stop_every_rank_with_one_clear_error",),
    ),
    Fault(
        "one rank killed",
        "2",
        "kill -9 in a step",
        "the others end soon, one clear line; the same command resumes",
        (
            *_here("test_when_a_rank_is_killed_the_others_end_soon_with_one_clear_line"),
            "test_resume.py::test_a_run_killed_twenty_times_is_bitwise_the_run_that_was_not",
        ),
    ),
    Fault(
        "one rank hangs",
        "2",
        "sleeps in data, spins in forward, is stopped (SIGSTOP)",
        "named in time with step and phase, all ranks end",
        _here(_HANG),
    ),
    Fault(
        "long validation, preview, save",
        "1",
        "each longer than the watchdog's limit",
        "no false alarm",
        _here("test_long_validations_previews_and_saves_are_no_stall"),
    ),
    Fault(
        "SIGTERM or SIGUSR1 in a step",
        "2",
        "sent to one rank",
        "saved on all, exit code 0",
        ("test_engine.py::test_sigterm_on_one_rank_saves_on_all_and_leaves_with_exit_code_0",),
    ),
    Fault(
        "signal in a validation or preview",
        "2",
        "SIGUSR1 to one rank",
        "abandoned on all, saved; made up for at the next start, same curve",
        _here(_STOP),
    ),
    Fault(
        "SIGTERM to torchrun, 30 s of grace",
        "2",
        "in a validation of a minute",
        "saved and gone in time",
        _here("test_torchrun_under_sigterm_in_a_long_validation_is_saved_and_gone_well_within_its_grace"),
    ),
    Fault(
        "tracker goes away",
        "1",
        "raises for two steps, then never returns",
        "warned, run goes on, same metrics.jsonl",
        _here("test_a_tracker_that_goes_away_costs_a_warning_and_nothing_else"),
    ),
    Fault(
        "TensorBoard's disk full",
        "1",
        "RLIMIT_FSIZE",
        "error noticed; a new file when there is room",
        _here("test_tensorboard_goes_on_in_a_new_file_after_a_full_disk"),
    ),
    Fault(
        "wandb without a key",
        "1",
        "empty home, no WANDB_API_KEY",
        "one clear error before anything is loaded",
        _here("test_wandb_without_a_key_is_one_clear_error_before_anything_is_built"),
    ),
)


def table() -> str:
    """The matrix in Markdown."""
    lines = ["| fault | ranks | injected | end | tests |", "|---|---|---|---|---|"]
    for fault in MATRIX:
        tests = ", ".join(f"`{place.split('::')[0]}::{place.split('::')[1]}`" for place in fault.tests)
        lines.append(f"| {fault.what} | {fault.ranks} | {fault.injected} | {fault.end} | {tests} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
