"""Laws of objects: the same for every cut into bands and parts, and the same as scipy finds."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from histostream.wsi.outputs.label_rows import NOT_ANALYSED
from histostream.wsi.outputs.objects import components
from histostream.wsi.outputs.objects.components import Complete, Components
from histostream.wsi.outputs.objects.ellipse import eccentricity
from histostream.wsi.outputs.objects.outline import trace
from histostream.wsi.outputs.objects.store import Shape, Store
from histostream.wsi.runs import Runs

Labels = NDArray[np.uint8]
WANTED = [1, 2]

label_maps = arrays(
    np.uint8,
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    elements=st.sampled_from([0, 1, 1, 2, NOT_ANALYSED]),
)


def with_scipy(labels: Labels) -> list[tuple[int, int, NDArray[np.bool_]]]:
    """First pixel, class and mask of each component, by scipy, which joins sides by default."""
    found = []
    for value in WANTED:
        numbered, count = ndimage.label(labels == value)
        for i in range(1, count + 1):
            mask = numbered == i
            found.append((int(np.flatnonzero(mask)[0]), value, mask))
    return sorted(found, key=lambda item: item[0])


def components_of(
    labels: Labels,
    band_px: int = 1 << 20,
    rows: int = 1 << 20,
    areas: Sequence[tuple[float, float]] = (),
    *,
    outlines: bool = True,
) -> Iterator[Complete]:
    height, width = labels.shape
    found = Components(width, height, WANTED, areas, outlines=outlines)
    for x in range(0, width, band_px):
        for y in range(0, height, rows):
            yield from found.add(x, y, labels[y : y + rows, x : x + band_px])
    yield found.finish()


def stored(path: Path, found: Iterator[Complete]) -> list[Shape]:
    store = Store(path / "objects")
    try:
        for complete in found:
            store.add(complete)
        return list(store)
    finally:
        store.remove()


def polygon(shape: Shape) -> shapely.Polygon:
    return shapely.Polygon(shape.rings[0], shape.rings[1:])


def crossings(mask: NDArray[np.bool_]) -> float:
    """Crofton's perimeter, with lines along rows, columns and both diagonals."""
    p = np.pad(mask, 1).astype(int)
    straight = np.abs(np.diff(p, axis=0)).sum() + np.abs(np.diff(p, axis=1)).sum()
    falling, rising = p[1:, 1:] - p[:-1, :-1], p[1:, :-1] - p[:-1, 1:]
    return float(np.pi / 8 * (straight + (np.abs(falling) + np.abs(rising)).sum() / np.sqrt(2)))


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few pixels, and components that are settled all the time."""
    monkeypatch.setattr(components, "BLOCK_PX", 30)
    monkeypatch.setattr(components, "SETTLE_CORNERS", 9)
    monkeypatch.setattr(components, "SETTLE_COMPONENTS", 2)


@pytest.mark.usefixtures("small_steps")
@settings(max_examples=250, deadline=None)
@given(label_maps, st.integers(1, 9), st.integers(1, 9))
def test_objects_are_those_of_the_whole_map_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, labels: Labels, band_px: int, rows: int
) -> None:
    path = tmp_path_factory.getbasetemp()
    found = stored(path, components_of(labels, band_px, rows))
    expected = with_scipy(labels)
    assert len(found) == len(expected)
    for shape, (_, value, mask) in zip(found, expected, strict=True):
        ys, xs = np.nonzero(mask)
        assert (shape.value, shape.area_px) == (value, len(xs))
        assert shape.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert (shape.x, shape.y) == pytest.approx((xs.mean() + 0.5, ys.mean() + 0.5))
        assert shape.perimeter_px == pytest.approx(crossings(mask))
        pixels = shapely.union_all(shapely.box(xs, ys, xs + 1, ys + 1))
        assert pixels.geom_type == "Polygon"
        assert polygon(shape).is_valid
        assert polygon(shape).equals(pixels)


@pytest.mark.usefixtures("small_steps")
@settings(max_examples=250, deadline=None)
@given(label_maps, st.integers(1, 9), st.integers(1, 9))
def test_objects_without_outlines_are_the_same_however_the_map_is_cut(labels: Labels, band_px: int, rows: int) -> None:
    found = [
        (int(c.first[i]), int(c.value[i]), int(c.area[i]), c.box[i].tolist(), c.moments[i].tolist())
        for c in components_of(labels, band_px, rows, outlines=False)
        for i in range(len(c.first))
    ]
    expected = []
    for first, value, mask in with_scipy(labels):
        y, x = np.nonzero(mask)
        box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        moments = [x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
        expected.append((first, value, len(x), box, moments))
    assert sorted(found) == expected


@pytest.mark.usefixtures("small_steps")
@settings(max_examples=150, deadline=None)
@given(label_maps, st.integers(1, 9), st.integers(1, 9))
def test_rings_are_the_same_numbers_however_the_map_is_cut(
    tmp_path_factory: pytest.TempPathFactory, labels: Labels, band_px: int, rows: int
) -> None:
    path = tmp_path_factory.getbasetemp()
    whole, cut = (
        [(s.perimeter_px, s.eccentricity, [r.tolist() for r in s.rings]) for s in shapes]
        for shapes in (
            stored(path, components_of(labels)),
            stored(path, components_of(labels, band_px, rows)),
        )
    )
    assert whole == cut


def test_rings_begin_at_the_top_and_turn_outside_clockwise(tmp_path: Path) -> None:
    labels = np.ones((5, 7), np.uint8)
    labels[1, 1] = labels[2, 2] = labels[3, 4:6] = 0
    (shape,) = stored(tmp_path, components_of(labels))
    assert [ring.tolist() for ring in shape.rings] == [
        [[0, 0], [7, 0], [7, 5], [0, 5]],
        [[1, 1], [1, 2], [2, 2], [2, 1]],  # meets the next in a corner
        [[2, 2], [2, 3], [3, 3], [3, 2]],
        [[4, 3], [4, 4], [6, 4], [6, 3]],
    ]


def test_pixels_that_meet_in_a_corner_are_two_objects(tmp_path: Path) -> None:
    assert len(stored(tmp_path, components_of(np.eye(9, dtype=np.uint8)))) == 9


def test_small_objects_are_left_out(tmp_path: Path) -> None:
    labels = np.zeros((9, 30), np.uint8)
    labels[1, 1:4], labels[5:7, 20:22] = 1, 2
    found = stored(tmp_path, components_of(labels, areas=[(3.5, np.inf)] * 2))
    assert [(s.value, s.area_px) for s in found] == [(2, 4)]


def test_perimeter_of_a_disc_is_that_of_a_circle(tmp_path: Path) -> None:
    y, x = np.mgrid[-70:70, -70:70] + 0.5
    (shape,) = stored(tmp_path, components_of((np.hypot(x, y) < 60).astype(np.uint8)))
    assert shape.perimeter_px == pytest.approx(2 * np.pi * 60, rel=0.01)
    assert shape.eccentricity < 0.02


def test_eccentricity_is_that_of_the_ellipse_far_from_the_origin_too() -> None:
    y, x = np.mgrid[-40:40, -80:80]
    inside = (x / 60) ** 2 + (y / 30) ** 2 < 1
    for away in (0, 150_000):
        xs, ys = x[inside] + away, y[inside] + away
        sums = [int(v.sum()) for v in (xs, ys, xs * xs, ys * ys, xs * ys)]
        (found,) = eccentricity(np.array([len(xs)]), np.array([sums], object))
        assert found == pytest.approx(np.sqrt(1 - 0.25), abs=0.002)


def test_sums_of_a_class_that_fills_a_slide_do_not_overflow() -> None:
    side = 200_000
    found = Components(side, side, [1])
    row = np.broadcast_to(np.uint8(1), (1, side))
    book = found._book
    runs = Runs(np.array(row))
    book.add(runs, 0, side - 1, side)
    totals = book.totals(book.roots())
    for _ in range(20):  # doubled to a million rows
        totals.sums[...] *= 2
        low, high = totals.sums[:, 3::2], totals.sums[:, 4::2]
        high += low >> 32
        low &= (1 << 32) - 1
    (moments,) = components._moments(totals.sums[1:])
    assert moments[3] == (side - 1) ** 2 * side << 20


def test_a_band_that_is_left_out_is_refused() -> None:
    found = Components(100, 10, [1])
    list(found.add(0, 0, np.zeros((10, 40), np.uint8)))
    with pytest.raises(ValueError, match="a band begins at x=60"):
        list(found.add(60, 0, np.zeros((10, 40), np.uint8)))


@pytest.mark.full
def test_memory_does_not_grow_with_the_slide(tmp_path: Path) -> None:
    y, x = np.mgrid[0:512, 0:1024]
    rows = ((x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 30).astype(np.uint8)
    rows[:, 512:518] = 2  # from top to bottom
    peaks = []
    for height in (2048, 6144):
        found, store = Components(1024, height, WANTED), Store(tmp_path / "objects")
        tracemalloc.start()
        for top in range(0, height, 512):
            for complete in found.add(0, top, rows):
                store.add(complete)
        store.add(found.finish())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(store) == height * 1024 // 256 + 1
        store.remove()
    assert peaks[1] < 1.3 * peaks[0]


def test_traces_of_nothing_are_nothing() -> None:
    nothing = components.Corners(*(np.zeros(0, np.int32) for _ in range(3)))
    assert len(trace(nothing, 0).object_ends) == 0
