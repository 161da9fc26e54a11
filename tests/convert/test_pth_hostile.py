"""The `.pth` reader before files that are damaged, lie, or would run something."""

from __future__ import annotations

import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_llama.errors import CheckpointError
from mlx_llama_convert.pth import open_pth
from pth_raw import ONE, WEIGHTS, refused, write_raw
from pth_writer import (
    ORDERED_DICT,
    REBUILD,
    Member,
    dict_pickle,
    integer,
    integers,
    name_of,
    storage_id,
    tensor_pickle,
    text,
    write_pth,
    write_zip,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SOUND = dict_pickle({"w": tensor_pickle(ONE, 0, (3, 4))})
BLOB = WEIGHTS.tobytes()


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([Member("a/data.pkl", SOUND)], "storage '0', not there"),
        ([Member("a/data/0", BLOB)], "0 members are called data.pkl"),
        (
            [Member("a/data.pkl", SOUND), Member("b/data.pkl", SOUND), Member("a/data/0", BLOB)],
            "2 members are called data.pkl",
        ),
        ([Member("a/data.pkl", SOUND)] * 2, "stands twice"),
        ([Member("a/data.pkl", SOUND), *[Member("a/data/0", BLOB)] * 2], "stands twice"),
        ([Member("a/data.pkl", SOUND, method=8), Member("a/data/0", BLOB)], "compressed"),
        ([Member("a/data.pkl", SOUND), Member("a/data/0", BLOB, method=8)], "compressed"),
        ([Member("a/data.pkl", SOUND), Member("a/data/0", BLOB, flags=1)], "encrypted"),
        (
            [Member("a/data.pkl", SOUND), Member("a/data/0", BLOB), Member("a/byteorder", b"big")],
            "big-endian",
        ),
        (
            [Member("a/data.pkl", SOUND), Member("a/data/0", BLOB[:-4])],
            "44 bytes, the pickle says 48",
        ),
        (
            [Member("a/data.pkl", SOUND), Member("a/data/0", BLOB + BLOB)],
            "96 bytes, the pickle says 48",
        ),
        ([Member("a/data.pkl", SOUND), Member("a/data/0", b"", claimed_nbytes=48)], None),
        (
            [Member("a/data.pkl", SOUND, claimed_nbytes=1 << 31), Member("a/data/0", BLOB)],
            "at most",
        ),
        (
            [Member("a/data.pkl", SOUND, claimed_nbytes=1 << 20), Member("a/data/0", BLOB)],
            "outside the file",
        ),
        ([Member("a/data.pkl", SOUND), Member("x" * 60_000, b"")], "longer than any"),
    ],
)
def test_wrong_members_are_refused(
    tmp_path: Path, members: list[Member], expected: str | None
) -> None:
    path = tmp_path / "a.pth"
    write_zip(path, members)
    if expected is None:  # bytes of the directory are taken for data: harmless, inside the file
        open_pth(path)["w"].read()
    else:
        assert expected in refused(path)


def test_claimed_size_beyond_the_file_is_refused(tmp_path: Path) -> None:
    numel = 1 << 38
    data = dict_pickle({"w": tensor_pickle(storage_id("FloatStorage", "0", numel), 0, (numel,))})
    members = [Member("a/data.pkl", data), Member("a/data/0", BLOB, claimed_nbytes=numel * 4)]
    path = tmp_path / "a.pth"
    write_zip(path, members, zip64=True)
    assert "absurd" in refused(path)


# Hostile pickles

MARKER_NAME = "executed"


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    """Pickles that create `marker` when Python's own unpickler loads them, or would be bombs."""
    command = f"touch {marker}"
    shell = text(command) + b"\x85R."

    class Call:
        def __init__(self, function: Callable[..., object], *arguments: object) -> None:
            self.call = (function, arguments)

        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return self.call

    attack = Call(os.system, command)
    code = f"open({str(marker)!r}, 'w').close()"
    nested = Call(getattr, Call(__import__, "os"), "system")
    cases = {f"system, protocol {number}": pickle.dumps(attack, number) for number in range(6)}
    cases |= {
        "eval": pickle.dumps(Call(eval, code), 2),
        "exec": pickle.dumps(Call(exec, code), 2),
        "getattr": pickle.dumps(nested, 2),
        "inside a dict": pickle.dumps({"w": attack}, 2),
        "stack global": b"\x80\x02" + text("os") + text("system") + b"\x93" + shell,
        "inst": b"\x80\x02(" + text(command) + b"ios\nsystem\n.",
        "obj": b"\x80\x02(" + name_of("os", "system") + text(command) + b"o.",
        "newobj": b"\x80\x02" + name_of("os", "system") + text(command) + b"\x85\x81.",
        "ext": b"\x80\x02\x82\x01.",
        "as a storage": dict_pickle(
            {"w": b"(" + text("storage") + name_of("posix", "system") + b"tQ"}
        ),
        "as hooks": dict_pickle(
            {"w": REBUILD + b"(" + ONE + integer(0) + integers((12,)) + integers((1,))
             + b"\x89" + name_of("os", "system") + text(command) + b"\x85RtR"}
        ),
        "dotted name": b"\x80\x02" + name_of("torch._utils", "os.system") + shell,
        "name of torch": b"\x80\x02" + name_of("torch", "load") + shell,
        "odd name": b"\x80\x02c\xff\x1b[31m\nx\x00\r\n" + b")R.",
    }  # fmt: skip
    return cases


HOSTILE = sorted(hostile_pickles(Path("unused")))


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, case: str) -> None:
    marker = tmp_path / MARKER_NAME
    message = refused(write_raw(tmp_path / "a.pth", hostile_pickles(marker)[case]))
    assert not marker.exists()
    assert message.isprintable()


def test_the_attack_is_real(tmp_path: Path) -> None:
    """Python's own unpickler does run it: the tests above would notice an execution."""
    marker = tmp_path / MARKER_NAME
    pickle.loads(hostile_pickles(marker)["system, protocol 2"])
    assert marker.exists()


def test_refused_global_is_named(tmp_path: Path) -> None:
    data = hostile_pickles(tmp_path / MARKER_NAME)["inside a dict"]
    message = refused(write_raw(tmp_path / "a.pth", data))
    assert "posix.system" in message and "no code of the file is run" in message


def test_unknown_number_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write_pth(path, {"w": WEIGHTS.astype(np.float64)})
    assert "torch.DoubleStorage" in refused(path)


def call_with(arguments: bytes) -> bytes:
    """Pickle a dict of one tensor that is rebuilt from any arguments."""
    return dict_pickle({"w": REBUILD + b"(" + arguments + b"tR"})


ARGUMENTS = ONE + integer(0) + integers((3, 4)) + integers((4, 1))
UNTYPED = storage_id("UntypedStorage", "0", 48, module="torch.storage")
TAIL = b"\x89" + ORDERED_DICT
BAD_PICKLES = {
    "empty": b"",
    "no stop": SOUND[:-1],
    "bytes after stop": SOUND + b".",
    "two values": b"\x80\x02}}.",
    "nothing": b"\x80\x02.",
    "only a mark": b"\x80\x02(.",
    "not a dict": b"\x80\x02" + tensor_pickle(ONE, 0, (3, 4)) + b".",
    "protocol 4": b"\x80\x04" + SOUND[2:],
    "unknown opcode": b"\x80\x02\xee.",
    "list": b"\x80\x02].",
    "float": b"\x80\x02G" + b"\0" * 8 + b".",
    "pop under a mark": b"\x80\x02}(" + b"R.",
    "setitem on a tuple": b"\x80\x02)" + text("a") + text("b") + b"s.",
    "odd setitems": b"\x80\x02}(" + text("a") + b"u.",
    "setitems without a mark": b"\x80\x02}u.",
    "get before put": b"\x80\x02h\x05.",
    "integer key": b"\x80\x02}K\x01K\x01s.",
    "tuple key": b"\x80\x02})K\x01s.",
    "name twice": b"\x80\x02}(" + (text("w") + tensor_pickle(ONE, 0, (3, 4))) * 2 + b"u.",
    "value is a number": dict_pickle({"w": integer(1)}),
    "value is a text": dict_pickle({"w": text("x")}),
    "value is a storage": dict_pickle({"w": ONE}),
    "value is a global": dict_pickle({"w": REBUILD}),
    "name too long": dict_pickle({"w" * 100_000: tensor_pickle(ONE, 0, (3, 4))}),
    "text is not UTF-8": b"\x80\x02}X\x01\0\0\0\xffK\x01s.",
    "text beyond the end": b"\x80\x02X\xff\xff\xff\xff.",
    "huge integer": dict_pickle({"w": b"\x8a\xff" + b"\xff" * 255}),
    "integer of 4 GB": dict_pickle({"w": b"\x8b\xff\xff\xff\x7f"}),
    "endless global": b"\x80\x02c" + b"a" * 100_000,
    "stack bomb": b"\x80\x02" + b")" * 1_000_000 + b".",
    "mark bomb": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "memo bomb": b"\x80\x02" + b"}r\xff\xff\xff\xff" + b"0.",
    "nested tuples": b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "doubling tuples": b"\x80\x02)" + b"q\0h\0\x86" * 10_000 + b".",
    "doubling in a dict": dict_pickle({"w": b")" + b"q\0h\0\x86" * 10_000}),
    "doubling as arguments": dict_pickle({"w": REBUILD + b")" + b"q\0h\0\x86" * 99 + b"R"}),
    "dict in itself": b"\x80\x02}q\0" + text("w") + b"h\0s.",
    "build of a tuple": b"\x80\x02})b.",
    "build on a tensor": dict_pickle({"w": tensor_pickle(ONE, 0, (3, 4)) + b"}b"}),
    "call of a text": b"\x80\x02" + text("os.system") + b")R.",
    "call of a dict": b"\x80\x02})R.",
    "dict with arguments": b"\x80\x02" + name_of("collections", "OrderedDict") + b"K\x01\x85R.",
    "storage called": b"\x80\x02" + name_of("torch", "FloatStorage") + b")R.",
    "no arguments": dict_pickle({"w": REBUILD + b")R"}),
    "arguments no tuple": dict_pickle({"w": REBUILD + b"}R"}),
    "too many arguments": call_with(ARGUMENTS + TAIL + b"NN"),
    "metadata": call_with(ARGUMENTS + TAIL + b"}" + text("conj") + b"\x88s"),
    "no storage": call_with(b"N" + ARGUMENTS[len(ONE) :] + TAIL),
    "offset is a text": call_with(ONE + text("0") + integers((3, 4)) + integers((4, 1)) + TAIL),
    "offset is a bool": call_with(ONE + b"\x88" + integers((3, 4)) + integers((4, 1)) + TAIL),
    "shape is a number": call_with(ONE + integer(0) + integer(3) + integers((4, 1)) + TAIL),
    "shape of texts": call_with(ONE + integer(0) + b"(" + text("3") + b"t" + integers((1,)) + TAIL),
    "negative offset": dict_pickle({"w": tensor_pickle(ONE, -1, (2,))}),
    "offset beyond": dict_pickle({"w": tensor_pickle(ONE, 1, (3, 4))}),
    "offset overflows": dict_pickle({"w": tensor_pickle(ONE, (1 << 62) - 1, (3, 4))}),
    "negative size": dict_pickle({"w": tensor_pickle(ONE, 0, (-3, -4))}),
    "huge size": dict_pickle({"w": tensor_pickle(ONE, 0, (1 << 40,))}),
    "overflowing product": dict_pickle({"w": tensor_pickle(ONE, 0, (1 << 30,) * 8)}),
    "product wraps to zero": dict_pickle({"w": tensor_pickle(ONE, 0, (1 << 30,) * 8, (0,) * 8)}),
    "many dimensions": dict_pickle({"w": tensor_pickle(ONE, 0, (1,) * 10_000, (1,) * 10_000)}),
    "negative stride": dict_pickle({"w": tensor_pickle(ONE, 0, (3, 4), (4, -1))}),
    "zero stride": dict_pickle({"w": tensor_pickle(ONE, 0, (3, 4), (0, 1))}),
    "strides too few": dict_pickle({"w": tensor_pickle(ONE, 0, (3, 4), (1,))}),
    "transposed": dict_pickle({"w": tensor_pickle(ONE, 0, (3, 4), (1, 3))}),
    "storage too big": dict_pickle(
        {"w": tensor_pickle(storage_id("FloatStorage", "0", 13), 0, (12,))}
    ),
    "storage too small": dict_pickle(
        {"w": tensor_pickle(storage_id("FloatStorage", "0", 11), 0, (11,))}
    ),
    "storage negative": dict_pickle(
        {"w": tensor_pickle(storage_id("FloatStorage", "0", -12), 0, (12,))}
    ),
    "storage of another type": dict_pickle(
        {"w": tensor_pickle(storage_id("LongStorage", "0", 12), 0, (12,))}
    ),
    "storage elsewhere": dict_pickle(
        {"w": tensor_pickle(storage_id("FloatStorage", "../data.pkl", 12), 0, (12,))}
    ),
    "untyped in v2": dict_pickle(
        {"w": tensor_pickle(UNTYPED, 0, (12,))}
    ),
    "persistent id of a text": dict_pickle({"w": text("0") + b"Q"}),
    "persistent id too short": dict_pickle({"w": b"(" + text("storage") + b"tQ"}),
    "text persistent id": dict_pickle({"w": b"P0\n"}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("stack bomb", "the stack grows"),
        ("mark bomb", "the stack grows"),
        ("huge integer", "integer of 255 bytes"),
        ("storage negative", "a storage is not described"),
        ("offset is a bool", "a tensor's offset"),
        ("offset beyond", "ends at byte 52 of a storage of 48 bytes"),
        ("zero stride", "expected contiguous rows"),
        ("storage elsewhere", "storage '../data.pkl', not there"),
    ],
)
def test_malformed_pickle_is_refused_for_the_right_reason(
    tmp_path: Path, case: str, expected: str
) -> None:
    assert expected in refused(write_raw(tmp_path / "a.pth", BAD_PICKLES[case]))


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_malformed_pickle_is_refused(tmp_path: Path, case: str) -> None:
    assert refused(write_raw(tmp_path / "a.pth", BAD_PICKLES[case]))


def test_training_checkpoint_is_explained(tmp_path: Path) -> None:
    inner = dict_pickle({"w": tensor_pickle(ONE, 0, (3, 4))})[2:-1]
    message = refused(write_raw(tmp_path / "a.pth", dict_pickle({"model": inner})))
    assert "'model' is a dict, not a tensor" in message and "state_dict" in message


# Fuzz

FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def assert_sound_or_refused(path: Path) -> None:
    """Open a possibly damaged file: either a `CheckpointError`, or tensors inside the file."""
    size = path.stat().st_size
    try:
        refs = open_pth(path)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable()
        return
    for ref in refs.values():
        assert ref.offset >= 0 and ref.offset + ref.nbytes <= size
        assert ref.read().shape == ref.shape


@FUZZ
@given(
    case=st.sampled_from(["dtypes", "fp8", "shared", "state_dict"]),
    flips=st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_flipped_bytes_never_crash(tmp_path: Path, case: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray((GOLDEN / f"torch_{case}.pth").read_bytes())
    for position, value in flips:
        data[position % len(data)] = value
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    assert_sound_or_refused(path)


@FUZZ
@given(
    flips=st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
def test_flipped_pickle_never_crashes(
    tmp_path: Path, flips: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(SOUND[: len(SOUND) - cut // 10])
    for position, value in flips:
        data[position % len(data)] = value
    assert_sound_or_refused(write_raw(tmp_path / "a.pth", bytes(data)))


@FUZZ
@given(data=st.binary(max_size=200))
def test_random_pickle_never_crashes(tmp_path: Path, data: bytes) -> None:
    assert_sound_or_refused(write_raw(tmp_path / "a.pth", b"\x80\x02" + data))


def test_directory_of_absurd_size_is_not_read_into_memory(tmp_path: Path) -> None:
    """The zip directory claims to be nearly all of a sparse file of 4 GB."""
    path = tmp_path / "a.pth"
    shutil.copy(GOLDEN / "torch_fp8.pth", path)
    size = (4 << 30) - 200
    os.truncate(path, size)
    end = b"PK\5\6" + bytes(4) + b"\1\0\1\0" + (size - 100).to_bytes(4, "little") + bytes(6)
    with path.open("ab") as file:
        file.write(end)
    tracemalloc.start()
    try:
        assert "directory" in refused(path)
        _, peak_nbytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_nbytes < 32 << 20
