"""Does an account come through a master and its devices once, and its token nowhere else?"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_appsflyer import COLUMNS, TOKEN, FakeAppsFlyer
from farm import ROOT, Master, Program, Worker, environment, wait_for

from executors.appsflyer import window
from scripts import demo_appsflyer

DAY = (window.utc_today() - timedelta(days=1)).isoformat()


@pytest.fixture
def fake() -> Iterator[FakeAppsFlyer]:
    fake = FakeAppsFlyer().start()
    yield fake
    fake.stop()


def test_an_accounts_apps_are_pulled_and_its_token_stays_in_the_devices_config(
    fake: FakeAppsFlyer, tmp_path: Path, programs: list[Program]
) -> None:
    del fake.apps[3:]
    master = Master(tmp_path / "master")
    programs.append(master)
    programs.append(
        Worker(master.url, tmp_path / "worker", appsflyer_url=fake.url, credentials={"acme": TOKEN}, log_level="DEBUG")
    )
    fake.fault("id1000000000", "echo")  # its answer repeats the token
    pull = {"reports": ["installs_report"], "start_date": DAY, "end_date": DAY}
    order = {"username": "acme", "batch": "b", "unique_key": "apps", "task_data": {"pull": pull}}
    first = master.submit_one("app_sync", **order)
    wait_for("all reports", lambda: master.states("b") == {"completed": 3, "failed": 1})
    tasks = {task["app_id"]: task for task in master.get("/tasks?batch=b")["tasks"] if task["parent_id"] == first}
    assert "Bad request with Bearer ***" in tasks["id1000000000"]["error_message"]
    for app in fake.apps[1:]:
        task = master.get(f"/tasks/{tasks[app.app_id]['id']}")
        (artifact,) = task["artifacts"]
        file = master.api("GET", f"/tasks/{task['id']}/artifacts/{artifact['artifact_id']}").content
        rows = gzip.decompress(file).decode("utf-8")
        for row in fake.rows(app.app_id, "installs_report", DAY):
            assert rows.count(row[COLUMNS.index("AppsFlyer ID")]) == 1
        assert task["result"]["rows"] == len(fake.rows(app.app_id, "installs_report", DAY))
    again = master.call("POST", "/tasks", {"task_type": "app_sync", **order, "unique_key": "apps once more"})["id"]
    wait_for("the second list", lambda: master.get(f"/tasks/{again}")["status"] == "completed")
    assert master.states("b") == {"completed": 4, "failed": 1}, "a second list orders nothing twice"
    for program in reversed(programs):
        program.stop()
    configs = {program._config for program in programs}
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert set(holders) <= configs and (tmp_path / "worker" / "shop-1.log").stat().st_size > 0


def files_of(fake: FakeAppsFlyer, folder: Path) -> list[dict[str, Any]]:
    """Tasks with files as the demo collects them: a file for each app and report, over all of its days."""
    pulled = []
    for app in fake.apps:
        for report in demo_appsflyer.REPORTS:
            rows = [row for day in demo_appsflyer.days() for row in fake.rows(app.app_id, report, day)]
            path = folder / f"{app.app_id}_{report}.csv.gz"
            path.write_bytes(gzip.compress(fake._csv(fake.columns(report), rows).decode("utf-8-sig").encode()))
            result = {"app_id": app.app_id, "report": report, "rows": len(rows)}
            pulled.append({"id": len(pulled), "task_type": "data_sync", "result": result, "path": path})
    return pulled


def test_the_demos_check_sees_a_lost_file_and_a_doubled_one(
    fake: FakeAppsFlyer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del fake.apps[2:]
    pulled = files_of(fake, tmp_path)
    listed = {"task_type": "app_sync", "result": {"apps": [{"id": app.app_id} for app in fake.apps]}}
    assert demo_appsflyer.check(fake.url, [listed, *pulled], pulled) == []
    assert "180 of 180 app-days" in capsys.readouterr().out
    lost = demo_appsflyer.check(fake.url, [listed, *pulled], pulled[1:])
    assert len(lost) == 30 and all(re.search(r"[1-9]\d* rows missing, 0 too many", sentence) for sentence in lost)
    doubled = demo_appsflyer.check(fake.url, [listed, *pulled], [*pulled, pulled[0]])
    assert len(doubled) == 30 and all(re.search(r"0 rows missing, [1-9]", sentence) for sentence in doubled)


@pytest.mark.slow
def test_the_demo_pulls_every_app_day_once_under_quotas(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "demo_appsflyer.py"), "--output", str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False, env=environment(), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1080 of 1080 app-days arrived exactly once" in done.stdout
    assert int(re.findall(r"refused by a quota (\d+)", done.stdout)[-1]) > 0
    assert len(list(tmp_path.rglob("*.csv.gz"))) >= 36
