"""Where is the list of certificate authorities while it lies in a zip? This is certifi/core.py in worker.pyz.

TLS wants a file. certifi itself would unpack one into the temporary folder: a killed worker leaves it there, and a
cleaner deletes it under a worker that runs for weeks. So it is a file in memory where the system has such (Linux), else
one in data/ beside worker.pyz, which the next start finds again, and only where that cannot be a temporary one.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import pkgutil
import sys
import tempfile
from pathlib import Path
from typing import Optional

_path: Optional[str] = None


def contents() -> str:
    """The certificates as PEM text."""
    return _bundle().decode("ascii")


def where() -> str:
    """The path of a file that holds them, as long as this process lives."""
    global _path
    if _path is None:
        bundle = _bundle()
        _path = _in_memory(bundle) or _beside_the_archive(bundle) or _temporary(bundle)
    return _path


def _bundle() -> bytes:
    found = pkgutil.get_data("certifi", "cacert.pem")
    if found is None:
        raise FileNotFoundError("cacert.pem is not in worker.pyz: get the file again from the master")
    return found


def _in_memory(bundle: bytes) -> Optional[str]:
    if sys.platform != "linux":
        return None
    try:
        descriptor = os.memfd_create("cacert.pem")  # open until the process ends; not handed on to children
    except OSError:
        return None
    path = f"/proc/self/fd/{descriptor}"
    with open(descriptor, "wb", closefd=False) as file:
        file.write(bundle)
    if Path(path).is_file():
        return path
    os.close(descriptor)
    return None


def _beside_the_archive(bundle: bytes) -> Optional[str]:
    folder = Path(__file__).parents[2] / "data"
    path = folder / f"cacert-{hashlib.sha256(bundle).hexdigest()[:16]}.pem"
    try:
        if path.is_file() and path.read_bytes() == bundle:
            return str(path)
        folder.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(bundle)
        fresh.replace(path)
    except OSError:
        return None
    return str(path)


def _temporary(bundle: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".pem", delete=False) as file:
        file.write(bundle)

    def delete() -> None:
        with contextlib.suppress(OSError):
            Path(file.name).unlink()

    atexit.register(delete)
    return file.name
