"""How does a whole device become one file?

    python scripts/make_edge.py [--output dist/worker.pyz] [--wheels dist/wheels]

worker.pyz holds worker.py, settings.py, executors/ and the pure-Python packages of requirements-edge.txt with their
licences. It runs on a bare Python 3.9 to 3.13: python worker.pyz --master-url http://HOST:8000 --device-id shop-7

The packages come by pip, once, each checked against the sha256 of its requirement; after that it needs no network. The
same input gives the same bytes: no dates, one order, one compression.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements-edge.txt"
OLDEST_PYTHON = "3.9"
SHEBANG = b"#!/usr/bin/env python3\n"
EARLIEST_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold
OWN_PLACES = {"__main__.py": "scripts/edge/start.py", "certifi/core.py": "scripts/edge/certificates.py"}


class Pin(NamedTuple):
    """One line of the requirements: exactly this wheel."""

    name: str
    version: str
    sha256: str


def pins() -> list[Pin]:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line) for line in lines if line[:1] != "#"]
    if not all(found):
        raise SystemExit(f"{REQUIREMENTS.name}: write each line as name==version --hash=sha256:...")
    return [Pin(*match.groups()) for match in found if match]


def fetch_wheels(folder: Path) -> list[Path]:
    """The pinned wheels, in order; from `folder` where they are there, else by pip, which leaves them there."""
    if not _known(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            _download(Path(fresh))
            for path in Path(fresh).glob("*.whl"):
                path.replace(folder / path.name)
    known = _known(folder)
    if known is None:
        raise SystemExit(f"pip brought other files into {folder} than {REQUIREMENTS.name} names; delete the folder")
    return known


def _known(folder: Path) -> list[Path] | None:
    by_hash = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in folder.glob("*.whl")}
    found = [by_hash[pin.sha256] for pin in pins() if pin.sha256 in by_hash]
    return found if len(found) == len(pins()) else None


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--dest", str(folder), "--requirement", str(REQUIREMENTS)]
    # Without these pip takes the wheels of this machine: compiled ones cannot be imported from a zip.
    command += ["--python-version", OLDEST_PYTHON, "--implementation", "py", "--abi", "none", "--platform", "any"]
    command += ["--ignore-requires-python"]  # Protego says 3.10; the tests run every one of them on 3.9
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"pip could not fetch {REQUIREMENTS.name} (above it says why); run make edge again")


def own_files() -> Iterator[tuple[str, bytes]]:
    """(place in the archive, content) of what is ours."""
    for path in (ROOT / "worker.py", ROOT / "settings.py", *(ROOT / "executors").rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_bytes()
    for place, source in OWN_PLACES.items():
        yield place, (ROOT / source).read_bytes()


def package_files(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """(place, content) of a package's modules, and its licence and metadata; no scripts and no type stubs."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            is_bookkeeping = name.endswith((".dist-info/RECORD", ".dist-info/WHEEL", ".pyi", "/py.typed", "/"))
            if not is_bookkeeping and ".data/" not in name and name not in OWN_PLACES:
                yield name, archive.read(name)


def pack(wheels: Sequence[Path]) -> dict[str, bytes]:
    """Everything in the archive, by its place."""
    content: dict[str, bytes] = {}
    for files in (own_files(), *map(package_files, wheels)):
        for place, data in files:
            if place in content:
                raise SystemExit(f"{place} is in two of the packages; take one out of {REQUIREMENTS.name}")
            content[place] = data
    return content


def write(content: dict[str, bytes], output: Path) -> str:
    """Write the archive in one step, so that nobody is served half of it; returns its sha256."""
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_name(f"{output.name}.{os.getpid()}")
    with fresh.open("wb") as file:
        file.write(SHEBANG)
        with zipfile.ZipFile(file, "w") as archive:
            for place in sorted(content):
                entry = zipfile.ZipInfo(place, EARLIEST_DATE)
                entry.create_system, entry.external_attr = 3, 0o644 << 16  # the same on Windows
                archive.writestr(entry, content[place], zipfile.ZIP_DEFLATED, 9)
    fresh.chmod(0o755)
    fresh.replace(output)
    return hashlib.sha256(output.read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pack the worker and what it needs into one file.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "worker.pyz", metavar="FILE")
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist" / "wheels", metavar="FOLDER", help="kept packages")
    arguments = parser.parse_args(argv)
    digest = write(pack(fetch_wheels(arguments.wheels)), arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes, sha256 {digest}")
    print("the master serves it at /edge/worker.pyz; the dashboard's Add a device shows the line to paste")
    return 0


if __name__ == "__main__":
    sys.exit(main())
