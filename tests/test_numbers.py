"""The numbers of README.md from runs are those of the results files that a marker above them names, of a
cosine in each row, or of the metric behind "#"."""

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


def wrong_numbers(text: str) -> list[str]:
    """What differs from the results files: rows of tables, and whole summaries of runs."""
    wrong = []
    for file, names, lines in TABLE.findall(text):
        file, _, metric = file.partition("#")
        rows = {row["name"]: row for row in json.loads((ROOT / file).read_text())["rows"]}
        names = [name.strip() for name in re.split(r"[;\n]", names) if name.strip()]
        for name, line in zip(names, lines.splitlines(), strict=True):
            per_seed = rows[name][metric or "per_seed"]
            expected = f"{short(float(np.mean(per_seed)))} ({interval(student_interval(per_seed))})"
            if line.split("|")[2].strip() != expected:
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


# -- AUDIT.md: each number of a paragraph or table row stands in a results file that it links

NUMBER = re.compile(r"[+-]?\.\d{3,4}\b|\d+\.\d(?= ?%)")
LINK = re.compile(r"\]\((results/[^)]+\.md)\)")


def results_section(text: str) -> str:
    """AUDIT.md's part about the project's own runs."""
    return text.partition("\n## What the miniature confirms")[2].partition("\n## ")[0]


def unsupported(section: str) -> list[str]:
    """The numbers of a section that no results file linked in their paragraph or row has."""
    blocks = re.split(r"\n\n|\n(?=[|*])", section.replace("−", "-"))
    wrong = []
    for block in blocks:
        text = " ".join((ROOT / file).read_text().replace("−", "-") for file in LINK.findall(block))
        there = set(NUMBER.findall(text)) | {number.lstrip("+-") for number in NUMBER.findall(text)}
        wrong += [f"{number}: {block[:60]}" for number in NUMBER.findall(block) if number not in there]
    return wrong


def test_each_number_of_the_audit_stands_in_a_linked_results_file():
    section = results_section((ROOT / "AUDIT.md").read_text())
    assert len(NUMBER.findall(section)) > 50
    assert unsupported(section) == []
    first = NUMBER.search(section.replace("−", "-"))[0]
    changed = first[:-1] + ("0" if first[-1] != "0" else "7")
    assert unsupported(section.replace("−", "-").replace(first, changed, 1))
