"""Every value of a file can be read and checked; files made to harm are one clear error, soon and in little memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stand_ins import sparse_safetensors

from cogvideox.weights.check import check_values
from cogvideox.weights.files.headers import read_headers, scalars
from cogvideox.weights.reader import WeightsReader

NAN, INF = float("nan"), float("inf")


def opened(path: Path) -> WeightsReader:
    return WeightsReader(path, None, ema=False)


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(4, 6, generator=generator) for name in ("a", "b", "c")}


def shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A diffusers folder of one shard per tensor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    weight_map = {}
    for name, tensor in tensors.items():
        weight_map[name] = f"{name}.safetensors"
        save_file({name: tensor}, folder / weight_map[name])
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


# ------------------------------------------------------------------------------------------- what torch would have read


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_those_that_torch_reads(zipped: bool, tmp_path: Path) -> None:
    """Views of all kinds and all dtypes; the file is never unpickled, so torch is the reference."""
    base = torch.arange(60.0).view(5, 12)
    tensors = {
        "transposed": base.T,
        "part": base[1:4, 2:9:3],
        "expanded": base[:1, :1].expand(7, 3),
        "again": base,
        "parameter": torch.nn.Parameter(base[2:]),
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(3.5),
        **{
            str(dtype): base.to(dtype)
            for dtype in (
                torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
                torch.uint8, torch.uint16, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
            )
        },
    }  # fmt: skip
    if not zipped:  # which torch itself cannot read back from its old format
        tensors = {name: t for name, t in tensors.items() if "float8" not in name and "uint16" not in name}
    path = tmp_path / "w.pt"
    torch.save({"module": tensors}, path, _use_new_zipfile_serialization=zipped)
    reader, theirs = opened(path), torch.load(path, weights_only=True)["module"]
    assert reader.tensors.keys() == theirs.keys()
    for name, want in theirs.items():
        got = reader.tensor(name)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert torch.equal(
            got.contiguous().view(-1).view(torch.uint8), want.contiguous().view(-1).view(torch.uint8)
        )


def test_unaligned_safetensors_are_read_like_the_library_reads_them(tmp_path: Path) -> None:
    path, data = tmp_path / "w.safetensors", os.urandom(7) + struct.pack("<3f", 1.0, -2.5, 3e8)
    header = {
        "bytes": {"dtype": "U8", "shape": [7], "data_offsets": [0, 7]},
        "floats": {"dtype": "F32", "shape": [3], "data_offsets": [7, 19]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    reader = opened(path)
    with safe_open(path, framework="pt") as theirs:
        for name in header:
            assert torch.equal(reader.tensor(name), theirs.get_tensor(name))


def test_a_tensor_saved_again_takes_its_own_bytes_along_and_no_more(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100_000), "b": torch.ones(10)}, tmp_path / "w.pt")
    buffer = io.BytesIO()
    torch.save(opened(tmp_path / "w.pt").tensor("b"), buffer)
    assert buffer.tell() < 5000


def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    opened(tmp_path / "w.safetensors").tensor("a").fill_(7.0)
    assert (tmp_path / "w.safetensors").read_bytes() == before


def test_single_numbers_are_read_without_the_rest(tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8)
    numbers = {str(dtype): torch.tensor([64], dtype=dtype) for dtype in dtypes} | {"half": torch.tensor(0.5)}
    save_file({**numbers, "many": torch.zeros(2), "flag": torch.tensor(True)}, tmp_path / "w.safetensors")
    torch.save(numbers, tmp_path / "w.pt")
    torch.save(numbers, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    want = {name: value.item() for name, value in numbers.items()}
    for file in ("w.safetensors", "w.pt", "old.pt"):
        assert scalars(read_headers([tmp_path / file]), numbers) == want
    for name in ("many", "flag"):
        with pytest.raises(ValueError, match=f"{name} is .*; expected one number"):
            scalars(read_headers([tmp_path / "w.safetensors"]), [name])


# --------------------------------------------------------------------------------------------------------- NaN and inf


@pytest.mark.parametrize("format", ["shards", "safetensors", "pt", "old pt"])
def test_a_planted_nan_is_found_and_nothing_else(format: str, tmp_path: Path) -> None:
    def write(tensors: dict[str, torch.Tensor], name: str) -> Path:
        if format == "shards":
            return shards(tmp_path / name, tensors)
        path = tmp_path / name
        if format == "safetensors":
            save_file(tensors, path)
        else:
            torch.save({"module": tensors}, path, _use_new_zipfile_serialization=format == "pt")
        return path

    tensors = {
        **state(),
        "zeros": torch.zeros(3),
        "integers": torch.tensor([2**31 - 1]),
        "none": torch.zeros(0),
    }
    assert check_values(write(tensors, "clean")) == []
    tensors["b"][2, 3] = NAN
    tensors["b"][3, 0] = -INF
    tensors["c"][0, 0] = INF
    assert check_values(write(tensors, "spoiled")) == [
        "b: 1 NaN and 1 inf of 24 values, the first at [2, 3]",
        "c: 0 NaN and 1 inf of 24 values, the first at [0, 0]",
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                                   torch.float8_e5m2, torch.complex64])  # fmt: skip
def test_one_bad_value_anywhere_is_found_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Vectorised minima must not lose a NaN in whatever lane it stands."""
    for place in (0, 1, 7, 500, 1022):
        values = torch.full((1023,), 3.0).to(dtype)
        values[place] = torch.tensor(NAN).to(dtype)
        save_file({"w": values}, tmp_path / "w.safetensors")
        assert check_values(tmp_path / "w.safetensors") == [
            f"w: 1 NaN and 0 inf of 1,023 values, the first at [{place}]"
        ]


def test_the_largest_finite_numbers_are_no_infinities(tmp_path: Path) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
    save_file(
        {str(d): torch.tensor([torch.finfo(d).max, torch.finfo(d).min]).to(d) for d in dtypes},
        tmp_path / "w.st",
    )
    assert check_values(tmp_path / "w.st") == []


def test_all_parts_of_a_pipeline_and_the_averages_of_a_run_are_checked(tmp_path: Path) -> None:
    bad = {"w": torch.tensor([1.0, NAN])}
    for part in ("transformer", "vae"):
        shards(tmp_path / "pipe" / part, bad if part == "vae" else state())
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    line = "w: 1 NaN and 0 inf of 2 values, the first at [1]"
    assert check_values(tmp_path / "pipe") == [f"vae/{line}"]
    assert check_values(tmp_path / "pipe", "transformer") == []
    run = tmp_path / "run" / "checkpoints" / "2"
    run.mkdir(parents=True)
    (run.parent / "latest").write_text("2")
    torch.save({"module": {"w": torch.ones(2)}, "ds_version": "0.19"}, run / "mp_rank_00_model_states.pt")
    save_file(bad, run / "ema_rank_00.safetensors")
    assert check_values(tmp_path / "run") == [f"averaged {line}"]


def test_checking_takes_little_memory(tmp_path: Path) -> None:
    """600 MB in tensors of all shapes of largeness; mapped pages are the kernel's."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs /proc (Linux) to measure memory")
    shapes = {"flat": (150_000_000,), "row": (1, 75_000_000), "rows": (7, 1000, 10_000)}
    path = sparse_safetensors(tmp_path / "w.safetensors", shapes, torch.bfloat16)
    torch.save({"module": {"w": torch.ones(1).expand(10_000, 10_000)}}, tmp_path / "repeated.pt")

    def anonymous() -> int:
        return int(
            next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        )

    peak, before, done = 0, anonymous(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert check_values(path) == check_values(tmp_path / "repeated.pt") == []
    done.set()
    watcher.join()
    assert (peak - before) * 1024 < 150e6


# ------------------------------------------------------------------------------------------------- shards and indices


@pytest.mark.parametrize("length", [0, 5, 60, -1])
def test_a_truncated_shard_is_named(length: int, tmp_path: Path) -> None:
    folder = shards(tmp_path / "w", state())
    shard = folder / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"b\.safetensors: (the file is empty|truncated|not a safetensors)"):
        opened(folder)


@pytest.mark.parametrize("text, error", [
    ("", "not an index of shards, or a part of one"),
    ('{"weight_map": {"a": "a.safeten', "not an index of shards, or a part of one"),
    ("[" * 100_000, "not an index of shards"),
    ('{"weight_map": [1]}', "not an index of shards"),
    ('{"weight_map": {"a": 1}}', "not an index of shards"),
    ('{"weight_map": {}}', "names no shard"),
    ('{"weight_map": {"a": "gone.safetensors"}}', r"1 of its 1 shards are missing: gone\.safetensors"),
    *[(json.dumps({"weight_map": {"a": name}}), "shards lie beside their index: refused")
      for name in ("../secret.safetensors", "/etc/passwd", "x/../../secret.safetensors", "..", "", "a\\b")],
])  # fmt: skip
def test_an_index_that_is_damaged_or_points_elsewhere_is_refused(
    text: str, error: str, tmp_path: Path
) -> None:
    folder = shards(tmp_path / "w", state())
    save_file(state(), tmp_path / "secret.safetensors")
    next(folder.glob("*.index.json")).write_text(text)
    with pytest.raises(ValueError, match=error):
        opened(folder)


def test_a_pointer_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text("..")
    with pytest.raises(ValueError, match=r"names the step '\.\.'"):
        opened(tmp_path / "run")


# ------------------------------------------------------------------------------------------------- safetensors headers


def safetensors(path: Path, header: object, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: object, end: object, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("header, error", [
    ({"a": entry(0, 8), "b": entry(4, 12)}, "b overlaps the tensor before it"),
    ({"a": entry(0, 8), "b": entry(0, 8)}, "b overlaps the tensor before it"),
    ({"a": entry(0, 8), "b": entry(12, 20)}, "b leaves a gap before it"),
    ({"a": entry(8, 0)}, "in the bytes 8 to 0"),
    ({"a": entry(-8, 0)}, "at -8 to 0"),
    ({"a": entry(0, 8, [3])}, r"F32 of shape \[3\] in the bytes 0 to 8"),
    ({"a": entry(0, 8, [-1, -2])}, "damaged"),
    ({"a": entry(0, 8, [2.0])}, "damaged"),
    ({"a": entry(0, 8, "xy")}, "damaged"),
    ({"a": entry(0, 8, [2**40, 2**40])}, "damaged"),
    ({"a": entry(0, 8, dtype="F31")}, "damaged"),
    ({"a": entry(0, 8, dtype=["F32"])}, "damaged"),
    ({"a": {"dtype": "F32", "shape": [2]}}, "damaged"),
    ({"a": 7}, "damaged"),
    ({"__metadata__": [1], "a": entry(0, 8)}, "damaged"),
    ({"a": entry(0, 8), "b": entry(8, 2**50, [2**48 - 2])}, "truncated: .* bytes where its header speaks of"),
    ({"a": entry(0, 4, [1])}, "damaged: .* bytes where its header speaks of"),
])  # fmt: skip
def test_a_header_that_does_not_describe_its_data_is_refused(
    header: object, error: str, tmp_path: Path
) -> None:
    path = safetensors(tmp_path / "w.safetensors", header, bytes(20 if "b" in header else 8))
    with pytest.raises(ValueError, match=error):
        opened(path)


@pytest.mark.parametrize("size, error", [
    (100 * 2**20, "its header has 104,857,600 bytes, far beyond any model's"),
    (100 * 2**20 + 1, "not a safetensors file"),
    (2**63, "not a safetensors file"),
])  # fmt: skip
def test_a_huge_header_is_refused_unread(size: int, error: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        file.write(size.to_bytes(8, "little") + b'{"a":')
        file.truncate(8 + min(size, 2**30))
    tracemalloc.start()
    with pytest.raises(ValueError, match=error):
        read_headers([path])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# --------------------------------------------------------------------------------------------------------- pickle bombs


def zipped(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path


def legacy(path: Path, pickled: bytes) -> Path:
    parts = [0x1950A86A20F9469CFC6C, 1001, {}]
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts) + pickled)
    return path


START = b"\x80\x04"
BOMBS = {
    "runs code": b"cposix\nsystem\n\x8c\x04true\x85R.",
    "runs code by its class": b"(\x8c\x04trueiposix\nsystem\n.",
    "nested lists": b"]" * 50_000 + b"a" * 49_999 + b".",
    "nested tuples": b")" + b"\x85" * 50_000 + b".",
    "nested dictionaries": b"}\x8c\x01a" * 50_000 + b"}" + b"s" * 50_000 + b".",
    "2**64 tuples as a key": b"})" + b"2\x86" * 64 + b"K\x01s.",
    "2**64 tuples in a set": b"\x8f()" + b"2\x86" * 64 + b"\x90.",
    "a memo index of 2**31": b"}r\xff\xff\xff\x7f.",
    "a string of 2**62 bytes": b"\x8d" + (2**62).to_bytes(8, "little") + b"abc.",
    "bytes of 2**62 bytes": b"\x8e" + (2**62).to_bytes(8, "little") + b"abc.",
    "an array of 2**62 bytes": b"\x96" + (2**62).to_bytes(8, "little") + b"abc.",
    "a frame of 2**62 bytes": b"\x95" + (2**62).to_bytes(8, "little") + b"}.",
    "a number of 2**31 bytes": b"\x8b\xff\xff\xff\x7fabc.",
    "a number of 100,000 digits": b"L" + b"9" * 100_000 + b"L\n.",
    "no end": b"}",
    "an empty stack": b"0.",
    "an extension": b"\x82\x01.",
    "an object built on itself": b"ccollections\nOrderedDict\n)R}\x8c\x05itemsNsb.",
    "a shape of many dimensions": b"ctorch\nSize\n(" + b"K\x01" * 1000 + b"t\x85R.",
}


@pytest.mark.parametrize("container", [zipped, legacy])
@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_made_to_harm_is_one_clear_error(name: str, container: object, tmp_path: Path) -> None:
    path = container(tmp_path / "w.pt", START + BOMBS[name])
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(ValueError, match=str(path)) as error:
        opened(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert peak < 200e6
    assert time.perf_counter() - start < 10  # on a busy machine, with the memory traced


def test_a_pickle_that_goes_on_for_ever_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvideox.weights.files.inert_pickle.MAX_INSTRUCTIONS", 1000)
    with pytest.raises(ValueError, match="more than 1,000 instructions, far beyond any model's: refused"):
        opened(zipped(tmp_path / "w.pt", START + b"N0" * 1000 + b"N."))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_small_file_that_unpacks_to_a_large_one_is_refused(compression: int, tmp_path: Path) -> None:
    path = zipped(tmp_path / "w.pt", START + b"N0" * 5_000_000 + b"N.", compression)
    assert path.stat().st_size < 50_000
    with pytest.raises(ValueError, match=r"data\.pkl is compressed .* which torch.save never does: refused"):
        opened(path)


def test_an_archive_whose_directory_lies_is_refused(tmp_path: Path) -> None:
    """A record said to be larger than the file: mapped memory must not be read beyond the file's end."""
    torch.save({"a": torch.ones(1000)}, tmp_path / "true.pt")
    with zipfile.ZipFile(tmp_path / "true.pt") as archive:
        pickled = archive.read("true/data.pkl")
    size = b"M\xe8\x03\x85"  # (1000,)
    assert pickled.count(size) == 1
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("true/data.pkl", pickled.replace(size, b"J\x00\x00\x00\x10\x85"))
        archive.writestr("true/data/0", bytes(4000))
        record = archive.getinfo("true/data/0")
        record.file_size = record.compress_size = 2**40
    reader = opened(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: truncated: .* bytes where a tensor ends at 1,073,7"):
        reader.tensor("a")


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    for zip_format in (True, False):
        path = tmp_path / "w.pt"
        torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=zip_format)
        data = path.read_bytes()
        size = b"M\xe8\x03\x85"  # (1000,)
        assert data.count(size) == 1
        path.write_bytes(data.replace(size, b"M\xe9\x03\x85"))
        with pytest.raises(ValueError, match="damaged"):
            opened(path)
