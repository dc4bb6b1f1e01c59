"""Golden files, their comparison, and the port in examples/ that they prove."""

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, train_here
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import weights
from models import clip, layers, unet
from tests.test_train import tiny_blip
from weights.__main__ import main, parser
from weights.compare import compare
from weights.golden import NORMS, Nudge, Recording, Subject, golden, load_or_draw, precision_of, record, write
from weights.kinds import KINDS as ENTRIES

KINDS = [("vit", "vit-mini"), ("swin", "swin-mini"), ("swin", "swinv2-mini"), ("clip-vision", "clip-mini"),
         ("clip-text", "sd-mini"), ("clip-text", "clip-mini"), ("vae", "sd-mini"), ("unet", "sd-mini"),
         ("unet-encoder", "sd-mini"),
         ("clip-text", "sd-2-tiny"), ("unet", "sd-2-tiny"), ("unet-encoder", "sd-2-tiny"),
         ("blip2", "blip2-mini")]
CONSTANTS = {"unet": {"sinusoids"}, "unet-encoder": {"sinusoids"},
             "clip-text": {"position_ids", "causal_mask"}, "blip2": {"position_ids", "causal_mask"},
             "swin": {"layers.0.index", "layers.0.mask", "layers.1.index", "layers.1.mask", "layers.2.index"}}
FILES = ("inputs", "constants", "activations", "outputs", "weights")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, torch.dtype], Path]:
    """Golden files of a kind in a source, written once."""
    root, written = tmp_path_factory.mktemp("golden"), set()

    def written_once(kind: str, source: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = root / f"{kind}-{source}-{str(dtype)[-2:]}"
        if folder not in written:
            golden(kind, folder, source, dtype=dtype)
            written.add(folder)
        return folder

    return written_once


@pytest.fixture
def vit(folders) -> Path:
    return folders("vit", "vit-mini", torch.float64)


def port_of(kind: str, source: str, golden_files: Path, change: Callable[[nn.Module], object] = id,
            dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every activation and output of the model after `change`, as a port computes them."""
    model = load_or_draw(kind, source)
    change(model)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value
              for name, value in load_file(golden_files / "inputs.safetensors").items()}
    return record(Subject(model, inputs, ENTRIES[kind].outputs, {}, {}), dtype).tensors()


def compared(golden_files: Path, port: dict[str, Tensor], folder: Path, **options) -> tuple[int, list[str]]:
    """The status and the lines of the report on a port's tensors."""
    save_file({name: value.contiguous().clone() for name, value in port.items()}, folder / "port.safetensors")
    report = compare(golden_files, folder / "port.safetensors", **options)
    return report.status, report.lines()


@pytest.mark.parametrize("kind, source", KINDS)
def test_golden_files_are_what_the_model_makes(kind: str, source: str, folders):
    folder = folders(kind, source)
    index = json.loads((folder / "index.json").read_text())
    files = {part: load_file(folder / f"{part}.safetensors") for part in FILES}
    for part in FILES[:-1]:
        assert {entry["name"]: entry["shape"] for entry in index[part]} == {
            name: list(value.shape) for name, value in files[part].items()}
    assert len(files["activations"]) > 20
    assert {value.dtype for value in files["activations"].values()} == {torch.float64}
    assert CONSTANTS.get(kind, set()) <= set(files["constants"])
    if kind in ("unet", "unet-encoder"):
        assert files["inputs"]["context"].shape[1] == 77  # as many tokens as CLIP's text tower reads
    if kind == "vae":
        assert [x.item() for x in files["inputs"]["images"].aminmax()] == [-1, 1]  # as in pictures
    model = weights.build(kind, index["config"])
    weights.load_strict(model, files["weights"])
    if kind == "vae":
        again = model.eval().encode(files["inputs"]["images"])
        assert torch.allclose(again, files["outputs"]["latents"].float(), atol=1e-5)
    elif source == "clip-mini" and kind == "clip-text":
        again = model.eval().pooled(files["inputs"]["ids"])
        assert torch.allclose(again, files["outputs"]["pooled"].float(), atol=1e-4)
    elif kind != "unet-encoder":
        again = model.eval()(**files["inputs"])
        assert torch.allclose(again, files["outputs"]["output"].float(), atol=1e-4)
    report = compare(folder, folder)
    assert (report.status, report.lacking, report.precision) == (0, [], "float64")


def test_the_command_writes_what_the_function_does(vit: Path, tmp_path: Path, capsys):
    usual, seeded = tmp_path / "usual", tmp_path / "new" / "seeded"
    usual.mkdir()
    assert main(["golden", "vit", str(usual), "--source", "vit-mini", "--float64"]) == 0
    assert main(["golden", "vit", str(seeded), "--source", "vit-mini", "--batch", "1", "--seed", "3"]) == 0
    images = [load_file(path / "inputs.safetensors")["images"] for path in (vit, usual, seeded)]
    assert torch.equal(images[0], images[1]) and images[1].dtype == torch.float64
    assert images[2].shape == (1, 3, 64, 64) and images[2].dtype == torch.float32
    index = json.loads((seeded / "index.json").read_text())
    assert (index["seed"], index["version"]) == (3, 2)
    printed = f"{usual}: inputs, 44 activations from patch_embed.proj to norm, outputs, weights"
    assert capsys.readouterr().out.splitlines()[0] == printed
    for flag, value in (("--seed", 0), ("--seed", 2**63 - 1), ("--batch", 1)):
        assert vars(parser().parse_args(["golden", "vit", "g", flag, str(value)]))[flag[2:]] == value
    assert parser().parse_args(["compare", "g", "p", "--tolerance", "1"]).tolerance == 1


def test_random_models_and_inputs_are_drawn_with_seed_0(folders):
    ids = load_file(folders("clip-text", "sd-2-tiny") / "inputs.safetensors")["ids"]
    assert torch.equal(ids, torch.randint(1024, (2, 77), generator=torch.Generator().manual_seed(0)))
    for kind in ("clip-text", "unet"):
        draw, model = torch.Generator().manual_seed(0), load_or_draw(kind, "sd-2-tiny")
        for name, parameter in model.named_parameters():
            noise, (module, _, which) = torch.randn(parameter.shape, generator=draw), name.rpartition(".")
            expected = noise * (0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
            if which == "weight" and isinstance(model.get_submodule(module), NORMS):
                expected = 1 + 0.1 * noise
            assert torch.allclose(parameter, expected), name


def test_blip_and_minilm(tmp_path: Path, minilm_folder: Path):
    (tmp_path / "blip").mkdir()
    for kind, source in {"blip": tiny_blip(tmp_path / "blip"), "minilm": minilm_folder}.items():
        names = golden(kind, tmp_path / f"golden-{kind}", source)
        assert len(names) > 20
        inputs = load_file(tmp_path / f"golden-{kind}" / "inputs.safetensors")
        model = weights.load(kind, source)
        with torch.no_grad():
            again = model(**inputs)
        outputs = load_file(tmp_path / f"golden-{kind}" / "outputs.safetensors")
        assert torch.allclose(again, outputs["output"].float(), atol=1e-5)
        if kind == "blip":  # its text layers give their cache too
            seen = load_file(tmp_path / "golden-blip" / "activations.safetensors")
            layer = "text_decoder.bert.encoder.layer.0"
            assert torch.equal(seen[layer], seen[f"{layer}.output.LayerNorm"])
    sentences = ["a cat", "a red house in the snow"]  # the regression targets are `embedding`
    ids, counts = model._tokenise(sentences)
    rows = torch.nn.utils.rnn.pad_sequence(ids.long().split(counts.tolist()), batch_first=True)
    with torch.no_grad():
        output = ENTRIES["minilm"].outputs(model, {"input_ids": rows, "attention_mask": (rows > 0).long()})
    assert torch.allclose(output["embedding"], model.encode(sentences), atol=1e-6)
    assert torch.allclose(outputs["embedding"].norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_the_numpy_port_passes(vit: Path, tmp_path: Path, capsys):
    script = [sys.executable, str(ROOT / "examples" / "vit_numpy.py"), str(vit), str(tmp_path / "port")]
    subprocess.run(script, check=True, env=environment(), capture_output=True)
    assert main(["compare", str(vit), str(tmp_path / "port"), "--tolerance", "1e-10"]) == 0
    assert "all 45 tensors agree" in capsys.readouterr().out


def test_the_numpy_port_passes_in_float32(folders, tmp_path: Path, capsys):
    folder = folders("vit", "vit-mini")
    script = [sys.executable, str(ROOT / "examples" / "vit_numpy.py"), str(folder), str(tmp_path / "port")]
    subprocess.run(script, check=True, env=environment(), capture_output=True)
    assert main(["compare", str(folder), str(tmp_path / "port")]) == 0
    assert "all 45 tensors agree in float32" in capsys.readouterr().out


def test_the_first_difference_is_named(vit: Path, tmp_path: Path, capsys):
    port = load_file(vit / "activations.safetensors")
    for name in ("blocks.3.norm2", "blocks.3.mlp.fc1", "norm"):
        port[name] = port[name] * 1.01
    save_file(port, tmp_path / "port.safetensors")
    assert main(["compare", str(vit), str(tmp_path / "port.safetensors")]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("blocks.3.norm2 is the first that differs: off by")
    assert printed[1].endswith("the last of them blocks.3.attn.proj")
    assert printed[2] == "3 of 44 tensors differ"
    assert "no success: 1 outputs are not in OTHER: output" in printed
    port["blocks.0.norm1"] = port["blocks.0.norm1"].flatten()
    port["blocks.1.norm1"][0, 0, 0] = torch.nan
    np.savez(tmp_path / "port.npz", **{name: value.numpy() for name, value in port.items()})
    problems = [difference.problem for difference in compare(vit, tmp_path / "port.npz").wrong]
    assert problems[0].startswith("shape") and "nan" in problems[1]


# ------------------------------------------------------------------------------------------------------------
# Faults of a port
# ------------------------------------------------------------------------------------------------------------


def tanh_gelu(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    exact = F.gelu
    patch.setattr(unet.F, "gelu", lambda x, approximate: exact(x, approximate="tanh"))


def other_gelu(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    now = model.config.hidden_act
    for layer in model.text_model.encoder.layers:
        layer.hidden_act = "gelu" if now == "quick_gelu" else "quick_gelu"


def epsilon(name: str) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    def smaller(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        model.get_submodule(name).eps *= 0.9
    return smaller


def padding_elsewhere(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(unet.Downsample, "forward", lambda self, x: self.op(F.pad(x, (0, 1, 0, 1))))
    for module in model.modules():
        if isinstance(module, unet.Downsample):
            module.op.padding = (0, 0)


def no_mask(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clip, "attention", lambda *args, causal=False: layers.attention(*args))


def heads_last(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **masks: bool) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, heads)).transpose(-1, -2).flatten(2) for x in (q, k, v))
        return layers.attention(q, k, v, heads, **masks)

    for module in (unet, clip):
        patch.setattr(module, "attention", attention)


FIRST_BLOCK = "input_blocks.1.1.transformer_blocks.0"
LAYER = "text_model.encoder.layers"
FAULTS = [
    ("unet-encoder", "sd-mini", epsilon("input_blocks.1.0.in_layers.0"), "input_blocks.1.0.in_layers.0"),
    ("unet-encoder", "sd-mini", epsilon("input_blocks.5.0.in_layers.0"), "input_blocks.5.0.in_layers.0"),
    ("unet-encoder", "sd-mini", epsilon("middle_block.2.in_layers.0"), "middle_block.2.in_layers.0"),
    ("unet-encoder", "sd-mini", tanh_gelu, f"{FIRST_BLOCK}.ff.net.0"),
    ("unet-encoder", "sd-mini", padding_elsewhere, "input_blocks.2.0.op"),
    ("unet-encoder", "sd-mini", heads_last, f"{FIRST_BLOCK}.attn1.to_out.0"),
    ("unet-encoder", "sd-2-tiny", heads_last, f"{FIRST_BLOCK}.attn1.to_out.0"),
    ("clip-text", "sd-mini", epsilon(f"{LAYER}.2.layer_norm1"), f"{LAYER}.2.layer_norm1"),
    ("clip-text", "sd-mini", other_gelu, f"{LAYER}.0.mlp.fc2"),
    ("clip-text", "sd-2-tiny", other_gelu, f"{LAYER}.0.mlp.fc2"),
    ("clip-text", "sd-mini", no_mask, f"{LAYER}.0.self_attn.out_proj"),
    ("clip-text", "sd-mini", heads_last, f"{LAYER}.0.self_attn.out_proj"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])
@pytest.mark.parametrize("kind, source, fault, first", FAULTS)
def test_faults_are_seen_and_the_first_layer_is_named(
    kind: str, source: str, fault: Callable, first: str, dtype: torch.dtype, folders, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    folder = folders(kind, source, dtype)
    port = port_of(kind, source, folder, lambda model: fault(model, monkeypatch), dtype)
    status, lines = compared(folder, port, tmp_path)
    assert status == 1 and lines[0].startswith(f"{first} is the first that differs")
    if fault.__name__ == "smaller":
        assert re.search(r"as with an epsilon of (8\.9|9\.[01])e-06 instead of 1\.0e-05", lines[0])


def test_an_epsilon_that_float32_cannot_show_is_named(folders, tmp_path: Path):
    folder = folders("unet-encoder", "sd-mini")
    change = lambda model: epsilon("middle_block.1.norm")(model, None)  # noqa: E731
    port = port_of("unet-encoder", "sd-mini", folder, change)
    status, lines = compared(folder, port, tmp_path)
    assert status == 0 and "10% wrong cannot be seen at" in lines[-1] and "middle_block.1.norm" in lines[-1]
    folder = folders("unet-encoder", "sd-mini", torch.float64)
    port = port_of("unet-encoder", "sd-mini", folder, change, torch.float64)
    status, lines = compared(folder, port, tmp_path)
    assert status == 1 and lines[0].startswith("middle_block.1.norm is the first that differs")


@pytest.mark.parametrize("off, of_deviation, blur", [
    ((1.0, -1.0, 1.0, -1.0), 0.0, 0.5 / 4**0.5),  # independent of the change: rms 1 over rms 2 and sqrt(n)
    ((0.5, 0.5, 0.5, 0.5), 0.0, 0.25),  # like the change
    ((0.0, 0.0, 0.0, 0.0), 0.125, 0.125),
])  # fmt: skip
def test_blur_is_the_largest_of_three(off: tuple, of_deviation: float, blur: float):
    exact, change = torch.arange(4.0).double(), torch.full((4,), 2.0).double()
    fine = Recording({"norm": exact}, {}, {"norm": Nudge(1e-5, change, of_deviation)})
    entry = precision_of("norm", fine, (exact + torch.tensor(off)).float())
    assert entry == {"rounding": [abs(off[0])] * 2, "epsilon": 1e-5, "blur": blur}


@pytest.mark.parametrize("norm, rows", [(nn.LayerNorm(2, eps=1.0), 24), (nn.GroupNorm(2, 4, eps=1.0), 4)])
def test_the_blur_of_a_norm_by_hand(norm: nn.Module, rows: int):
    """In each row half of the numbers are 1 and half -1, so the variance is the epsilon."""
    x = torch.tensor([1.0, -1]).expand(2, 4, 3, 2)
    subject = Subject(nn.Sequential(norm), {"x": x}, lambda model, of: {"y": model(of["x"])}, {}, {})
    nudge, more = record(subject, torch.float64).nudges["0"], (2 / 1.9) ** 0.5 - 1
    assert nudge.epsilon == 1 and torch.allclose(nudge.change, more * x.double() / 2**0.5)
    assert nudge.blur == pytest.approx(2**-24 / (more * rows**0.5))


@pytest.mark.parametrize("dtype, share, rest, blur, tolerance, found", [
    (torch.float64, 0, 0, 0, 0, ""),
    (torch.float64, 0, 0.9, 0, 1, ""), (torch.float64, 0, 1, 0, 1, "unseen"),  # 1 / 8 is more than 0.12
    (torch.float64, 0, 0, 0.11 * 2**22, 1, ""), (torch.float64, 0, 0, 0.13 * 2**22, 1, "unseen"),
    (torch.float32, 0, 0, 0.11, 1, ""), (torch.float32, 0, 0, 0.13, 1, "unseen"),
    (torch.float64, 0.4, 0, 0, 1, ""), (torch.float64, 0.6, 0, 0, 1, "9.4e-06"),
    (torch.float64, 2, 0, 0, 1, "8.0e-06"), (torch.float64, -2, 0, 0, 1, "1.2e-05"),
    (torch.float64, 1, 0.43, 0, 0, "9.0e-06"), (torch.float64, 1, 0.75, 0, 0, "off by"),  # of all: 0.39, 0.6
])  # fmt: skip
def test_an_epsilon_is_named_where_it_can_be_seen(
    dtype: torch.dtype, share: float, rest: float, blur: float, tolerance: float, found: str, tmp_path: Path
):
    """A port's norm of 64 numbers is off by `share` of a smaller epsilon's change and by as much noise."""
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 2, 4, 8, generator=draw)
    model = nn.Sequential(nn.LayerNorm(8))
    subject = Subject(model, {"x": x}, lambda model, of: {"y": model(of["x"])}, {}, {})
    write(tmp_path, "vit", subject, dtype)
    index = json.loads((tmp_path / "index.json").read_text())
    index["activations"][0]["blur"] = blur
    (tmp_path / "index.json").write_text(json.dumps(index))
    change = load_file(tmp_path / "epsilons.safetensors")["0"].double()
    noise = noise - (noise * change).sum() / change.square().sum() * change
    off = share * change + rest * noise * change.norm() / noise.norm()
    port = load_file(tmp_path / "activations.safetensors")["0"] + off
    save_file({"0": port.to(dtype)}, tmp_path / "port.safetensors")
    report = compare(tmp_path, tmp_path / "port.safetensors", tolerance)
    problem = report.differences[0].problem
    assert report.unseen == (["0"] if found == "unseen" else [])
    named = re.findall(r"as with an epsilon of (\S+) instead of 1.0e-05", problem)
    assert named == ([found] if "e-" in found else []) and bool(problem) == (found not in ("", "unseen"))


def test_float32_may_be_eight_times_its_rounding_away_and_four_times_in_the_mean(folders, tmp_path: Path):
    folder, name = folders("clip-text", "sd-mini"), "text_model.embeddings.token_embedding"
    exact = load_file(folder / "activations.safetensors")[name]  # of a table: its rounding counts as 2^-23
    one = torch.zeros_like(exact)
    one.view(-1)[exact.abs().argmin()] = exact.abs().max()
    for off, wrong in ((7.5 * one, False), (8.5 * one, True), (3.5 * exact, False), (4.5 * exact, True)):
        status, _ = compared(folder, {name: (exact + off * 2.0**-23).float()}, tmp_path)
        assert status == (1 if wrong else 3)  # 3: there are no outputs


def test_noise_within_the_tolerance_is_not_taken_for_an_epsilon(vit: Path, tmp_path: Path):
    port = load_file(vit / "activations.safetensors") | load_file(vit / "outputs.safetensors")
    draw = torch.Generator().manual_seed(0)
    for value in port.values():
        value += 1e-4 * value.abs().max() * torch.randn(value.shape, generator=draw, dtype=value.dtype)
    status, lines = compared(vit, port, tmp_path, tolerance=1e-3)
    assert status == 0 and "in float64 an epsilon that is 10% wrong cannot be seen at" in lines[-1]


def test_lacking_and_unknown_tensors(folders, tmp_path: Path):
    folder = folders("unet-encoder", "sd-mini")
    right = port_of("unet-encoder", "sd-mini", folder)
    model = load_or_draw("unet-encoder", "sd-mini")
    own = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    port = {name: value for name, value in right.items() if name in own | {"middle"}}
    status, lines = compared(folder, port, tmp_path)
    assert status == 0 and lines[0].startswith(f"{len(port)} compared tensors agree")
    lacking = f"{len(right) - len(port)} of {len(right)} golden tensors are not in OTHER: time_embed.1, "
    assert lines[1].startswith(lacking)
    renamed = {f"x.{name}" if name in list(port)[:13] else name: value for name, value in port.items()}
    status, lines = compared(folder, renamed, tmp_path)
    assert status == 3 and "no success: 13 names are not in the golden files: x." in lines[1]
    del port["middle"]
    status, lines = compared(folder, port, tmp_path)
    assert status == 3 and lines[1] == "no success: 1 outputs are not in OTHER: middle"
    assert compared(folder, port | {"middle_block": right["middle_block"]}, tmp_path)[0] == 0  # equal to it


def test_a_port_may_leave_out_whole_files(vit: Path, tmp_path: Path):
    for part, status in (("activations", 3), ("outputs", 0)):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{part}.safetensors").symlink_to(vit / f"{part}.safetensors")
        assert compare(vit, tmp_path / part).status == status


def test_precisions_are_compared(vit: Path, folders, tmp_path: Path):
    port = load_file(vit / "activations.safetensors") | load_file(vit / "outputs.safetensors")
    assert compared(vit, port, tmp_path)[0] == 0
    floats = {name: value.float() for name, value in port.items()}
    status, lines = compared(vit, floats, tmp_path)
    assert status == 1 and "float32 instead of float64" in lines[0]
    assert compared(folders("vit", "vit-mini"), floats, tmp_path)[0] == 0
    rounded = {name: value.double() for name, value in floats.items()}  # float64 with the digits of float32
    assert compared(folders("vit", "vit-mini"), rounded, tmp_path)[0] == 1
    for off, status in ((0.9e-10, 3), (1.1e-10, 1)):  # 3: there are no outputs
        one = {"blocks.0.attn.proj": port["blocks.0.attn.proj"] * (1 + off)}
        assert compared(vit, one, tmp_path)[0] == status
    for dtype in (torch.float16, torch.bfloat16, torch.int32):
        with pytest.raises(weights.WeightsError, match="in float32 or float64 only"):
            compared(vit, port | {"norm": port["norm"].to(dtype)}, tmp_path)


def test_constants_of_a_port_are_compared(folders, tmp_path: Path):
    folder = folders("clip-text", "sd-mini")
    port, mask = port_of("clip-text", "sd-mini", folder), torch.ones(77, 77).tril().bool()
    assert compared(folder, port | {"causal_mask": mask}, tmp_path)[0] == 0
    status, lines = compared(folder, port | {"causal_mask": mask.T}, tmp_path)
    assert status == 1 and lines[0].startswith("causal_mask is the first that differs")
    arrays = {name: value.numpy() for name, value in port.items()}
    np.savez(tmp_path / "port.npz", **arrays, position_ids=np.full(77, None))  # objects could run a program
    with pytest.raises(weights.WeightsError, match="port.npz: position_ids.npy is damaged"):
        compare(folder, tmp_path / "port.npz")
    folder = folders("unet-encoder", "sd-mini")
    layer = {"input_blocks.0.0": load_file(folder / "activations.safetensors")["input_blocks.0.0"].float()}
    sinusoids = load_file(folder / "constants.safetensors")["sinusoids"]
    for off, status in ((0.9e-5, 3), (1.1e-5, 1)):  # 3: there are no outputs
        assert compared(folder, layer | {"sinusoids": sinusoids * (1 + off)}, tmp_path)[0] == status


# ------------------------------------------------------------------------------------------------------------
# The regressor and the sampler
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["sd-mini", "sd-2-tiny", "vit-mini", "run"])
def test_the_regressor_is_features_and_heads(source: str, few_scenes: Path, cache: Path, tmp_path: Path):
    path = source
    if source == "run":
        flags = ("--train-blocks", "0", "--captions", "empty", "--unet-features", "middle")
        path = str(train_here(few_scenes, tmp_path / "run", *flags, "--head-start", "random"))
    folder = tmp_path / "golden"
    assert main(["golden", "regressor", str(folder), "--source", path, "--seed", "5"]) == 0
    files = {part: load_file(folder / f"{part}.safetensors") for part in FILES}
    index = json.loads((folder / "index.json").read_text())
    assert index["seed"] == 5 and index["config"]["heads"] == 3
    seen, held = files["activations"], {name: value.double() for name, value in files["weights"].items()}
    features = seen["backbone"]
    if source != "vit-mini":
        assert torch.equal(features, seen["backbone.unet.middle_block.2"].amax(dim=(2, 3)))
        assert not files["constants"]["timesteps"].any() and "timesteps" not in files["inputs"]
        cosines, sines = files["constants"]["sinusoids"].chunk(2, dim=1)
        assert cosines.eq(1).all() and sines.eq(0).all()
    embedding = features @ held["heads.embedding.weight"].T + held["heads.embedding.bias"]
    assert torch.allclose(embedding, files["outputs"]["embedding"], rtol=0, atol=1e-10)
    logits = embedding @ held["heads.vocabulary.weight"].T + held["heads.vocabulary.bias"]
    assert torch.allclose(logits, files["outputs"]["logits"], rtol=0, atol=1e-10)
    if source == "run":
        assert index["config"]["unet_features"] == "middle"
    else:
        matrix = held["heads.embedding.weight"].float() * features.shape[1] ** 0.5
        draw = torch.Generator().manual_seed(0)
        assert torch.allclose(matrix, torch.randn(matrix.shape, generator=draw))
        assert logits.shape == (2, 100)
    assert compare(folder, folder).status == 0


@pytest.mark.parametrize("source", ["sd-mini", "sd-2-tiny"])
def test_the_sampler_predicts_noise_or_v(source: str, tmp_path: Path):
    assert main(["golden", "sampler", str(tmp_path / "golden"), "--source", source]) == 0
    files = {part: load_file(tmp_path / "golden" / f"{part}.safetensors") for part in FILES}
    timesteps, alphas = files["constants"]["timesteps"].tolist(), files["constants"]["alphas_bar"].double()
    assert timesteps == [751, 501, 251, 1]
    assert list(files["activations"]) == ["unet", "unet#1", "unet#2", "unet#3"]
    shapes = {name: value.shape[:2] for name, value in files["inputs"].items()}
    assert shapes == {"noise": (2, 4), "context": (2, 77), "negative": (1, 77)}
    x = files["inputs"]["noise"].double()
    for i, t in enumerate(timesteps):
        without, with_context = files["activations"][f"unet#{i}" if i else "unet"].chunk(2)
        predicted, alpha = without + 7.5 * (with_context - without), alphas[t]
        if source == "sd-2-tiny":  # v
            predicted = alpha.sqrt() * predicted + (1 - alpha).sqrt() * x
        after = alphas[timesteps[i + 1] if i < 3 else 0]
        clean = (x - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
        x = after.sqrt() * clean + (1 - after).sqrt() * predicted
        assert torch.allclose(x, files["outputs"][f"latents.{i}"], rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def test_faults_in_one_line(vit: Path, tmp_path: Path, capsys):
    np.savez(tmp_path / "cut.npz", norm=np.zeros((2, 65, 8)))
    whole = (tmp_path / "cut.npz").read_bytes()
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "cut.npz").write_bytes(whole[:-40])
    (tmp_path / "crc.npz").write_bytes(whole.replace(b"\0" * 64, b"\1" * 64, 1))
    for arguments, says in {
        ("golden", "vit", str(vit), "--source", "vit-mini"): "not an empty folder",
        ("golden", "vit", "/dev/null/x", "--source", "vit-mini"): "Not a directory",
        ("golden", "vae", str(tmp_path / "new"), "--source", "sd-2-tiny"): "sd-2-tiny has no vae",
        ("compare", str(tmp_path), str(vit)): "holds no index.json",
        ("compare", str(vit), str(tmp_path)): "holds neither",
        ("compare", str(vit), str(vit / "weights.safetensors")): "is an activation or output",
        ("compare", str(vit), str(tmp_path / "cut.npz")): "no arrays can be read",
        ("compare", str(vit), str(tmp_path / "pipe.npz")): "no regular file",
    }.items():
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert says in printed and len(printed.strip().splitlines()) == 1
    for arguments in (("compare", str(vit), str(vit), "--tolerance", "inf"),
                      ("compare", str(vit), str(vit), "--tolerance", "-1"),
                      ("compare", str(vit), str(vit), "--tolerance", "1.1"),
                      ("golden", "vit", str(tmp_path / "g"), "--seed", str(2**63)),
                      ("golden", "vit", str(tmp_path / "g"), "--batch", "0"),
                      ("golden", "vit", str(tmp_path / "g"), "--seed", "9" * 30)):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2


@pytest.mark.parametrize("version", ["1_0", "2_0"])
def test_an_array_that_claims_to_be_huge_is_not_read(version: str, vit: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "port.npz", "w") as archive, archive.open("norm.npy", "w") as file:
        claim = {"descr": "<f8", "fortran_order": False, "shape": (10**13,)}
        getattr(np.lib.format, f"write_array_header_{version}")(file, claim)
    problem = compare(vit, tmp_path / "port.npz").wrong[0].problem
    assert problem.startswith("shape (10000000000000,) instead of")


def test_damaged_golden_files_are_refused(folders, tmp_path: Path):
    whole = folders("vit", "vit-mini")
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = json.loads((whole / "index.json").read_text())

    def entry(part: str, k: int, **fields) -> dict:
        return {part: [*index[part][:k], index[part][k] | fields, *index[part][k + 1 :]]}

    norm = next(k for k, entry in enumerate(index["activations"]) if "epsilon" in entry)
    for change in ({"version": 1}, {"activations": None}, {"inputs": None}, {"dtype": "int8"},
                   {"activations": index["activations"][:-1]}, {"outputs": [{"name": "output"}]},
                   entry("activations", 0, rounding=[-1, 0]), entry("activations", 0, rounding=[0, -1]),
                   entry("activations", 0, epsilon=1, blur=0), entry("activations", norm, blur=-1),
                   entry("outputs", 0, equal=None)):
        (tmp_path / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(weights.WeightsError, match="write the golden files again"):
            compare(tmp_path, whole)
