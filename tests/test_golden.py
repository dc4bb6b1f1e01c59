"""Golden files, their comparison, and the port in examples/ that they prove."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from safetensors.torch import load_file, save_file

import weights
from tests.test_train import tiny_blip
from weights.__main__ import main
from weights.golden import compare, golden

KINDS = [("vit", "vit-mini"), ("swin", "swin-mini"), ("swin", "swinv2-mini"), ("clip-vision", "clip-mini"),
         ("clip-text", "sd-mini"), ("vae", "sd-mini"), ("unet", "sd-mini"), ("unet-encoder", "sd-mini")]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "vit"
    golden("vit", folder, "vit-mini", dtype=torch.float64)
    return folder


@pytest.mark.parametrize("kind, source", KINDS)
def test_golden_files_are_what_the_model_makes(kind: str, source: str, tmp_path: Path):
    names = golden(kind, tmp_path / "golden", source)
    index = json.loads((tmp_path / "golden" / "index.json").read_text())
    assert [entry["name"] for entry in index["activations"]] == names and len(names) > 20
    files = {part: load_file(tmp_path / "golden" / f"{part}.safetensors")
             for part in ("inputs", "activations", "outputs", "weights")}
    for part in ("inputs", "activations", "outputs"):
        assert {entry["name"]: entry["shape"] for entry in index[part]} == {
            name: list(value.shape) for name, value in files[part].items()}
    model = weights.build(kind, index["config"])
    weights.load_strict(model, files["weights"])
    if kind == "vae":
        again = model.eval().encode(files["inputs"]["images"])
        assert torch.allclose(again, files["outputs"]["latents"], atol=1e-5)
    elif kind != "unet-encoder":
        again = model.eval()(**files["inputs"])
        assert torch.allclose(again, files["outputs"]["output"], atol=1e-4)
    assert not [d.name for d in compare(tmp_path / "golden", tmp_path / "golden") if d.problem]


def test_blip_and_minilm(tmp_path: Path, minilm_folder: Path):
    (tmp_path / "blip").mkdir()
    for kind, source in {"blip": tiny_blip(tmp_path / "blip"), "minilm": minilm_folder}.items():
        names = golden(kind, tmp_path / f"golden-{kind}", source)
        assert len(names) > 20
        inputs = load_file(tmp_path / f"golden-{kind}" / "inputs.safetensors")
        with torch.no_grad():
            again = weights.load(kind, source)(**inputs)
        output = load_file(tmp_path / f"golden-{kind}" / "outputs.safetensors")["output"]
        assert torch.allclose(again, output, atol=1e-5)


def test_the_numpy_port_passes(vit: Path, tmp_path: Path, capsys):
    script = [sys.executable, str(ROOT / "examples" / "vit_numpy.py"), str(vit), str(tmp_path / "port")]
    subprocess.run(script, check=True, env=environment(), capture_output=True)
    assert main(["compare", str(vit), str(tmp_path / "port"), "--tolerance", "1e-10"]) == 0
    assert "all 45 tensors agree" in capsys.readouterr().out


def test_the_first_difference_is_named(vit: Path, tmp_path: Path, capsys):
    port = load_file(vit / "activations.safetensors")
    for name in ("blocks.3.norm2", "blocks.3.mlp.fc1", "norm"):
        port[name] = port[name] * 1.01
    save_file(port, tmp_path / "port.safetensors")
    assert main(["compare", str(vit), str(tmp_path / "port.safetensors")]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("blocks.3.norm2 is the first that differs: off by")
    assert printed[1].endswith("the last of them blocks.3.attn.proj")
    assert "3 of 44 tensors differ" in printed[2]
    port["blocks.0.norm1"] = port["blocks.0.norm1"].flatten()
    port["blocks.1.norm1"][0, 0, 0] = torch.nan
    np.savez(tmp_path / "port.npz", **{name: value.numpy() for name, value in port.items()})
    problems = [d.problem for d in compare(vit, tmp_path / "port.npz") if d.problem]
    assert problems[0].startswith("shape") and "nan" in problems[1]


def test_faults_in_one_line(vit: Path, tmp_path: Path, capsys):
    for arguments, says in {
        ("golden", "vit", str(vit), "--source", "vit-mini"): "not an empty folder",
        ("compare", str(tmp_path), str(vit)): "holds no index.json",
        ("compare", str(vit), str(tmp_path)): "holds neither",
        ("compare", str(vit), str(vit / "weights.safetensors")): "none of its names",
    }.items():
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert says in printed and len(printed.strip().splitlines()) == 1
