"""The numbers of README.md's tables from runs are those of the results files that a marker above them names:
a row of the table for each of its names, or of its names separated by "|"; cosines, or the metric behind "#",
or the paper's number. "FILE: NAME" is a row of another results file."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from tables.exhibit import interval, short
from training.evaluate import summary
from training.metrics import student_interval

README = (ROOT / "README.md").read_text()
TABLE = re.compile(r"<!-- numbers (\S+)\n([^>]*)-->\n\n(?:\|.*\n){2}((?:\|.*\n)+)")
RESULT = re.compile(r"<!-- result (\S+) -->\n```\n([^`]*)\n```\n")


def rows_of(file: str) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((ROOT / file).read_text())["rows"]}


def wrong_numbers(text: str) -> list[str]:
    """What differs from the results files: rows of tables, and whole summaries of runs."""
    wrong = []
    for file, names, lines in TABLE.findall(text):
        file, _, metric = file.partition("#")
        rows = rows_of(file)
        names = [name.strip() for name in re.split(r"[;\n]", names) if name.strip()]
        for cells, line in zip(names, lines.splitlines(), strict=True):
            shown = [cell.strip() for cell in line.split("|")[2:] if cell.strip()]
            for name, cell in zip(cells.split(" | "), shown, strict=True):
                other, _, of_other = name.partition(".json: ")
                if name.startswith("paper: "):
                    expected = short(rows[name.removeprefix("paper: ")]["paper"])
                else:
                    row = rows_of(f"{other}.json")[of_other] if of_other else rows[name]
                    per_seed = row[metric or "per_seed"]
                    expected = f"{short(float(np.mean(per_seed)))} ({interval(student_interval(per_seed))})"
                if cell != expected:
                    wrong.append(f"{file}, {name}: {line}, not {expected}")
    for file, block in RESULT.findall(text):
        result = json.loads((ROOT / file).read_text())
        if block != summary(Path(block.splitlines()[0]), result):
            wrong.append(f"{file}: {block}")
    return wrong


def test_the_readme_has_the_numbers_of_its_results_files():
    assert TABLE.search(README) and RESULT.search(README)
    assert wrong_numbers(README) == []


@pytest.mark.parametrize("pattern", [TABLE, RESULT])
def test_a_changed_digit_is_seen(pattern: re.Pattern):
    found = pattern.search(README)
    place = README.rindex("." + re.findall(r"\.(\d{3})", found[0])[-1], found.start(), found.end()) + 1
    digit = "7" if README[place] != "7" else "3"
    assert wrong_numbers(README[:place] + digit + README[place + 1 :])


# -- AUDIT.md, mini/README.md and the rest of README.md: each number of a paragraph or table row stands in a
# results file or a card that it or the header of its table links

NUMBER = re.compile(r"[+-]?\.\d{3,4}\b|\d+\.\d(?= ?%)|\d+\.\d+(?= dB)")
LINK = re.compile(r"\]\(([^)]+\.(?:md|json))\)")
SECTIONS = {name: (ROOT / name).read_text() for name in ("AUDIT.md", "mini/README.md")}
_, _, runs = SECTIONS["AUDIT.md"].partition("\n## What the miniature confirms")
SECTIONS["AUDIT.md"], _, _ = runs.partition("\n## ")  # the part about the project's own runs
SECTIONS["README.md"] = TABLE.sub("", RESULT.sub("", README))
FEWEST = {"AUDIT.md": 300, "mini/README.md": 40, "README.md": 2}  # numbers that are found in them


def values(card: object) -> list[float]:
    if isinstance(card, dict | list):
        return [v for part in (card.values() if isinstance(card, dict) else card) for v in values(part)]
    return [card] if isinstance(card, float) else []


def numbers_of(path: Path) -> set[str]:
    """The numbers of a results file, with and without sign; of a card, as decimals and as percentages."""
    if path.suffix == ".json":
        shown = [(short(v), f"{100 * v:.1f}", f"{v:.2f}") for v in values(json.loads(path.read_text()))]
        return {number for of in shown for number in of}
    found = NUMBER.findall(path.read_text().replace("−", "-"))
    return {*found, *(number.lstrip("+-") for number in found)}


def unsupported(section: str, folder: Path) -> list[str]:
    """The numbers of a section that no file linked in their paragraph, their row or its header has."""
    wrong = []
    for block in section.replace("−", "-").split("\n\n"):
        rows = re.split(r"\n(?=[|*])", block)
        above = LINK.findall(rows[0]) if rows[0].startswith("|") else []
        for row in rows:
            there = {n for file in {*LINK.findall(row), *above} for n in numbers_of(folder / file)}
            wrong += [f"{number}: {row[:60]}" for number in NUMBER.findall(row) if number not in there]
    return wrong


@pytest.mark.parametrize("name", SECTIONS)
def test_each_number_stands_in_a_linked_file(name: str):
    section, folder = SECTIONS[name].replace("−", "-"), (ROOT / name).parent
    numbers = NUMBER.findall(section)
    assert len(numbers) >= FEWEST[name]
    assert unsupported(section, folder) == []
    for number in (numbers[0], numbers[-1]):
        changed = number[:-1] + ("0" if number[-1] != "0" else "7")
        assert unsupported(section.replace(number, changed, 1), folder)
