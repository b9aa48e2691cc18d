"""The journal: what is whole is kept, what is torn is cut off, whatever the disk holds."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
import zlib
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histostream.wsi.errors import OutputError
from histostream.wsi.geometry import Box
from histostream.wsi.outputs.journal import (
    BandJournal,
    Journal,
    JournalError,
    Record,
    RunManifest,
    ViewInfo,
    watched_strips,
)
from histostream.wsi.outputs.label_rows import ClassInfo, LabelRows

X0, X1, HEIGHT = 512, 812, 90


def strip(y: int, height: int = 30, scores: bool = True) -> LabelRows:
    rng = np.random.default_rng(y)
    labels = rng.integers(0, 3, (height, X1 - X0), dtype=np.uint8)
    shared = rng.integers(0, 65536, (height, X1 - X0, 3), dtype=np.uint16) if scores else None
    return LabelRows(X0, y, labels, shared)


def band(path: Path) -> BandJournal:
    return BandJournal(path, X0, X1, HEIGHT)


def written(path: Path, count: int = 3, scores: bool = True) -> list[LabelRows]:
    parts = [strip(30 * i, scores=scores) for i in range(count)]
    with band(path) as journal:
        assert list(journal.finished()) == []
        for i, part in enumerate(parts):
            journal.write(part, (Box(i, 2, 3, 4),) if i else ())
    return parts


def read(path: Path) -> list[Record]:
    with band(path) as journal:
        return list(journal.finished())


def assert_same(records: list[Record], parts: list[LabelRows]) -> None:
    assert len(records) == len(parts)
    for record, part in zip(records, parts, strict=True):
        assert (record.part.x, record.part.y) == (part.x, part.y)
        np.testing.assert_array_equal(record.part.labels, part.labels)
        if part.probabilities is None:
            assert record.part.probabilities is None
        else:
            np.testing.assert_array_equal(record.part.probabilities, part.probabilities)


@pytest.mark.parametrize("scores", [False, True])
def test_what_was_written_is_read_back(tmp_path: Path, scores: bool) -> None:
    path = tmp_path / "512.strips"
    parts = written(path, scores=scores)
    records = read(path)
    assert_same(records, parts)
    assert [r.damaged for r in records] == [(), (Box(1, 2, 3, 4),), (Box(2, 2, 3, 4),)]


def test_arrays_may_be_used_again_at_once(tmp_path: Path) -> None:
    path, parts = tmp_path / "512.strips", [strip(0), strip(30)]
    buffer = np.empty_like(parts[0].labels)
    with band(path) as journal:
        list(journal.finished())
        for part in parts:
            buffer[:] = part.labels
            journal.write(LabelRows(X0, part.y, buffer, part.probabilities))
            buffer[:] = 77
    assert_same(read(path), parts)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_torn_end_is_cut_off_and_written_anew(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("torn") / "512.strips"
    parts = written(path)
    whole = path.read_bytes()
    ends = [0]
    for count in (1, 2, 3):
        other = path.with_name(f"{count}.strips")
        written(other, count)
        ends.append(other.stat().st_size)
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:at])
        kept = max(i for i, end in enumerate(ends) if end <= at)
    else:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(flipped)
        kept = max(i for i, end in enumerate(ends) if end <= at)
    with band(path) as journal:
        assert_same(list(journal.finished()), parts[:kept])
        assert journal.y == 30 * kept
        for part in parts[kept:]:
            journal.write(part)
    assert_same(read(path), parts)


def test_strips_of_another_band_or_out_of_order_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "512.strips"
    written(path)
    with BandJournal(path, X0, X1 + 1, HEIGHT) as other:
        assert list(other.finished()) == []
    with band(path) as journal:
        list(journal.finished())
        journal.write(strip(30))
    assert read(path) == []


def test_a_full_disk_is_said_at_the_latest_at_the_end(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import resource, signal
        import numpy as np
        from pathlib import Path
        from histostream.wsi.errors import OutputError
        from histostream.wsi.outputs.journal import BandJournal
        from histostream.wsi.outputs.label_rows import LabelRows

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        rng = np.random.default_rng(0)
        try:
            with BandJournal(Path({str(tmp_path / "0.strips")!r}), 0, 500, 10_000) as journal:
                list(journal.finished())
                for y in range(0, 10_000, 100):
                    labels = rng.integers(0, 256, (100, 500), dtype=np.uint8)
                    journal.write(LabelRows(0, y, labels))
        except OutputError as error:
            print(y, error)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    y, said = done.stdout.split(" ", 1)
    assert "no room to write" in said, done.stderr
    assert int(y) < 2000
    with BandJournal(tmp_path / "0.strips", 0, 500, 10_000) as journal:
        assert 1 <= len(list(journal.finished())) <= 4


def test_a_journal_says_what_was_begun(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.read() is None
    view_info = ViewInfo("slide.svs", 700, 40, 0.5, 2.0, (ClassInfo("nucleus", (30, 100, 220)),))
    manifest = RunManifest({"options": {"blend": "hann"}}, ((0, 512), (512, 700)), 900, 3, view_info)
    journal.begin(manifest)
    assert journal.read() == manifest
    content = json.loads((journal.path / "begun.json").read_text())
    assert list(content) == ["what", "bands", "max_memory_mib", "runs", "seen"]
    (journal.path / "begun.json").write_text(json.dumps({**content, "later": 1}))
    assert journal.read() == replace(manifest, further={"later": 1})
    assert not journal.has_strips()
    with journal.band(0, 512, 40) as rows:
        list(rows.finished())
        rows.write(LabelRows(0, 0, np.zeros((40, 512), np.uint8)))
    assert journal.has_strips()
    journal.remove()
    assert not list(tmp_path.iterdir())
    journal.remove()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"what": 3, "bands": [], "runs": 1}', '{"what": {}}'])
def test_a_journal_that_cannot_be_read_names_the_remedy(tmp_path: Path, text: str) -> None:
    folder = tmp_path / ".journal"
    folder.mkdir()
    (folder / "begun.json").write_text(text)
    with pytest.raises(JournalError, match=r"begun\.json.*--restart"):
        Journal(tmp_path).read()


def test_a_journal_without_a_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / ".journal").write_text("in the way")
    with pytest.raises(OutputError, match=r"\.journal"):
        Journal(tmp_path).begin(RunManifest({}, (), None, 1))


def test_a_watcher_sees_whole_strips_only_and_leaves_the_file_alone(tmp_path: Path) -> None:
    path, watched = tmp_path / "512.strips", tmp_path / "watched"
    parts = written(path)
    whole = path.read_bytes()
    ends = [end for _, end in watched_strips(path, X0, X1, HEIGHT)]
    assert ends[-1] == len(whole)
    offset = y = 0
    seen: list[Record] = []
    for size in range(0, len(whole) + 1, 997):  # as it grows, strips mostly torn
        watched.write_bytes(whole[:size])
        for record, end in watched_strips(watched, X0, X1, HEIGHT, offset=offset, y=y):
            seen.append(record)
            offset, y = end, y + len(record.part.labels)
        assert len(seen) == sum(end <= size for end in ends)
        assert watched.stat().st_size == size
    watched.write_bytes(whole)
    seen += [r for r, _ in watched_strips(watched, X0, X1, HEIGHT, offset=offset, y=y)]
    assert_same(seen, parts)
    assert list(watched_strips(tmp_path / "none", X0, X1, HEIGHT)) == []
    assert list(watched_strips(path, X0, X1 - 1, HEIGHT)) == []  # of another band


def test_strips_of_versions_before_0_2_have_scores_of_bytes(tmp_path: Path) -> None:
    """A record as version 0.1 wrote it: magic HSJ1, CRC-32, three lengths, JSON, labels, scores."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (30, X1 - X0), dtype=np.uint8)
    scores = rng.integers(0, 256, (30, X1 - X0, 3), dtype=np.uint8)
    description = {"x": X0, "y": 0, "height": 30, "width": X1 - X0, "classes": 3, "outside": False, "damaged": []}
    parts = [json.dumps(description).encode(), *(imagecodecs.zstd_encode(a.tobytes()) for a in (labels, scores))]
    body = struct.pack("<IQQ", *map(len, parts)) + b"".join(parts)
    path = tmp_path / "512.strips"
    path.write_bytes(b"HSJ1" + struct.pack("<I", zlib.crc32(body)) + body)
    ((record, _),) = watched_strips(path, X0, X1, HEIGHT)
    np.testing.assert_array_equal(record.part.labels, labels)
    np.testing.assert_array_equal(record.part.probabilities / 65535, scores / 255)  # type: ignore[operator]
