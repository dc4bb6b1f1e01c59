"""Who may import whom, and what no file may contain."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OURS = {"models", "weights", "mini", "data", "embedded", "files", "reverse_sd", "train", "eval", "tables"}
OURS |= {"generate", "baselines"}
TENSORS = {"torch", "torchvision", "numpy", "PIL", "tqdm", "safetensors", "tokenizers", "huggingface_hub"}
COMPOSITION = OURS | TENSORS
TRAINING = {"torch", "numpy", "safetensors", "tqdm", "models", "weights", "data", "mini"}  # of the miniatures

# What a file may import when it is imported itself; the standard library always.
ALLOWED = {
    "models/layers.py": {"torch"},
    "models/*.py": {"torch", "models"},
    "weights/kinds/*.py": {"torch", "tokenizers", "models", "weights"},
    "weights/*.py": {
        "torch",
        "numpy",
        "safetensors",
        "tokenizers",
        "huggingface_hub",
        "tqdm",
        "models",
        "weights",
    },
    "reverse_sd.py": {"torch", "numpy", "models"},
    "files.py": {"numpy"},
    "embedded.py": {"PIL", "numpy"},
    "data.py": {"torch", "torchvision", "numpy", "PIL", "tqdm", "embedded", "files"},
    "mini/pretrain.py": TRAINING | {"tokenizers", "baselines"},
    "mini/diffusion.py": TRAINING | {"generate"},
    **{f"mini/{name}.py": TRAINING | {"PIL", "generate"} for name in ("judge", "generated")},
    **{f"mini/{name}.py": TRAINING for name in ("loop", "write", "autoencoder", "contrastive", "naming")},
    "mini/*.py": {"numpy", "PIL", "tqdm", "data", "mini"},
    "train.py": COMPOSITION,
    "eval.py": COMPOSITION,
    "tables/*.py": COMPOSITION,
    "generate.py": COMPOSITION,
    "baselines.py": COMPOSITION,
}
FILES = [
    path
    for pattern in ("*.py", "models/*.py", "weights/*.py", "weights/kinds/*.py", "mini/*.py", "tables/*.py")
    for path in sorted(ROOT.glob(pattern))
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
    if path.name not in ("reverse_sd.py", "train.py"):
        assert imports(module) - {"pyarrow"} <= allowed(path) | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_banned(path: Path):
    text = path.read_text()
    banned = (
        r"strict[=]False|\bpickle[.]|torch[.]load\(|torch[.]save\(|allow_pickle[=]True|except[:]\s*$"
        r"|TOD[O]|FIXM[E]|NotImplemented[E]rror"
    )
    assert not re.findall(banned, text, re.MULTILINE)


# Beside tests and benchmarks: tables are made of runs of train.py, and baselines.py trains by its steps.
MAY_IMPORT = {
    "train": ("eval.py", "baselines.py", "tables/*.py"),
    "eval": ("train.py",),
    "generate": ("mini/diffusion.py", "mini/judge.py", "mini/generated.py", "tables/*.py"),
    "tables": ("eval.py", "tables/*.py"),
}


def test_only_tests_and_benchmarks_import_the_command_line_files():
    for path in FILES:
        for module in imports(ast.parse(path.read_text())) & MAY_IMPORT.keys():
            name = path.relative_to(ROOT)
            assert any(name.match(pattern) for pattern in MAY_IMPORT[module]), f"{name} imports {module}"


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_importing_anything_prints_and_writes_nothing(tmp_path: Path):
    code = "import reverse_sd, data, weights, train, eval, mini.scenes, mini.pretrain, models.unet, generate"
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
    assert test.splitlines()[-1] == ".venv/bin/python -m pytest -q"
    folders = ["models/", "weights/", "mini/", "tables/", "tests/"]
    for part in [path.name for path in ROOT.glob("*.py")] + folders:
        assert part in readme
