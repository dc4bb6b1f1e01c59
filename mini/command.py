"""What the commands of mini/ have in common: how they count, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def count(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


def end(command: Callable[[], None]) -> None:
    """Run it and leave: for what is wrong with the input or the disk with one line and status 2.

    DataError and WeightsError are ValueErrors, as is what PIL says of a picture's name.
    """
    try:
        command()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what was saved", file=sys.stderr)
        sys.exit(130)
