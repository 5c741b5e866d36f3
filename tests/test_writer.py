"""Weight files are written tensor by tensor, read back by the libraries' own readers, and are whole or absent."""

from __future__ import annotations

import errno
import gc
import json
import resource
import shutil
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cogvideox.convert import staging
from cogvideox.convert.staging import refuse_existing, staged
from cogvideox.convert.writer import Entry, split, write_safetensors, write_sharded, write_torch
from cogvideox.weights.files.headers import read_headers

MIXED = {
    "half": torch.arange(7).half(),
    "matrix": torch.randn(3, 5),
    "brain": torch.randn(2, 3).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "view": torch.arange(12.0).view(3, 4).T,
    "whole": torch.tensor([1, -(2**40)]),
    "flags": torch.tensor([True, False, True]),
}


def entries(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", entries(MIXED), iter(MIXED.items()), {"a": "b"})
    assert_same(load_file(path), MIXED)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"a": "b"}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0 and path.stat().st_size == 8 + header + sum(e.nbytes for e in entries(MIXED))


@pytest.mark.parametrize("mode", [{"weights_only": True, "mmap": True}, {"weights_only": True}, {}])
def test_torch_reads_what_is_written(tmp_path: Path, mode: dict) -> None:
    path = write_torch(tmp_path / "x.pt", "module", entries(MIXED), iter(MIXED.items()), {"step": 3})
    state = torch.load(path, **mode)
    assert_same(state["module"], MIXED)
    assert state["step"] == 3
    assert all(tensor.data_ptr() % 64 == 0 for tensor in state["module"].values())


def test_torch_files_are_sound_archives_and_readable_by_header(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "x.pt", "state_dict", entries(MIXED), iter(MIXED.items()), {"k": "v"})
    assert zipfile.ZipFile(path).testzip() is None  # every checksum
    headers = read_headers([path])
    assert {name: header.shape for name, header in headers.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in MIXED.items()
    }
    assert headers.metadata == {"k": "v"} and not headers.foreign_globals


def test_the_same_tensors_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path) -> list[bytes]:
        folder.mkdir()
        write_torch(folder / "x.pt", "module", entries(MIXED), iter(MIXED.items()), {})
        write_safetensors(folder / "x.safetensors", entries(MIXED), iter(MIXED.items()), {})
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    first = write(tmp_path / "a")
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    assert write(tmp_path / "b") == first


def test_shards_stay_below_their_size_and_the_index_names_each_tensor(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((25,), float(i)) for i in range(7)} | {"large": torch.zeros(200)}
    files = write_sharded(tmp_path, "model", entries(tensors), iter(tensors.items()), {}, max_bytes=250)
    names = [file.name for file in files]
    assert names[:2] == ["model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors"]
    assert names[-1] == "model.safetensors.index.json" and len(names) == 6
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == (7 * 25 + 200) * 4
    loaded = {}
    for file in files[:-1]:
        shard = load_file(file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 250 or list(shard) == ["large"]
        assert all(index["weight_map"][name] == file.name for name in shard)
        loaded |= shard
    assert_same(loaded, tensors)
    assert split(entries(tensors), 10**6) == [entries(tensors)]


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_memory_is_that_of_one_tensor(tmp_path: Path, write) -> None:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs /proc, which tells the anonymous memory of a process (Linux)")

    def anonymous() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    count, size = 24, 2**23  # 24 x 8 MiB
    promised = [Entry(f"t{i}", (size // 4,), torch.float32) for i in range(count)]
    gc.collect()
    before, peak = anonymous(), 0

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal peak
        for entry in promised:
            tensor = torch.ones(entry.shape)
            peak = max(peak, anonymous() - before)
            yield entry.name, tensor

    arguments = ("module", promised, tensors(), {}) if write is write_torch else (promised, tensors(), {})
    write(tmp_path / "x.pt", *arguments)
    assert (tmp_path / "x.pt").stat().st_size > count * size
    assert peak < count * size / 3  # of the whole; two tensors at a change, and what the allocator keeps


def test_a_tensor_that_was_not_promised_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="promised"):
        write_safetensors(
            tmp_path / "x", [Entry("a", (2,), torch.float32)], iter([("a", torch.zeros(3))]), {}
        )


# ------------------------------------------------------------------------------------------------ whole or absent


def test_an_output_appears_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with staged(output, 10) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("x")
        assert not output.exists() and temporary.parent == output.parent
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"] and (output / "a").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError("NaN"), KeyboardInterrupt(), OSError(errno.EIO, "disk")])
def test_whatever_stops_the_writing_the_old_output_stays_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    output = tmp_path / "out"
    output.write_text("old")
    with pytest.raises(type(error)), staged(output, 10) as temporary:
        temporary.write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and output.read_text() == "old"


def test_too_little_space_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**30))
    with pytest.raises(OSError, match=r"not enough space: 5\.00 GiB needed, 1\.00 GiB free"):
        with staged(tmp_path / "out", 5 * 2**30):
            pytest.fail("the body ran")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the kernel refuses the write in the same place."""
    tensors = {f"t{i}": torch.zeros(2**18) for i in range(8)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**20, hard))
    try:
        with pytest.raises(OSError, match="no space left .* the partial output was removed"):
            with staged(tmp_path / "out", 8 * 2**20) as temporary:
                write_safetensors(temporary, entries(tensors), iter(tensors.items()), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    with staged(tmp_path / "out", 1) as temporary:
        pass_over = temporary
        temporary.mkdir()
    shutil.copytree(tmp_path / "out", pass_over)
    (pass_over / "stale").write_text("x")
    with staged(tmp_path / "out", 1) as temporary:
        temporary.mkdir()
    assert not list((tmp_path / "out").iterdir()) and not pass_over.exists()


def test_an_existing_output_is_replaced_only_with_force(tmp_path: Path) -> None:
    weights, other, empty, file = (tmp_path / name for name in ("weights", "other", "empty", "x.safetensors"))
    for folder, name in ((weights, "config.json"), (other, "thesis.tex")):
        folder.mkdir()
        (folder / name).write_text("{}")
    empty.mkdir()
    file.write_text("x")
    for path in (weights, other, file):
        with pytest.raises(ValueError, match="exists: choose another output, or replace it with --force"):
            refuse_existing(path, [], force=False)
    refuse_existing(empty, [], force=False)
    refuse_existing(weights, [], force=True)
    refuse_existing(file, [], force=True)
    with pytest.raises(ValueError, match="a folder without weights, which --force does not replace"):
        refuse_existing(other, [], force=True)
    with pytest.raises(ValueError, match="which is being read"):
        refuse_existing(weights, [weights / "transformer" / "a.safetensors"], force=True)
