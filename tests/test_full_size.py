"""Every checkpoint of the registry in full size, from files with random values: values, time, memory. That in
shards, BLIP-2's, has a test in test_parity_blip2.py.

Gigabytes are written to pytest's temporary folder, one file at a time; benchmarks/loading.py measures.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from benchmarks import loading
from weights.registry import ENTRIES

SHARDED = {name for name, entry in ENTRIES.items() if any("-of-" in file for file in entry.files)}
FULL = [name for name, entry in ENTRIES.items() if entry.files and loading.cases(name)]
FULL = [name for name in FULL if name not in SHARDED]
MINIATURES = [name for name, entry in ENTRIES.items() if entry.folder]
# A load may take this much of the file's size and of the time that reading it takes, and some bytes and
# seconds more, whatever the size: names, modules, a tokenizer. README.md states what it does take; the bars
# on time leave room for slow processors beside fast disks.
MEMORY, MORE_BYTES = 1.2, 4_000_000
TIME, MORE_SECONDS = 1.5, 0.1


@pytest.mark.slow
@pytest.mark.parametrize("entry", FULL)
def test_loads_as_fast_as_it_reads_and_in_one_copy(entry: str, tmp_path: Path) -> None:
    print(f"\n{loading.HEADING}")  # shown with -s, and where a test fails
    results = {}
    for case, result in loading.run(entry, tmp_path, rounds=5):
        print(loading.line(case, result))
        results[str(case)] = result
    assert [case for case, result in results.items() if not result.same] == []
    above = {case: result.peak - MEMORY * result.size for case, result in results.items()}
    assert {case: held for case, held in above.items() if held >= MORE_BYTES} == {}
    late = {case: result.load - TIME * result.read for case, result in results.items()}
    assert {case: seconds for case, seconds in late.items() if seconds >= MORE_SECONDS} == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", MINIATURES)
def test_every_value_of_a_miniature_arrives(entry: str, tmp_path: Path) -> None:
    """Sizes at which building the model takes longer than reading: only the values count here."""
    for case in loading.cases(entry):
        (folder := tmp_path / str(case)).mkdir()
        source = loading.write(case, folder)
        assert loading.same(case, source), case


def test_loading_does_not_import_torch_s_compiler(tmp_path: Path) -> None:
    """It is 150 MB of modules, which random values or a torch.cat on the meta device would bring in."""
    source = loading.write(loading.Case("vit-mini", "vit", "hf"), tmp_path)
    code = f"import sys, weights; weights.load('vit', {str(source)!r}); sys.exit('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 0
