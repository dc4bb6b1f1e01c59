"""The dry run of benchmarks/gpu.py: every section with miniatures, on the CPU."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sections that were measured, without a process for each."""
    names = []

    def measured(name: str, bench: gpu.Bench, scratch: Path, limit: float) -> dict:
        names.append(name)
        return gpu.SECTIONS[name][0](bench)

    monkeypatch.setattr(gpu, "measured", measured)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    return names


def test_a_dry_run_and_its_resuming(tmp_path: Path, in_this_process: list[str]):
    wanted = [name for name in gpu.SECTIONS if not name.startswith("compile")]  # compiling takes minutes
    argv = ["--mini", "--results", str(tmp_path)]
    assert gpu.main([*argv, "--only", *wanted]) == 0
    assert in_this_process == wanted
    path = tmp_path / "gpu-cpu-mini.json"
    result = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == gpu.text_of(result)
    for distances in result["sections"]["parity"].values():
        assert distances["float32"] == 0 and 1e-4 < distances["bf16"] < 0.5
    for name in ("clip", "unet", "swin", "vit"):
        step = result["sections"][f"step-{name}"]
        assert step["accumulate"] == 1 and step["images_per_second"] > 0 and step["flops"] > 0
    assert len(result["sections"]["caches"]) == 5

    result["sections"]["peak"] = {"error": "the card fell off"}
    path.write_text(json.dumps(result))
    assert "* peak: failed: the card fell off" in gpu.text_of(result)
    in_this_process.clear()
    assert gpu.main([*argv, "--only", *wanted, "--again", "dakl-linear"]) == 0
    assert in_this_process == ["peak", "dakl-linear"]


def test_a_section_that_fails_or_takes_too_long_is_an_entry(tmp_path: Path):
    bench = gpu.Bench("cpu", mini=True)
    assert gpu.measured("no such section", bench, tmp_path, 500) == {"error": "KeyError: 'no such section'"}
    assert gpu.measured("peak", bench, tmp_path, 0.01) == {"error": "took more than 0 s"}
