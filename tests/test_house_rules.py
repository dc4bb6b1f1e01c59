"""Who may import whom, and what no file may contain."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OURS = {"models", "weights", "training", "mini", "tables"}
OURS |= {"archives", "backbones", "baselines", "clipscore", "columns", "command", "data", "embedded"}
OURS |= {"files", "generate", "graphs", "inversion", "manifests", "reverse_sd", "schema", "words"}
TENSORS = {"torch", "torchvision", "numpy", "PIL", "tqdm", "safetensors", "tokenizers", "huggingface_hub"}
COMPOSITION = OURS | TENSORS
MINIATURES = {"torch", "numpy", "safetensors", "tqdm", "models", "weights", "data", "training", "mini"}
MINIATURES |= {"command", "files", "schema"}

# What a file may import when it is imported itself; the standard library always.
ALLOWED = {
    "models/layers.py": {"torch"},
    "models/*.py": {"torch", "models"},
    "weights/kinds/*.py": {"torch", "tokenizers", "models", "weights", "schema"},
    "weights/__main__.py": {"torch", "command", "weights"},
    "weights/*.py": {
        "files",
        "schema",
        "torch",
        "numpy",
        "safetensors",
        "tokenizers",
        "huggingface_hub",
        "tqdm",
        "models",
        "weights",
    },
    "command.py": {"safetensors", "data", "weights"},
    "backbones.py": {"torch"},
    "reverse_sd.py": {"torch", "numpy", "backbones", "files", "schema", "words"},
    "files.py": {"numpy"},
    "schema.py": {"files"},
    "graphs.py": set(),
    "embedded.py": {"PIL", "numpy", "graphs"},
    "archives.py": {"numpy", "files"},
    "columns.py": {"numpy", "files", "graphs", "archives"},
    "manifests.py": {"columns", "embedded", "files"},
    "data.py": {"torch", "torchvision", "numpy", "PIL", "tqdm", "embedded", "files", "archives", "columns",
                "manifests"},
    "mini/pretrain.py": MINIATURES | {"tokenizers", "reverse_sd"},
    "mini/diffusion.py": MINIATURES | {"generate"},
    **{f"mini/{name}.py": MINIATURES | {"PIL", "generate"} for name in ("judge", "generated")},
    **{f"mini/{name}.py": MINIATURES for name in ("loop", "write", "autoencoder", "contrastive", "naming")},
    "mini/captioning.py": MINIATURES | {"tokenizers"},
    "mini/*.py": {"numpy", "PIL", "tqdm", "data", "files", "mini", "command"},
    "training/metrics.py": {"numpy"},
    "training/rows.py": {"torch", "numpy", "tqdm", "data", "files", "schema"},
    "training/cache.py": {"torch", "numpy", "data", "files", "training"},
    "training/loop.py": {"torch", "numpy", "safetensors", "tqdm", "data", "files", "schema"},
    "training/bank.py": {"torch", "numpy", "tqdm", "weights", "columns", "data", "graphs", "files"},
    "training/report.py": {"PIL", "files"},
    "training/reading.py": {"torch", "numpy", "PIL", "tqdm", "weights", "backbones", "clipscore", "command"}
    | {"data", "files", "models", "schema", "training", "words"},
    "training/*.py": TENSORS
    | {"models", "weights", "command", "data", "files", "schema", "backbones", "reverse_sd", "training"}
    | {"words", "baselines", "clipscore"},
    "train.py": COMPOSITION,
    "eval.py": COMPOSITION,
    "tables/*.py": COMPOSITION,
    "generate.py": COMPOSITION,
    "inversion.py": COMPOSITION,
    "baselines.py": {"torch", "numpy", "models"},
    "clipscore.py": {"torch", "numpy", "PIL", "data", "weights"},
    "words.py": set(),  # after tables/*.py, since the pattern also matches tables/words.py
}
FILES = [
    path
    for folder in ("", "models", "weights", "weights/kinds", "training", "mini", "tables")
    for path in sorted((ROOT / folder).glob("*.py"))
]


def allowed(path: Path) -> set[str]:
    name = path.relative_to(ROOT)
    return next(modules for pattern, modules in ALLOWED.items() if name.match(pattern))


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path: Path):
    module = ast.parse(path.read_text())
    at_import = ast.Module([n for n in module.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)], [])
    strays = imports(at_import) - allowed(path) - set(sys.stdlib_module_names)
    assert not strays, f"{path.name} may not import {strays}"
    inside = imports(module) - COMPOSITION - {"pyarrow"} - set(sys.stdlib_module_names)
    assert not inside, f"{path.name} imports {inside} in a function"


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Our modules that a file imports, at its head or in a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= parts if parts <= modules else parts | {node.module}
    return names & modules - {module_of(path)}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    found, index, low, stack = [], {}, {}, []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in arrows[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(sorted(component))

    for name in arrows:
        if name not in index:
            visit(name)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_files_import_each_other_in_a_circle_and_nobody_imports_the_commands():
    modules = {module_of(path) for path in FILES}
    # `from weights import load` reads weights/__init__.py, which only gathers names from its own files.
    arrows = {module_of(path): imported_modules(path, modules) for path in FILES}
    assert circles(arrows) == []
    assert [name for name, others in arrows.items() if others & {"train", "eval"}] == []


def test_no_file_is_too_long_to_read():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > 800} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_banned(path: Path):
    text = path.read_text()
    banned = (
        r"strict[=]False|\bpickle[.]|torch[.]load\(|torch[.]save\(|allow_pickle[=]True|except[:]\s*$"
        r"|TOD[O]|FIXM[E]|NotImplemented[E]rror"
    )
    assert not re.findall(banned, text, re.MULTILINE)


PLAIN = [path for path in FILES if path.name != "data.py"]


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_results_and_variables_are_nouns(path: Path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    documented = (node for node in nodes if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef))
    docstrings = [text for node in documented if (text := ast.get_docstring(node))]
    first = [text.split()[0] for text in docstrings]
    assert not {"What", "How", "Where", "Which"} & set(first)
    assert not [text for text in docstrings if re.search(r"[.:]\s+What\b[^?]*?[.]", text)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    if path.name != "scenes.py":  # a Scene's `said` is the view that its prompt names
        assert not {"said", "odd", "given", "asked", "how"} & names


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_importing_anything_prints_and_writes_nothing(tmp_path: Path):
    code = "import reverse_sd, data, weights, train, eval, mini.scenes, mini.pretrain, models.unet, inversion"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_readme_holds_the_two_commands_and_names_every_part():
    readme = (ROOT / "README.md").read_text()
    train, test = (readme.split(f"<!-- {name} command -->")[1].split("```")[1] for name in ("train", "test"))
    assert train.splitlines()[-1] == ".venv/bin/python train.py --backbone unet"
    assert test.splitlines()[-1] == ".venv/bin/python -m pytest -q -n 2 --dist loadfile"
    folders = ["models/", "weights/", "training/", "mini/", "tables/", "tests/"]
    for part in [path.name for path in ROOT.glob("*.py")] + folders:
        assert part in readme
