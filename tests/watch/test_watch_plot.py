"""Terminal plots: positions of dots, width limits, and axis labels that are distinct."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from penchant.watch.plot import ASCII, GUTTER, UNICODE, Point, axis_label, bin_points, plot


def drawn(*args: object, **kw: object) -> list[str]:
    return [line.plain for line in plot(*args, **kw)]  # type: ignore[arg-type]


def test_a_rising_line_goes_from_corner_to_corner() -> None:
    found = drawn([(s, s / 10) for s in range(11)], [], 20, 6, UNICODE)
    assert found == [
        "     1.0│         ⡠⠊",
        "        │       ⡠⠊  ",
        "     0.5│    ⡠⠒⠉    ",
        "        │  ⡠⠊       ",
        "     0.0│⡠⠊         ",
        "        └0────────10",
    ]
    assert (ord(found[0][-1]) - 0x2800) & 0x08  # the topmost dot of the last column
    assert (ord(found[4][GUTTER + 1]) - 0x2800) & 0x40  # the lowest of the first


def test_evaluations_stand_above_the_line_with_their_intervals() -> None:
    points = [Point(0, 0.5), Point(10, 0.5, (0.0, 1.0))]
    found = drawn([(s, 0.5) for s in range(1, 11)], points, 20, 6, ASCII)
    column = [line[GUTTER + 11] for line in found[:5]]
    assert column == ["|", "|", "o", "|", "|"]
    assert found[2][GUTTER + 1] == "o" and found[2][GUTTER + 2] in ".'"
    assert [line[:GUTTER].strip() for line in found[:5]] == ["1.0", "", "0.5", "", "0.0"]
    assert "".join(found).isascii()


@pytest.mark.parametrize("width,height", [(12, 2), (13, 3), (40, 8), (201, 30)])
@pytest.mark.parametrize(
    "line",
    [
        [(1.0, 2.0)],
        [(1.0, 0.0), (2.0, 0.0)],
        [(s, (-1) ** s * 1e90) for s in range(50)],
        [(s, 0.6931 + 1e-9 * s) for s in range(5000)],
        [(1e6 + s, -1e-7 * s) for s in range(30)],
        [],
    ],
)
def test_no_line_is_wider_than_it_may_be(line: list[tuple[float, float]], width: int, height: int) -> None:
    points = [Point(line[-1][0], line[-1][1], (line[-1][1] - 1, line[-1][1] + 1))] if line else []
    for glyphs in (UNICODE, ASCII):
        found = drawn(line, points, width, height, glyphs)
        assert len(found) == height and {cell_len(x) for x in found} <= {width}
    assert len(drawn(line, points, 5, 1)) == 1  # too small to draw in


def test_a_column_shows_the_mean_of_its_steps() -> None:
    line = [(float(s), float(s % 2)) for s in range(1000)]
    assert bin_points(line, 0, 999, 10)[3:5] == [(3, pytest.approx(0.5, abs=0.01)), (4, pytest.approx(0.5, abs=0.01))]
    assert [at for at, _ in bin_points([(0, 1.0), (9, 2.0)], 0, 9, 10)] == [0, 9]


@pytest.mark.parametrize(
    "value,span,largest,expected",
    [
        (0.6931, 0.3, 0.7, "0.69"),
        (-0.0004, 0.03, 0.03, "0.000"),
        (1234.5, 900.0, 2000.0, "1234"),
        (3e-5, 1e-5, 3e-5, "3.0e-05"),
        (2e6, 1e6, 2e6, "2.0e+06"),
    ],
)
def test_labels_have_the_decimals_that_tell_places_apart(
    value: float, span: float, largest: float, expected: str
) -> None:
    assert axis_label(value, span, largest) == expected
