"""The training loop and its checkpoint format.

`Trainer.fit` trains train.py's regressor, the captioner and the miniatures; a subclass provides batches, loss
and learning rate.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from data import DataError
from files import atomic_write, json_object, number_in_environment, read_text, require_file, write_json
from schema import TEXT, Rule, check, number, one_of, read_json

log = logging.getLogger("train")

# ============================================================================================================
# Processes
# ============================================================================================================


@dataclass(frozen=True)
class Process:
    """Rank and number of torchrun's processes; 0 of 1 without torchrun."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return once all processes have called this."""
        if self.world > 1:
            dist.barrier()

    def summed(self, values: Tensor) -> Tensor:
        """`values`, changed to their sum over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, part: Tensor, places: np.ndarray, n: int) -> Tensor:
        """Rows (n, ...) in every process, of which each has computed a part, at its places."""
        rows = part.new_zeros(n, *part.shape[1:])
        rows[places] = part
        return self.summed(rows)

    def restarted(self) -> bool:
        """Whether torchrun has started one of the processes again, after a failure."""
        count = torch.tensor([number_in_environment("TORCHELASTIC_RESTART_COUNT", 0)], device=self.device)
        return bool(self.gathered(count, np.zeros(1, int), 1))


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Process]:
    """Context manager: torchrun's process group (gloo on CPUs, nccl on GPUs). Only the first process logs
    more than errors."""
    if "RANK" not in os.environ:
        yield Process(0, 1, device)
        return
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)  # an unknown name would be tried for two days
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        # One process may write the results, or draw the data, for long while the others wait.
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(days=2))
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise DataError(
            f"RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: not as torchrun sets them ({error}); start the "
            "command by torchrun, or unset RANK"
        ) from error
    try:
        process = Process(dist.get_rank(), dist.get_world_size(), device)
        logging.getLogger().setLevel(logging.INFO if process.first else logging.ERROR)
        yield process
        dist.barrier()  # all leave together: a process that is gone can abort those still connected to it
    finally:
        dist.destroy_process_group()


# ============================================================================================================
# Checkpoints
# ============================================================================================================


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors atomically: temporary file, fsync, rename."""
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    except SafetensorError as error:
        raise DataError(f"{path}: cannot be written ({error}); make room") from error
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


# Of every state.json; older ones lack some, and called `data` `identity`
STATE = {
    "step": number(int, 0), "total": number(int, 1).or_else(0), "tensors": TEXT,
    "data": TEXT.or_else(""), "identity": TEXT.or_else(""),
}  # fmt: skip


class Checkpoint:
    """The last/ folder: one tensor file per saved step, and state.json, which names the valid one.

    A process killed at any moment leaves a complete checkpoint, the old or the new one.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def tensors_of(self, step: int) -> str:
        return f"step-{step:08d}.safetensors"

    def save(self, state: dict, tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self.tensors_of(state["step"])
        save_tensors(self.folder / name, tensors)
        write_json(self.folder / "state.json", state | {"tensors": name})
        for pattern in ("step-*.safetensors*", ".state.json.*.tmp"):  # former tensors, half-written files
            for other in self.folder.glob(pattern):
                if other.name != name:
                    other.unlink()

    def load(self, fields: Mapping[str, Rule]) -> tuple[dict, dict[str, Tensor]] | None:
        """The last complete checkpoint, or None. `fields`: its state.json's beside STATE."""
        path = self.folder / "state.json"
        if not path.exists():
            return None
        try:
            state = read_json(path, STATE | fields, closed=True)
            check(state, {"tensors": one_of(self.tensors_of(state["step"]))}, path)
            require_file(self.folder / state["tensors"])
            return state, load_file(self.folder / state["tensors"])
        except Exception as error:  # safetensors, JSON and the disk raise different exceptions
            raise DataError(
                f"{self.folder}: the checkpoint cannot be read ({error}); remove it to start the run again"
            ) from error


MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Adam's moments and step counts under the names of their parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{slot}.{names[i]}": value for i, slots in state.items() for slot, value in slots.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Restore the optimizer from the tensors of `optimizer_tensors`."""
    slots = optimizer.state_dict()
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    for name, parameter in zip(names, parameters, strict=True):
        if any(tensors[f"optimizer.{slot}.{name}"].shape != parameter.shape for slot in MOMENTS):
            raise KeyError(f"the optimizer's moments of {name} have another shape")
    slots["state"] = {
        i: {slot: tensors[f"optimizer.{slot}.{name}"] for slot in ("step", *MOMENTS)}
        for i, name in enumerate(names)
    }
    optimizer.load_state_dict(slots)


# ============================================================================================================
# The loop
# ============================================================================================================


def learning_rate(peak: float, step: int, total: int) -> float:
    """A cosine from `peak` at the first step to 0 after the last."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / total))


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The samples of each step of an epoch: a shuffle that depends on seed and epoch alone."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]


class Trainer(ABC):
    """A model, its optimizer and the folder of its training; `fit` is the loop.

    A subclass defines `batches`, `loss` and `rate`, and, if needed, `validate`, `state` and `load_state`; it
    sets `total`, `steps_per_epoch` and `checkpoint_every`. `identity` is a hash of data and options that a
    checkpoint must match; `names` are those of the optimizer's parameters, in its order.
    """

    label = "train"  # of the progress bar
    state_fields: Mapping[str, Rule] = {}  # of `state` beside those below
    clip_norm = math.inf

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        names: list[str],
        identity: str,
        process: Process | None = None,
    ):
        self.folder, self.model, self.optimizer, self.names = folder, model, optimizer, names
        self.identity, self.process = identity, process or Process()
        self.checkpoint = Checkpoint(folder / "last")
        self.step, self.total, self.steps_per_epoch, self.checkpoint_every = 0, 0, 1, 100
        self.stopping = False

    # -- defined by a subclass ------------------------------------------------

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterable[tuple[int, Any]]:
        """(samples, batch) for the steps of an epoch, from its step number `first` on."""

    @abstractmethod
    def loss(self, batch: Any) -> dict[str, Tensor]:
        """Named terms; the first is minimised. Its random numbers depend on the seed and the step alone, so
        that a resumed training has the same."""

    @abstractmethod
    def rate(self) -> float:
        """The schedule's learning rate at `self.step`; a group's is this times its `scale`."""

    def validate(self, epoch: int) -> dict[str, float]:
        """Values to log at the end of an epoch."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors that are saved."""
        return self.model.state_dict()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """State for resuming: (JSON, tensors)."""
        tensors = {f"model.{name}": value for name, value in self.tensors().items()}
        tensors |= optimizer_tensors(self.optimizer, self.names)
        return {"step": self.step, "total": self.total, "data": self.identity}, tensors

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        # Copied in place, because the optimizer holds the parameters.
        own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        held = {name: value.dtype for name, value in own.items()}
        if unfit := [name for name, value in self.tensors().items() if held.get(name) != value.dtype]:
            raise KeyError(f"missing or of another dtype: {', '.join(unfit)}")
        self.model.load_state_dict(self.model.state_dict() | own)
        load_optimizer(self.optimizer, self.names, tensors)
        self.step = state["step"]

    # -- the loop ------------------------------------------------

    def fit(self) -> None:
        """Train to the last step. Ctrl-C saves first; kill -9 loses the steps after the last checkpoint."""
        self.restore()
        self.model.train()
        hidden = {} if self.process.first else {"disable": True}  # False would undo TQDM_DISABLE
        bar = tqdm(total=self.total, initial=self.step, desc=self.label, unit="step", **hidden)
        with self.recorder() as record, bar, self.stop_between_steps():
            while self.step < self.total:
                epoch, first = divmod(self.step, self.steps_per_epoch)
                started = time.perf_counter()
                for samples, batch in self.batches(epoch, first):
                    lr = self.rate()  # by the step's number alone, so that resuming continues the schedule
                    for group in self.optimizer.param_groups:
                        group["lr"] = self.group_rate(lr, group)
                    terms = self.train_step(batch)
                    self.step += 1

                    now = time.perf_counter()
                    record(epoch=epoch, **terms, lr=lr, images_per_second=samples / (now - started))
                    started = now
                    bar.update()
                    bar.set_postfix(self.bar_text(terms), refresh=False)

                    # Validation comes before saving: a checkpoint must hold the best cosine so far.
                    end_of_epoch = self.step % self.steps_per_epoch == 0
                    if end_of_epoch and (measured := self.validate(epoch)):
                        record(epoch=epoch, **measured)
                    if end_of_epoch or self.stopping or self.step % self.checkpoint_every == 0:
                        self.save()
                    if self.stopping:  # only here: an unfinished step cannot be resumed
                        raise KeyboardInterrupt

    def train_step(self, batch: Any) -> dict[str, float]:
        """The loss's terms; takes one step of the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.forward_backward(batch)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        if not all(map(math.isfinite, (*terms.values(), norm))):
            raise DataError(
                f"{self.folder}: the loss is not finite at step {self.step}; start a new run with a lower "
                "learning rate (--lr); the last checkpoint is kept"
            )
        self.optimizer.step()
        return terms

    def forward_backward(self, batch: Any) -> dict[str, float]:
        """The terms of a batch's loss; the parameters then hold its gradient."""
        terms = self.loss(batch)
        next(iter(terms.values())).backward()
        return {name: term.item() for name, term in terms.items()}

    def group_rate(self, lr: float, group: dict[str, Any]) -> float:
        """The learning rate of a parameter group of the optimizer; the schedule's is `lr`."""
        return lr * group.get("scale", 1.0)

    def bar_text(self, terms: dict[str, float]) -> dict[str, str]:
        """Text beside the progress bar."""
        return {name: f"{value:.3f}" for name, value in terms.items()}

    # -- saving, resuming, logging ------------------------------------------------

    def save(self) -> None:
        if self.process.first:
            self.checkpoint.save(*self.state())

    def restore(self) -> None:
        """Restore the last checkpoint, if any, and truncate the log to its step."""
        if (checkpoint := self.checkpoint.load(self.state_fields)) is not None:
            state, tensors = checkpoint
            recorded = state["data"] or state["identity"], state["total"] or self.total
            if recorded != (self.identity, self.total):
                raise DataError(
                    f"{self.folder}: was trained on other pairs or options; use the same again, or start a "
                    "new run"
                )
            try:
                self.load_state(state, tensors)
            except (KeyError, RuntimeError, TypeError) as error:
                raise DataError(
                    f"{self.folder}: the checkpoint does not fit its config.json ({error}); restore that"
                ) from error
            if self.step > self.total:
                raise DataError(f"{self.folder}: the checkpoint is beyond the run's {self.total} steps")
            log.info("resumed at step %d of %d", self.step, self.total)
        path = self.folder / "log.jsonl"
        if self.process.first and path.exists():
            lines = read_text(path, sys.maxsize).splitlines(keepends=True)
            whole = [(line, json_object(line) or {}) for line in lines if line.endswith("\n")]
            kept = [line for line, entry in whole if number(int, 0, self.step).fits(entry.get("step"))]
            atomic_write(path, "".join(kept))

    @contextlib.contextmanager
    def recorder(self) -> Iterator[Any]:
        """Context manager: a function that appends a line to log.jsonl, in the first process only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.jsonl" if self.process.first else os.devnull, "a") as file:

            def record(**entry: float) -> None:
                file.write(json.dumps({"step": self.step} | entry) + "\n")
                file.flush()

            yield record

    @contextlib.contextmanager
    def stop_between_steps(self) -> Iterator[None]:
        """Context manager: the first Ctrl-C or SIGTERM takes effect after the current step."""

        def request_stop(*_: object) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True

        former = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
