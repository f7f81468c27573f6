"""The file of recorded routing: what is written is read back, and every damage is refused in a sentence."""

import json
import zlib

import numpy as np
import pytest

from megapromoe.routing_trace import (
    TRACE_FILE,
    TraceError,
    TraceRecord,
    consecutive_owners,
    decode,
    encode,
    fullest_over_mean,
    packed,
    read_records,
    read_trace,
)


def record(step: int, seed: int = 0, ranks: int = 4, layers: int = 2, experts: int = 5, **changes) -> TraceRecord:
    rng = np.random.default_rng([step, seed])
    rows_RME = rng.integers(0, 1 << rng.integers(1, 31), (ranks, layers, experts))
    values = {"step": step, "blocks": tuple(range(1, 2 * layers, 2)), "rows_RME": rows_RME, "ep": 2, "group": 2}
    return TraceRecord(**values | changes)


def same(a: TraceRecord, b: TraceRecord) -> bool:
    arrays, none = {"rows_RME": 0, "owner_ME": 0}, [None]
    same_owners = np.array_equal(none if a.owner_ME is None else a.owner_ME, none if b.owner_ME is None else b.owner_ME)
    return np.array_equal(a.rows_RME, b.rows_RME) and same_owners and vars(a) | arrays == vars(b) | arrays


def with_checksum(**values) -> bytes:
    """A line whose checksum is right, whatever its values are."""
    checked = json.dumps(values)[:-1].encode()
    return checked + b', "crc32": "%08x"}\n' % zlib.crc32(checked)


def test_records_are_read_back(tmp_path):
    """Also all-zero ones, of a batch of null images, and numbers that need all four bytes."""
    records = [
        record(5),
        record(10, rows_RME=np.zeros((4, 2, 5), dtype=np.int64)),
        record(15, rows_RME=np.full((4, 2, 5), (1 << 32) - 1)),
        record(16, ranks=1, ep=1, group=1),  # after a resume on one rank
        record(17, owner_ME=np.array([[1, 0, 1, 0, 1], [0, 0, 0, 0, 1]])),
    ]
    (tmp_path / TRACE_FILE).write_bytes(b"".join(map(encode, records)))
    assert all(same(a, b) for a, b in zip(read_records(tmp_path), records, strict=True))
    trace = read_trace(tmp_path / TRACE_FILE)
    assert trace.steps_N.tolist() == [5, 10, 15, 16, 17] and trace.blocks == (1, 3)
    assert trace.rows_NME.shape == (5, 2, 5) and trace.rows_NME.dtype == np.int64
    assert np.array_equal(trace.rows_NME, [r.rows_RME.sum(0) for r in records])
    assert read_trace(tmp_path, 10, 15).steps_N.tolist() == [10, 15]
    with pytest.raises(TraceError, match="no record from step 11 to 14"):
        read_trace(tmp_path, 11, 14)
    with pytest.raises(TraceError, match="no record from step 18;"):
        read_trace(tmp_path, 18)


def test_a_line_is_compact():
    """A number takes about one byte and a third if it is small, as in a batch of few tokens for each expert."""
    small = record(1, ranks=8, layers=12, experts=48, rows_RME=np.random.default_rng(0).poisson(60, (8, 12, 48)))
    assert len(encode(small)) < 1.4 * small.rows_RME.size


def test_a_last_line_that_is_being_written_is_left_out(tmp_path):
    file, lines = tmp_path / TRACE_FILE, [encode(record(step)) for step in (1, 2)]
    for end in (1, len(lines[1]) - 1):
        file.write_bytes(lines[0] + lines[1][:end])
        assert read_trace(file).steps_N.tolist() == [1]
    file.write_bytes(lines[0][:-1])
    with pytest.raises(TraceError, match="no record"):
        read_trace(file)


def test_every_damaged_byte_is_noticed():
    line = encode(record(2, ranks=2))
    for place in range(len(line) - 1):
        damaged = bytearray(line)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match="checksum"):
            decode(bytes(damaged))


WRONG = {
    "no JSON": (b"12\n", "no record with a checksum"),
    "a line of metrics": (b'{"step": 3}\n', "no record with a checksum"),
    "other keys": (with_checksum(step=2, ep=1), "it has the keys step, ep, not"),
    "a missing shape": ({"shape": None}, "not natural numbers"),
    "a negative step": ({"step": -2}, "not natural numbers"),
    "a step that is no integer": ({"step": 2.0}, "not natural numbers"),
    "too many ranks": ({"shape": [1 << 40, 2, 5]}, "sizes do not fit"),
    "other layers": ({"blocks": [1]}, "sizes do not fit"),
    "no expert": ({"shape": [4, 2, 0]}, "sizes do not fit"),
    "groups that do not divide": ({"group": 3}, "sizes do not fit"),
    "more ranks than experts": ({"ep": 6}, "sizes do not fit"),
    "fewer rows": ({"shape": [4, 2, 4]}, "number of numbers is wrong"),
    "more rows": ({"shape": [6, 2, 5]}, "number of numbers is wrong"),
    "no base64": ({"rows": "??"}, "numbers cannot be read"),
    "no zlib": ({"rows": "AAAA"}, "numbers cannot be read"),
    "owners that are no text": ({"owners": [0]}, "not natural numbers"),
    "owners of fewer experts": ({"owners": packed(np.zeros((2, 4)), "<u2")}, "number of numbers is wrong"),
    "owners of other ranks": ({"owners": packed(np.full((2, 5), 2), "<u2")}, "it has an expert on rank 2 of 2"),
    "the same step": ({"step": 1}, "step 1 does not follow step 1"),
    "other experts": (encode(record(2, experts=4)), "other layers or experts"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lines_are_refused(tmp_path, case):
    wrong, reason = WRONG[case]
    if isinstance(wrong, dict):
        values = json.loads(encode(record(2)))
        del values["crc32"]
        wrong = with_checksum(**values | wrong)
    file = tmp_path / TRACE_FILE
    file.write_bytes(encode(record(1)) + wrong)
    with pytest.raises(TraceError) as refused:
        read_trace(file)
    message = str(refused.value)
    assert message.startswith(f"{file}, line 2: is damaged: ") and reason in message and "\n" not in message


@pytest.mark.parametrize("made", [lambda file: None, lambda file: file.mkdir()], ids=["no file", "a folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, made):
    made(tmp_path / TRACE_FILE)
    with pytest.raises(TraceError, match="cannot be read.*train.routing_trace_every"):
        read_trace(tmp_path)


def test_rows_of_ranks():
    """Four data ranks in two expert-parallel groups, five experts on two ranks: three and two."""
    unplaced = record(1, rows_RME=np.random.default_rng(1).integers(0, 100, (4, 2, 5)))
    assert consecutive_owners(5, 2).tolist() == [0, 0, 0, 1, 1]
    rows_GMP = unplaced.rows_of_ranks()
    assert rows_GMP.shape == (2, 2, 2)
    for group in range(2):
        for layer in range(2):
            of_group = unplaced.rows_RME[2 * group : 2 * group + 2, layer].sum(0)
            assert rows_GMP[group, layer].tolist() == [of_group[:3].sum(), of_group[3:].sum()]
    owner_ME = np.array([[1, 0, 1, 0, 1], [0, 0, 0, 0, 1]])
    placed_GMP = unplaced.rows_of_ranks(owner_ME)
    recorded = record(1, rows_RME=unplaced.rows_RME, owner_ME=owner_ME)
    assert np.array_equal(recorded.rows_of_ranks(), placed_GMP), "the owners of the record"
    assert np.array_equal(placed_GMP.sum(2), rows_GMP.sum(2)), "every row is on one rank"
    assert placed_GMP[1, 0, 0] == unplaced.rows_RME[2:, 0][:, [1, 3]].sum()
    for wrong in (owner_ME[:1], owner_ME + 1, owner_ME - 1):
        with pytest.raises(ValueError, match="owner_ME must be"):
            unplaced.rows_of_ranks(wrong)


def test_fullest_over_mean():
    assert fullest_over_mean(np.array([[4, 4], [8, 0], [6, 2]])).tolist() == [1, 2, 1.5]
    assert np.isnan(fullest_over_mean(np.zeros((2, 3)))).all(), "no rows: undefined"


def test_decode_takes_what_encode_gives():
    assert same(decode(encode(record(7))), record(7))
