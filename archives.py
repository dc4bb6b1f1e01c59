"""Zips read by file descriptor: their directories are parsed once, then a member is read at its offset."""

from __future__ import annotations

import os
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np

from files import unzip

try:
    import resource
except ImportError:  # Windows
    resource = None

# Where a member lies: its header's offset, its bytes there and unpacked, CRC-32, and method of compression.
MEMBER = np.dtype([("offset", "<i8"), ("packed", "<u4"), ("size", "<u4"), ("crc", "<u4"), ("method", "<u4")])
PACK = struct.Struct("<qIIII").pack
LOOSE = bytes(MEMBER.itemsize)  # of a file that is in no zip
OTHER = 0xFFFF  # the method of all members that are left to zipfile
MOST = 0xFFFFFFFF
HEADER = 30  # bytes of a member's own header before its name


def members_of(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """{name: its MEMBER, packed} in the order of the zip's directory; of equal names the last one's.

    A member is left to zipfile if it is encrypted, neither stored nor deflated, of 4 GB or more, much larger
    packed than unpacked, or overlaps the next one.
    """
    entries = sorted(archive.infolist(), key=attrgetter("header_offset"), reverse=True)
    members, end = dict.fromkeys(archive.namelist(), LOOSE), archive.start_dir
    for entry in entries:
        offset, packed, size = entry.header_offset, entry.compress_size, entry.file_size
        plain = (
            entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            and not entry.flag_bits & 0x61  # encrypted, patched, strongly encrypted
            and packed <= size + size // 8 + 64
            and size < 1 << 32
            and 0 <= offset <= end - HEADER - packed
        )
        if entry is archive.NameToInfo[entry.filename]:
            method = entry.compress_type if plain else OTHER
            offset, packed = offset * plain, packed * plain
            members[entry.filename] = PACK(offset, packed, min(size, MOST), entry.CRC, method)
        end = entry.header_offset
    return members


class Zips:
    """The zips of some paths, of which each process holds as many open as a quarter of its descriptors.

    Safe to use from threads, after a fork and after pickling. Zips are never parsed: `read` takes a MEMBER.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple:
        return Zips, (self.paths,)

    def __del__(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, k: int, name: str, member: tuple[int, ...], limit: int) -> bytes:
        """The bytes of a member of zip k. Raises one of files.ZIP_ERRORS where it is damaged, cut short,
        encrypted or packed in an unknown way, or unpacks to more than `limit` bytes."""
        offset, packed, size, crc, method = member
        if size > limit:
            raise ValueError(f"{name} unpacks to more than {limit >> 20} MB")
        if method == OTHER:
            with zipfile.ZipFile(self.paths[k]) as archive:
                return unzip(archive, name, limit)
        if self._pid != os.getpid():  # another thread of the parent may have held the lock at the fork
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:
            descriptor = self._descriptor(k)
            header = read_at(descriptor, HEADER, offset)
            if len(header) < HEADER or not header.startswith(b"PK\3\4"):
                raise zipfile.BadZipFile("no member lies where the directory has one")
            raw = read_at(descriptor, packed, offset + HEADER + sum(struct.unpack_from("<HH", header, 26)))
        content = zlib.decompressobj(-15).decompress(raw, max(size, 1)) if method else raw
        if len(content) != size or zlib.crc32(content) != crc:
            raise zipfile.BadZipFile(f"Bad CRC-32 or length of {name!r}")
        return content

    def _descriptor(self, k: int) -> int:
        if k not in self._open:
            if len(self._open) >= most_open():
                os.close(self._open.popitem(last=False)[1])
            self._open[k] = os.open(self.paths[k], os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._open.move_to_end(k)
        return self._open[k]


def most_open() -> int:
    """The zips that a process may hold open: a quarter of its file descriptors, at most 4,096."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else 256
    return 4096 if limit < 0 else max(1, min(limit // 4, 4096))


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """At most `size` bytes from `offset` on."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows: under the lock of Zips
    return os.read(descriptor, size)
