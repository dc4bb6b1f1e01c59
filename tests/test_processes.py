"""Many processes: caches that they fill together, two nodes, and a node that dies and comes back."""

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, environment, losses, train_here
from PIL import Image

import data
import files
import train
from data import Pairs, Preprocessing
from training import cache as caches
from training import inputs
from training.cache import Encoder, ImageRows, as_bytes, as_texts, cached_texts, image_caches, readers
from training.config import TrainConfig, resolve
from training.inputs import encoder_autocast
from training.loop import Process, process_group
from training.rows import BLOCK
from training.trainer import uses_bf16


@pytest.mark.parametrize("rank, world", [("0", ""), ("x", "2"), ("0", "x"), ("5", "2"), ("-1", "1")])
def test_a_place_among_processes_that_cannot_be_is_refused(rank: str, world: str, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(data.DataError, match="RANK, WORLD_SIZE.*unset RANK"), process_group("cpu"):
        pass


def test_an_unknown_first_machine_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=socket.gaierror("no such name")))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere", "MASTER_PORT": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(data.DataError, match="no such name.*unset RANK"), process_group("cpu"):
        pass


@pytest.mark.parametrize("text", ["x", "", "-1", "1.5"])
def test_numbers_of_torchrun_that_cannot_be_are_refused(text: str, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", text)
    with pytest.raises(data.DataError, match="TORCHELASTIC_RESTART_COUNT=.*: must be a whole number from 0"):
        Process().restarted()


# -- caches ------------------------------------------------------------------------------------------------

N = 5 * BLOCK + 7
TEXTS = [str(k) for k in range(N)]


def of_batch(texts: list[str]) -> torch.Tensor:
    """Rows that depend on all inputs of their batch, as an encoder's last bits may."""
    numbers = torch.tensor([float(text) for text in texts])
    return torch.stack([numbers, numbers.sum().expand(len(texts))], dim=1)


FILL = f"""
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from training import rows
from training.cache import Encoder, cached_texts
rows.COMMIT_SECONDS = 0.0
{inspect.getsource(of_batch)}
def encode(texts):
    time.sleep(0.01)
    print(*texts, flush=True)
    return of_batch(texts)
texts = [str(k) for k in range({N})]
cached_texts(sys.argv[2], texts, Encoder("targets", "k", (2,), "float32", 50, encode))
"""


def fill(cache: Path) -> subprocess.Popen:
    """A process that fills the cache and prints the texts that it encodes."""
    command = [sys.executable, "-c", FILL, ROOT, cache]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    )


def fill_here(cache: Path, encode=of_batch) -> np.ndarray:
    return cached_texts(cache, TEXTS, Encoder("targets", "k", (2,), "float32", 50, encode))[0]


def none_missing(texts: list[str]) -> torch.Tensor:
    pytest.fail(f"{texts} were encoded again")


def killed(process: subprocess.Popen, batches: int) -> list[str]:
    """The texts that a process had begun when it was killed in a batch."""
    lines = [process.stdout.readline() for _ in range(batches)]
    process.send_signal(signal.SIGKILL)
    return " ".join([*lines, process.communicate()[0]]).split()


def test_processes_share_a_cache_and_make_the_bits_of_one(tmp_path: Path):
    expected = np.array(fill_here(tmp_path / "one"))
    together = [fill(tmp_path / "three") for _ in range(3)]
    encoded = [process.communicate()[0].split() for process in together]
    assert sorted(map(int, sum(encoded, []))) == list(range(N))
    assert np.array_equal(fill_here(tmp_path / "three", none_missing), expected)


@pytest.mark.parametrize("first, then", [(1, 3), (3, 1)])
def test_processes_go_on_where_others_were_killed(tmp_path: Path, first: int, then: int):
    expected = np.array(fill_here(tmp_path / "one"))
    begun = [killed(process, 3) for process in [fill(tmp_path / "cache") for _ in range(first)]]
    rest = [process.communicate()[0].split() for process in [fill(tmp_path / "cache") for _ in range(then)]]
    times = Counter(sum(begun, []) + sum(rest, []))
    assert times.keys() == set(TEXTS)
    assert sum(count - 1 for count in times.values()) <= 50 * first  # the batch in which each was killed
    assert np.array_equal(fill_here(tmp_path / "cache", none_missing), expected)


def test_a_share_of_a_killed_process_is_taken_over_by_one_that_runs(tmp_path: Path):
    """This one, which begins with the next share."""
    victim, events = fill(tmp_path), []
    victim.stdout.readline()
    victim.send_signal(signal.SIGSTOP)  # within its first share

    def kill(event: str) -> None:
        events.append(event)
        victim.kill()

    late = threading.Timer(20, kill, ["only waited"])
    late.start()
    rows = fill_here(tmp_path, lambda texts: kill("encoded") or of_batch(texts))
    late.cancel()
    victim.communicate()
    assert events[0] == "encoded" and np.array_equal(rows, fill_here(tmp_path / "one"))


def test_without_locks_each_process_encodes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    for name in ("lockf", "flock"):
        monkeypatch.setattr(files.fcntl, name, no_locks)
    assert np.array_equal(fill_here(tmp_path)[:, 0], np.arange(N))
    with files.exclusive(tmp_path):
        assert f"{tmp_path}: cannot be locked" in caplog.text


def test_bytes_are_locked_for_one_process_alone_until_it_gives_them_up(tmp_path: Path, caplog):
    (tmp_path / "a").write_bytes(bytes(8))

    def free(start: int) -> int:
        """1 where another process can lock the byte, 0 where it can neither lock nor share it (5)."""
        if not (child := os.fork()):
            with open(tmp_path / "a", "rb+") as file, suppress(OSError):
                os._exit(1 if files.lock_bytes(file, start, 1) else files.fcntl.lockf(file, 5, 1, start) or 2)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with open(tmp_path / "a", "rb+") as file:
        for wait in (False, True):
            assert files.lock_bytes(file, 2, 4, wait) and [free(k) for k in (1, 2, 5, 6)] == [1, 0, 0, 1]
            files.unlock_bytes(file, 2, 4)
            assert free(2) == 1
    with files.exclusive(tmp_path):
        other = threading.Thread(target=files.exclusive(tmp_path, "it waits").__enter__)
        other.start()
        other.join(0.2)
        assert other.is_alive() and "it waits" in caplog.text


@pytest.fixture
def pictures(tmp_path: Path) -> Pairs:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(9):
        Image.new("RGB", (20, 20), (20 * k, 0, 0)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"picture {k}")
    (folder / "4.png").write_bytes(b"")
    return data.read_pairs(folder)


def test_an_image_is_decoded_once_for_latents_and_captions(
    pictures: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decoded, image = [], Pairs.image
    monkeypatch.setattr(Pairs, "image", lambda self, i: decoded.append(i) or image(self, i))
    latents = Encoder("latents", "vae", (3,), "float16", 4, lambda images: images.mean((2, 3)))
    captions = Encoder("captions", "blip", (), None, 2, lambda images: [f"{x.shape[-1]}" for x in images])
    encoders = [(Preprocessing.square(16), latents), (Preprocessing.square(8), as_bytes(captions))]
    (rows, ok), (written, same) = image_caches(tmp_path / "cache", pictures, encoders)
    assert sorted(decoded) == list(range(9)) and np.flatnonzero(~ok).tolist() == [4]
    assert np.array_equal(ok, same) and as_texts(written) == ["8"] * 4 + [""] + ["8"] * 4
    image_caches(tmp_path / "cache", pictures, encoders)
    alone = image_caches(tmp_path / "other", pictures, encoders[:1])
    both = image_caches(tmp_path / "other", pictures, encoders)
    assert np.array_equal(alone[0][0], rows) and np.array_equal(both[1][0], written) and len(decoded) == 27


def test_images_from_four_processes_with_few_open_files(pictures: Pairs, tmp_path: Path):
    """Tensors would each take one: torch waited for ever, or ended in a traceback."""
    script = """
import resource, sys
from pathlib import Path
from data import Preprocessing, read_pairs
from training.cache import Encoder, cached_images
mean = Encoder("mean", "mean", (3,), "float32", 4, lambda images: images.mean((2, 3)))
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
rows, ok = cached_images(Path(sys.argv[2]), read_pairs(sys.argv[1]), Preprocessing.square(8), mean, 4)
print(ok.sum(), len({*rows[:, 0].tolist()}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, pictures.archives[0], tmp_path / "rows"],
        capture_output=True, text=True, timeout=60, env=environment(),
    )
    assert done.stdout == "8 9\n", done.stderr


# -- choices -----------------------------------------------------------------------------------------------


def test_how_many_processes_read_images(pictures: Pairs, monkeypatch: pytest.MonkeyPatch):
    images = ImageRows(pictures, [Preprocessing.square(8)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    times = iter(range(10**6))
    expected = [(0.5, "cuda:1", 0), (2, "cuda:1", 3), (2, "cpu", 0), (30, "cpu", 3)]
    for milliseconds, device, count in expected:
        clock = lambda step=milliseconds / 1000: next(times) * step  # noqa: E731
        monkeypatch.setattr(caches.time, "perf_counter", clock)
        assert readers(None, images, device) == count
        assert readers(5, images, device) == 5
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert readers(None, images, "cpu") == 12 and TrainConfig().workers is None


def test_where_encoders_run_in_bf16():
    on = {
        (precision, device): encoder_autocast(TrainConfig(precision=precision), device)
        for precision in ("auto", "bf16", "float32")
        for device in ("cpu", "cuda:3")
    }
    assert {key for key, value in on.items() if value} == {("auto", "cuda:3"), ("bf16", "cuda:3")}
    assert set(on.values()) == {"", "cuda"}
    trained = {precision for precision in ("auto", "bf16", "float32")
               if uses_bf16(TrainConfig(precision=precision), "cuda:3")}  # fmt: skip
    assert trained == {"auto", "bf16"}
    assert encoder_autocast(TrainConfig(train_blocks=0), "cuda") == ""
    assert encoder_autocast(TrainConfig(backbone="vit", train_blocks=0), "cuda") == "cuda"


def test_what_is_encoded_in_bf16(pictures: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on CUDA, by the CPU's autocast."""
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inputs, "encoder_autocast", lambda config, device: "cpu")
    white = resolve(TrainConfig(captions="empty"))
    black = resolve(TrainConfig(backbone="vit", train_blocks=0))
    for config, read in ((white, inputs.unet_inputs), (black, inputs.image_inputs)):
        read(config, pictures, inputs.preprocessing_of(config), "cpu")
    keys = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*/key.json")]
    halves = {key["name"] for key in keys if key.get("precision") == "bf16"}
    assert halves == {"latents", "captions", "vit-features"}


def test_bf16_rows_have_a_cache_of_their_own_unless_float32_ones_were_begun(tmp_path: Path):
    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))

    def rows(folder: str, autocast: str) -> np.ndarray:
        encode = lambda texts: torch.tensor([[float(text), 1.0, 0.3] for text in texts]) @ weight  # noqa: E731
        encoder = Encoder("targets", {"model": "a"}, (2,), "float32", 4, encode, autocast)
        return cached_texts(tmp_path / folder, TEXTS[:20], encoder)[0]

    single, half = rows("single", ""), rows("half", "cpu")
    assert (single != half).any()
    np.testing.assert_allclose(half, single, rtol=0.02, atol=0.02)
    assert np.array_equal(rows("single", "cpu"), single) and len(list((tmp_path / "single").iterdir())) == 1
    assert np.array_equal(rows("half", "cpu"), half) and len(list((tmp_path / "half").iterdir())) == 1
    assert np.array_equal(rows("half", ""), single) and len(list((tmp_path / "half").iterdir())) == 2


# -- two nodes ---------------------------------------------------------------------------------------------


def node(port: int, number: int, cache: Path, *arguments: object) -> subprocess.Popen:
    """One of two nodes of one process each; number 0 holds the rendezvous."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    command += ["--rdzv-conf", f"is_host={int(not number)}", *map(str, arguments)]
    return subprocess.Popen(
        command,
        # else a node that comes back waits in vain for the address of the first process (torch 2.14)
        env=environment(REVERSE_SD_CACHE=str(cache), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def finished(*nodes: subprocess.Popen) -> None:
    for process in nodes:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors[-3000:]


def cold(folder: Path, cache: Path) -> Path:
    """An empty cache but for MiniLM."""
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "minilm").symlink_to(cache / "weights" / "minilm")
    return folder


def predictions(run: Path) -> dict[str, np.ndarray]:
    return {split: np.load(run / "predictions" / f"{split}.npy") for split in ("train", "val", "test")}


@pytest.mark.slow
def test_two_nodes_have_the_losses_caches_and_predictions_of_one_process(
    few_scenes: Path, cache: Path, tmp_path: Path
):
    """The second node evaluates the run again, from its files."""
    one, two, shared = tmp_path / "one", tmp_path / "two", cold(tmp_path / "cache", cache)
    train_here(few_scenes, one)
    port = free_port()
    command = [ROOT / "train.py", "--data", few_scenes, "--out", two, *SMALL]
    finished(*(node(port, number, shared, *command) for number in (0, 1)))
    np.testing.assert_allclose(losses(two)[:2], losses(one)[:2], atol=1e-6)
    np.testing.assert_allclose(losses(two), losses(one), atol=2e-4)
    for split, rows in predictions(one).items():
        np.testing.assert_allclose(predictions(two)[split], rows, atol=5e-3)
    for folder in cache.glob("*-*/"):
        for file in ("rows.npy", "done.npy", "sums.npy", "key.json"):
            assert (shared / folder.name / file).read_bytes() == (folder / file).read_bytes()
    before = predictions(two)
    port = free_port()
    finished(*(node(port, number, shared, ROOT / "eval.py", two) for number in (0, 1)))
    assert all(np.array_equal(rows, before[split]) for split, rows in predictions(two).items())


@pytest.mark.slow
def test_a_node_that_dies_and_comes_back_resumes_from_the_last_checkpoint(
    few_scenes: Path, cache: Path, tmp_path: Path
):
    one, two, port = tmp_path / "one", tmp_path / "two", free_port()
    flags = ["--epochs", "4"]
    train_here(few_scenes, one, *flags)
    command = [ROOT / "train.py", "--data", few_scenes, "--out", two, *SMALL, *flags]
    nodes = [node(port, number, cache, *command) for number in (0, 1)]
    while not (two / "last" / "state.json").exists():
        assert all(process.poll() is None for process in nodes)
        time.sleep(0.01)
    agent = nodes[1].pid  # its trainer has a session of its own
    trainers = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    for pid in (agent, *map(int, trainers)):
        os.kill(pid, signal.SIGKILL)
    nodes[1].communicate()
    step = json.loads((two / "last" / "state.json").read_text())["step"]
    assert step < 20
    finished(nodes[0], node(port, 1, cache, *command))
    steps = [json.loads(line)["step"] for line in (two / "log.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 21))
    np.testing.assert_allclose(losses(two)[:4], losses(one)[:4], atol=2e-4)
    assert len(losses(two)) == 20 and (two / "result.json").exists()


def test_a_restart_needs_the_runs_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Process().restarted()
    with pytest.raises(data.DataError, match="--out: is needed"):
        train.own_folder(TrainConfig(), None, None, Process(), None)
