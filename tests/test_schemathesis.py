"""Does the API do what its OpenAPI document says? schemathesis makes requests of it, fit and unfit ones, and checks.

What it tries is decided by the document alone; what it cannot know, and which check is off for which operation and why,
stands in fuzzing.toml. `make fuzz` prints how many requests there were.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from farm import ROOT, Master, Program, environment
from populated import populate

if importlib.util.find_spec("schemathesis") is None:
    pytest.skip("schemathesis needs Python 3.11; it is in requirements-dev.txt", allow_module_level=True)

KEY = "correct-horse-battery-staple-1234567890"
QUICK = (
    "--include-name-regex", r"GET .*/(devices|batches|lanes|limits|tasks)$|\{|/login$",
    "--exclude-name-regex", r"GET .*/(heartbeats|stats|failures|why)|POST .*/(heartbeat|resume)|PUT .*/tasks/|/task-types/",
)  # fmt: skip
"""What `make test` has the time for: some lists, which tell what there is, and most routes about one thing."""


def tried(programs: list[Program], folder: Path, *options: str) -> int:
    """Runs schemathesis against a new master; how many requests it found nothing wrong with, which is all of them."""
    master = Master(folder, api_key=KEY)
    programs.append(master)
    populate(master)
    run = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "--config-file", str(ROOT / "tests" / "fuzzing.toml"), "run",
         f"{master.url}/api/distribution/openapi.json", "--header", f"Authorization: Bearer {KEY}",
         "--generation-deterministic", "--continue-on-failure", "--no-color", *options],
        cwd=folder, env={**environment(), "PYTHONPATH": str(ROOT / "tests")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"(\d+) generated, \d+ passed", run.stdout)
    assert run.returncode == 0 and found, run.stdout[-20_000:] + run.stderr
    assert master.get("/openapi.json") and master.process.poll() is None
    assert "Traceback" not in master.output and "a handler failed" not in master.output, master.output[-20_000:]
    print(f"\nschemathesis: {found[1]} requests, nothing that the document does not say ({' '.join(options[:2])})")
    return int(found[1])


@pytest.mark.timeout(1200)
def test_the_edges_of_every_parameter_are_answered_as_the_document_says(
    programs: list[Program], tmp_path: Path
) -> None:
    assert tried(programs, tmp_path, "--phases", "coverage", *QUICK) > 500


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thousands_of_requests_are_answered_as_the_document_says(programs: list[Program], tmp_path: Path) -> None:
    phases = "examples,coverage,fuzzing,stateful"
    assert tried(programs, tmp_path, "--phases", phases, "--max-examples", os.environ.get("EXAMPLES", "100")) > 5_000
