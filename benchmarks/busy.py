"""Slowdown of drawing and training beside a busy process, by wait policy and number of threads.

    python benchmarks/busy.py                 drawing with sd-mini, a few training steps of its U-Net encoder
    python benchmarks/busy.py draw --rounds 5

Each line is one setting of OMP_WAIT_POLICY and OMP_NUM_THREADS; "default" sets nothing: for drawing it is
generate.py's own choice. Each round times every setting once, quiet and beside one process
that computes without pause; the numbers are medians of the seconds that the task took after its start.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "default": {},
    "2 threads, spinning": {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "2"},
    "2 threads, passive": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"},
    "2 threads, short spin": {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "2"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
}
SET = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
TASKS = {
    "draw": """
import time, generate
pipeline = generate.load_pipeline("sd-mini", "cpu")
draw = lambda: pipeline.draw(["a crimson star over snow"], [0], (64, 64), 1, steps=50, guidance=7.5)
draw()
start = time.perf_counter()
draw()
print(time.perf_counter() - start)
""",
    "train": """
import time, torch, weights
import train
from backbones import UNetFeatures
from reverse_sd import Regressor, cosine_loss
torch.manual_seed(0)
backbone = UNetFeatures(weights.load("unet-encoder", "sd-mini"))
model = Regressor(backbone, backbone.width, 300)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
inputs, target = (torch.randn(32, 4, 8, 8), torch.randn(32, 77, 128)), torch.randn(32, 384)
def step():
    optimizer.zero_grad()
    cosine_loss(model(*inputs).embedding, target).mean().backward()
    optimizer.step()
step()
start = time.perf_counter()
for _ in range(15):
    step()
print(time.perf_counter() - start)
""",
}


def seconds(task: str, setting: dict[str, str]) -> float:
    """The seconds that a task reports, in a separate process."""
    inherited = {k: v for k, v in os.environ.items() if k not in SET}
    environment = inherited | {"PYTHONPATH": str(ROOT)} | setting
    done = subprocess.run(
        [sys.executable, "-c", TASKS[task]], env=environment, check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help=f"{', '.join(TASKS)} (default: both)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    args = parser.parse_args()
    times: dict[tuple[str, str, bool], list[float]] = {}
    for _ in range(args.rounds):
        for busy in (False, True):
            spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                for task in args.tasks or TASKS:
                    for name, setting in SETTINGS.items():
                        times.setdefault((task, name, busy), []).append(seconds(task, setting))
            finally:
                if spinner:
                    spinner.kill()
    print("task   setting                 quiet      busy     busy / quiet")
    for task in args.tasks or TASKS:
        for name in SETTINGS:
            quiet, busy = (statistics.median(times[task, name, state]) for state in (False, True))
            print(f"{task:6} {name:22} {quiet:6.2f} s  {busy:6.2f} s  {busy / quiet:8.2f}")


if __name__ == "__main__":
    main()
