"""What does a container do before its command, and how is it asked how it is?

    python deploy/entrypoint.py COMMAND ...    first start: database, config files and a random key; then COMMAND
    python deploy/entrypoint.py --show-key     print the key that devices and browsers need
    python deploy/entrypoint.py --health       end with 0 while the master answers /healthz, else with 1

Config files and key are in data/config, so they live in the data volume, readable by their owner only. With
AF_API_KEY_FILE nothing is made, and the key is the text of that file (a mounted secret): master and workers in
containers of their own share one so. The key is not written to the container's log, which others may read and which is
kept for long. COMMAND replaces this process, so that it gets the container's signals itself. Needs the standard library
and settings.py; the rest is in scripts/init_distribution.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FOLDER = ROOT / "data" / "config"
HEALTH_SECONDS = 4.0


def load_settings() -> Any:
    """The effective settings of the standalone, as its own start would see them."""
    sys.path.insert(0, str(ROOT))
    import settings

    try:
        config = CONFIG_FOLDER / "distribution_standalone.json"
        return settings.load("standalone", config_path=config if config.is_file() else None, starting=False)
    except settings.SettingsError as error:
        settings.stop(error)


def prepare() -> int:
    """Creates what is missing; again, it changes nothing. Returns 0 or the exit code of what refused."""
    init = [sys.executable, str(ROOT / "scripts" / "init_distribution.py"), "--config-folder", str(CONFIG_FOLDER)]
    is_first = not CONFIG_FOLDER.exists()
    made = subprocess.run(init, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode == 0 and is_first:
        print(f"a random key is in {CONFIG_FOLDER}; python deploy/entrypoint.py --show-key prints it", flush=True)
    return made.returncode


def take_key(name: str) -> str | None:
    """Moves the key from that file into AF_API_KEY; what is wrong with it, or None."""
    try:
        key = Path(name).read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        return f"AF_API_KEY_FILE: {name} cannot be read ({reason}); the container's user 10001 must be able to"
    if not key:
        return f"AF_API_KEY_FILE: {name} is empty; write a random key into it"
    os.environ["AF_API_KEY"] = key
    return None


def is_healthy() -> bool:
    url = f"http://127.0.0.1:{load_settings().port}/healthz"
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=HEALTH_SECONDS) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def main(argv: list[str]) -> int:
    key_file = os.environ.pop("AF_API_KEY_FILE", "")
    wrong = take_key(key_file) if key_file else None
    if wrong:
        print(wrong, file=sys.stderr)
        return 2
    if argv == ["--health"]:
        return 0 if is_healthy() else 1
    if argv == ["--show-key"]:
        print(load_settings().api_key)
        return 0
    if not argv:
        print("write the command to start, for instance: python standalone.py", file=sys.stderr)
        return 2
    code = 0 if key_file else prepare()
    if code:
        return code
    sys.stdout.flush()
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"{argv[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
