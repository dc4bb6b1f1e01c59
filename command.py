"""Shared parts of the command lines: exit status, one-line errors, types of numbers."""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from safetensors import SafetensorError

from data import DataError
from weights.strict import WeightsError

LINE = 800  # most characters of an error's text


def run_command(command: Callable[[], int | None], stopped: str = "stopped") -> int:
    """The exit status of `command()`: its own, 2 after an error of the input, the disk or for lack of memory,
    130 after Ctrl-C.

    Such an error prints one line on standard error; Ctrl-C and SIGTERM print `stopped`. Other errors keep
    their traceback. Characters that the terminal cannot show are escaped.
    """
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return failed("standard output was closed")
    except (DataError, WeightsError, SafetensorError, OSError) as error:
        return failed(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate", str(error)):
            raise
        return failed(f"not enough memory ({error}); make batches or pictures smaller")
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130


def failed(error: object) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # Python flushes it again at exit
    print("error: " + one_line(error), file=sys.stderr)
    return 2


def one_line(error: object) -> str:
    """The error's text on one line, without the middle of a long one."""
    line = " ".join(str(error).split("\n"))
    return line if len(line) <= LINE else f"{line[: LINE - 300]} ... {line[-295:]}"


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are readable however long the arguments are."""

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def text(value: str) -> str:
    """A text that is not empty, for argparse."""
    if not value.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def decodable(value: str) -> str:
    """The text with "?" for bytes that are no UTF-8, for argparse."""
    return value.encode("utf-8", "replace").decode()


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1 to 999,999,999")
    return int(text)


def number(kind: type, least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """A finite number of that kind from `least` to `most`, for argparse."""

    def parsed(text: str) -> float:
        value = kind(text)
        if not (least <= value <= most and abs(value) < math.inf):
            raise argparse.ArgumentTypeError(f"{text}: must be from {least} to {most}")
        return value

    parsed.__name__ = kind.__name__  # argparse names it where the text is no number
    return parsed
