"""The end of every command: one line and a status for what a user can mend, a traceback for the rest."""

import os
import signal
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest
from conftest import ROOT, environment
from safetensors import SafetensorError

from command import Parser, number, positive, run_command, text
from data import DataError
from weights import WeightsError, load_tokenizer, resolve_device


@pytest.mark.parametrize(
    "error, line",
    [
        (DataError("a.png: broken; replace it"), "error: a.png: broken; replace it"),
        (WeightsError("two\nlines"), "error: two lines"),
        (SafetensorError("truncated"), "error: truncated"),
        (DataError("x" * 9000 + ": no"), "error: " + "x" * 500 + " ... " + "x" * 291 + ": no"),
        (
            RuntimeError("can't allocate: 9"),
            "error: not enough memory (can't allocate: 9); make batches or pictures smaller",
        ),
        (MemoryError(), "error: not enough memory (); make batches or pictures smaller"),
        (DataError("a b " * 200), "error: " + "a b " * 200),
        (PermissionError(13, "Permission denied", "runs"), "error: [Errno 13] Permission denied: 'runs'"),
    ],
)
def test_errors_of_input_and_disk_are_one_line_and_status_2(error: Exception, line: str, capsys):
    def command() -> None:
        raise error

    assert run_command(command) == 2
    assert capsys.readouterr().err == line + "\n"


def test_a_status_is_kept_and_an_error_of_the_program_is_not_caught(capsys):
    assert (run_command(lambda: None), run_command(lambda: 2)) == (0, 2)
    for error in (ZeroDivisionError(), RuntimeError("shapes differ")):
        with pytest.raises(type(error)):
            run_command(lambda error=error: (_ for _ in ()).throw(error))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert run_command(lambda: os.kill(os.getpid(), signal.SIGTERM), "goes on later") == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr() == ("", "goes on later\n")


def test_a_closed_or_ascii_standard_output_is_no_traceback():
    code = "from command import run_command; raise SystemExit(run_command(lambda: print('é' * {n})))"
    python, options = [sys.executable, "-c"], {"cwd": ROOT, "text": True}
    buffered = environment(PYTHONUNBUFFERED="")
    ascii_only = environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    done = subprocess.run([*python, code.format(n=1)], env=ascii_only, capture_output=True, **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xe9\n", "")
    process = subprocess.Popen(
        [*python, code.format(n=10**6)], env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,
    )  # fmt: skip
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*python, code.format(n=1)], stdout=full, stderr=subprocess.PIPE, env=buffered, **options
        )
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("error: standard output was closed\n", 2)


def test_numbers_of_options():
    assert [positive(text) for text in ("1", "999999999")] == [1, 999_999_999]
    assert number(float, 0, 1)("1") == 1.0 and number(int)("-3") == -3
    share = number(float, 0, 1)
    refused = [(positive, value) for value in ("0", "²", "1_0", "٣", "1000000000")]
    for parse, value in (*refused, (share, "1.1"), (share, "nan"), (number(float), "inf")):
        with pytest.raises(ArgumentTypeError, match=f"{value}: must be"):
            parse(value)


def test_arguments_however_long_empty_or_undecoded(capsys):
    parser = Parser(prog="p")
    parser.add_argument("--n", type=positive)
    parser.add_argument("--data", type=text)
    parser.add_argument("--x", type=number(int))
    for flags, line in ((["--n", "9" * 5000], "9 ... 9"), (["--data", " "], "--data: must not be empty"),
                        (["--x", "a"], "--x: invalid int value: 'a'")):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(flags)
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("p: error: argument --") and line in error and len(error) < 900
    tokenizer = load_tokenizer("sd-mini")
    assert tokenizer(["a barn \udcff"]).tolist() == tokenizer(["a barn ?"]).tolist()
    with pytest.raises(WeightsError, match="--device meta: not available here"):
        resolve_device("meta")
