"""Time and memory of cleaning (section 4.1); goal: 2,000,000 prompts in 60 s and 2 GB, prompts included.

    python benchmarks/clean.py [--prompts 2000000]

The prompts are synthetic, as DiffusionDB's two million are not in the tree: pieces of real prompts
(../shared/data/prompts, else a small grammar) between commas are joined, with exact and near repeats, empty
and foreign ones, in such shares that about a third is kept, as in the paper.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import SHARED_CHARACTERS, clean  # noqa: E402  (run from any folder, nothing is installed)

REAL = ROOT.parent / "shared" / "data" / "prompts" / "diffusiondb_10k.txt"


def pieces() -> list[str]:
    """Phrases between commas, of real prompts or of a grammar."""
    if REAL.exists():
        return [piece.strip() for line in REAL.read_text("utf-8").splitlines() for piece in line.split(",")]
    subjects = [
        "a portrait of an old wizard",
        "a castle on a hill",
        "a robot in the rain",
        "a cat with wings",
    ]
    places = [
        "in a dark forest",
        "by the sea at night",
        "under two moons",
        "in a neon city",
        "on a frozen lake",
    ]
    styles = [
        "highly detailed",
        "trending on artstation",
        "octane render",
        "oil on canvas",
        "by greg rutkowski",
    ]
    return [f"{s} {p} no. {k}" for s in subjects for p in places for k in range(500)] + styles * 1000


def synthetic(n: int, seed: int = 0) -> list[str]:
    """n prompts: 40 % new, 45 % earlier ones again, 11 % sharing an end or beginning, 4 % to drop."""
    choice, number = random.Random(seed), random.Random(seed + 1).random
    phrases, prompts = pieces(), []
    for k in range(n):
        kind = number() if k > 100 else 0.0
        if kind < 0.40:
            prompts.append(", ".join(choice.choices(phrases, k=choice.randint(1, 9))))
        elif kind < 0.85:
            prompts.append(prompts[choice.randrange(k)] + " " * choice.randint(1, 2))
        elif kind < 0.96:
            earlier, piece = prompts[choice.randrange(k)], choice.choice(phrases)
            prompts.append(f"{earlier}, {piece}" if kind < 0.93 else f"{piece}, {earlier}")
        else:
            prompts.append(choice.choice(["", "null", "...", "un château en été", "富士山の絵"]))
    return prompts


def peak_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def hashed(prompts: list[str]) -> int:
    """The alternative for comparison: sets of 64-bit hashes, which may drop a prompt wrongly."""
    from hashlib import blake2b

    heads, tails, kept = set(), set(), 0
    for prompt in (p.strip() for p in prompts):
        if prompt and prompt.isascii():
            head, tail = (
                int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
                for text in (prompt[:SHARED_CHARACTERS], prompt[-SHARED_CHARACTERS:])
            )
            if head not in heads and tail not in tails:
                heads.add(head)
                tails.add(tail)
                kept += 1
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=2_000_000)
    parser.add_argument(
        "--hashed", action="store_true", help="time sets of 64-bit hashes instead, for comparison"
    )
    args = parser.parse_args()
    prompts = synthetic(args.prompts)
    before, start = peak_mb(), time.perf_counter()
    report = {"kept": hashed(prompts)} if args.hashed else clean(prompts)[1]
    seconds = time.perf_counter() - start
    print(f"{args.prompts:,} prompts, {sum(map(len, prompts)) / len(prompts):.0f} characters on average")
    print(f"clean: {seconds:.1f} s; peak {peak_mb():,.0f} MB, of which {before:,.0f} MB before cleaning")
    print("; ".join(f"{rule} {count:,}" for rule, count in report.items()))


if __name__ == "__main__":
    main()
