"""REGRESSIONS.md: every recorded failure of the field has a row, and the tests it names exist and run."""

import re

import pytest

from conftest import ROOT, allowed_skips

TEXT = (ROOT / "tests" / "REGRESSIONS.md").read_text()
ROWS = {row: cells for row, cells in re.findall(r"^\| ([A-Z]\d+) \| (.*) \|$", TEXT, re.MULTILINE)}
NUMBERS = {  # the others want what is not here yet
    "A": [*range(8, 14), 15, *range(17, 23), 30, 31, *range(35, 39), 45, *range(47, 54)],
    "B": [*range(1, 14), *range(15, 31)],
    "C": [*range(1, 9), 11, 13],
    "D": [*range(1, 33)],
    "H": [*range(1, 8), *range(9, 14), 15, *range(21, 25), 28, 29],
}
WANTED = [f"F{i}" for i in range(1, 35)]
WANTED += [f"{letter}{i:02}" for letter, numbers in NUMBERS.items() for i in numbers]
SOURCES = "\n".join(path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py")))
TESTS = set(re.findall(r"^def (test_\w+)\(", SOURCES, re.MULTILINE))
LONG = set(re.findall(r"^@pytest\.mark\.full\n(?:@.*\n)*def (test_\w+)\(", SOURCES, re.MULTILINE))


def test_every_failure_has_one_row():
    assert list(ROWS) == WANTED
    assert len(re.findall(r"^\| (?!row \|)", TEXT, re.MULTILINE)) == len(WANTED)


@pytest.mark.parametrize("row", WANTED)
def test_row_names_tests_that_run_or_the_rule_that_prevents_it(row):
    named = re.findall(r"`(test_\w+)`", ROWS[row])
    assert set(named) <= TESTS - LONG, set(named) - TESTS
    assert named or re.search(r"cannot occur.*\(rule \d+", ROWS[row])
    skips = allowed_skips((ROOT / "tests" / "skips.txt").read_text())
    assert not any(name in pattern for name in named for pattern, _ in skips)
