"""What of a folder survives when the power goes? Only what was synced; and of the rest, as luck will have it.

power.c, preloaded into a program, keeps beside each watched folder what has been synced of it. `Power.cut` leaves of the
folder what a disk would have: the bytes of the last fsync of each file, under the names that its folder had when that
was synced. Half of the cuts are that strict. In the others some of what was not synced is there too, as on a disk that
was in the middle of writing it: any of a file's 4 KiB blocks, and the first of the changes of names.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().with_name("power.c")
BLOCK = 4096


def why_not() -> str:
    """Why power cannot be cut here; "" where it can."""
    if sys.platform != "linux":
        return "the shim is for Linux"
    return "" if shutil.which("cc") else "there is no C compiler (cc)"


def build(folder: Path) -> Path:
    """The shim, compiled into this folder."""
    library = folder / "power.so"
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def environment(library: Path, *folders: Path) -> dict[str, str]:
    """What a program's environment has to hold for its changes of these folders to be watched."""
    return {"LD_PRELOAD": str(library), "POWER": ":".join(map(str, folders))}


@dataclass
class File:
    """One file, or a folder (`kept` is None); `kept` is the name of its synced bytes."""

    kept: str | None


class Change(NamedTuple):
    """A name that came, went or was changed; `is_synced` when its folder was synced afterwards."""

    at: int
    kind: str
    path: str
    file: File | None
    new: str
    is_synced: bool


class Power:
    """One watched folder. `watch` before its first program starts; `cut` when its programs stand still."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder.resolve(), Path(f"{folder.resolve()}.power")

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Nothing more can be written there; also after a restart."""
        mark = self.kept / "full"
        mark.touch()
        yield
        mark.unlink(missing_ok=True)

    def watch(self) -> None:
        """What is there now is on the disk."""
        shutil.rmtree(self.kept, ignore_errors=True)
        self.kept.mkdir(parents=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_dir():
                lines.append(f"D {path}\n")
            else:
                inode = path.stat().st_ino
                shutil.copyfile(path, self.kept / str(inode))
                lines.append(f"C {inode} {path}\n")
        folders = [self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())]
        lines += [f"S {path}\n" for path in folders]
        (self.kept / "log").write_text("".join(lines))

    def cut(self, luck: random.Random | None) -> None:
        """The folder is as a disk would have it, and watched from here on. Without luck nothing is there but what was
        synced. Whoever has it open must be killed first, or stand still and never go on."""
        luck = None if luck is not None and luck.random() < 0.5 else luck
        changes = self._changes()
        open_ones = [change.at for change in changes if not change.is_synced]
        made_until = luck.randint(open_ones[0], open_ones[-1] + 1) if luck is not None and open_ones else 0
        now = replay(changes)
        names = replay([change for change in changes if change.is_synced or change.at < made_until])
        where = {id(file): path for path, file in now.items()}
        survived: dict[str, bytes | None] = {}
        for path, file in sorted(names.items()):
            if file.kept is None:
                survived[path] = None
                continue
            live = Path(where.get(id(file), "/nowhere"))
            synced = self.kept / file.kept
            content = synced.read_bytes() if synced.exists() else b""
            survived[path] = mixed(content, live.read_bytes(), luck) if luck is not None and live.exists() else content
        for entry in self.folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for path, found in survived.items():
            if not Path(path).parent.is_dir():
                continue  # its folder was never synced
            if found is None:
                Path(path).mkdir(mode=0o700)
            else:
                Path(path).write_bytes(found)
                Path(path).chmod(0o600)
        self.watch()

    def _changes(self) -> list[Change]:
        """What the shim told, with the files that it is about."""
        lines = (self.kept / "log").read_text().splitlines()
        synced_at: dict[str, int] = {}
        for at, line in enumerate(lines):
            if line[0] == "S":
                synced_at[line[2:]] = at
        files: dict[str, File] = {}  # by inode
        names: dict[str, File] = {}
        changes = []
        for at, line in enumerate(lines):
            kind, rest = line[0], line[2:]
            if kind == "S":
                continue
            name, path = rest.split(" ", 1) if kind != "D" else ("", rest)
            path, _, new = path.partition("\t")
            file = None
            if kind == "C":
                file = files[name] = File(name)
            elif kind == "D":
                file = File(None)
            elif kind == "R":
                file = names.get(path)
            gone = names.get(new if kind == "R" else path)
            if kind in "UR" and gone is not None and gone.kept is not None and gone is not file:
                files.pop(gone.kept, None)
                gone.kept = name
            folders = [str(Path(each).parent) for each in (path, new) if each]
            is_synced = any(synced_at.get(folder, -1) > at for folder in folders)
            changes.append(Change(at, kind, path, file, new, is_synced))
            apply(names, changes[-1])
        return changes


def apply(names: dict[str, File], change: Change) -> None:
    if change.kind == "U":
        names.pop(change.path, None)
    elif change.kind == "R":
        moved = {path: file for path, file in names.items() if f"{path}/".startswith(f"{change.path}/")}
        for path, file in moved.items():
            del names[path]
            names[change.new + path[len(change.path) :]] = file
        if change.file is not None:  # also where its first name was never synced: the second one was
            names[change.new] = change.file
    elif change.file is not None:
        names[change.path] = change.file


def replay(changes: list[Change]) -> dict[str, File]:
    names: dict[str, File] = {}
    for change in changes:
        apply(names, change)
    return names


def mixed(synced: bytes, live: bytes, luck: random.Random) -> bytes:
    """A file whose last changes were on their way to the disk: each block is the old or the new one."""
    length = len(luck.choice((synced, live)))
    share = luck.random()
    blocks = []
    for at in range(0, length, BLOCK):
        block = (live if luck.random() < share else synced)[at : at + BLOCK]
        blocks.append(block.ljust(min(BLOCK, length - at), b"\0")[: length - at])
    return b"".join(blocks)


def stand_still(group: int) -> None:
    """All processes of this group stop; returns when none of their threads runs any more."""
    os.killpg(group, signal.SIGSTOP)
    until = time.monotonic() + 60
    while not all(state in "TtZX" for state in states(group)):
        assert time.monotonic() < until, "a process does not stop"
        time.sleep(0.001)


def states(group: int) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                for thread in (process / "task").iterdir():
                    found.append((thread / "stat").read_text().rpartition(")")[2].split()[0])
    return found
