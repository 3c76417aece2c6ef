"""Limits, lanes and pauses over real HTTP: the routes, the wire, the config, and a limit that opens by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from farm import Master, Program, wait_for
from test_api import problem, shaped

import openapi
import replies

Numbers = dict[str, Any]


def pull(master: Master, device_id: str, limit: int = 1) -> list[Any]:
    """What there is at once, at most that many."""
    query = {"device_id": device_id, "boot_id": "boot-1", "limit": limit}
    tasks: list[Any] = master.call("GET", "/tasks/pull", params=query)["tasks"]
    return tasks


@pytest.fixture
def limits(master: Master) -> Any:
    """Sets limits; those of the config hold again when the test is over."""
    before = master.get("/limits")["limits"]

    def put(*wanted: Numbers) -> Any:
        return shaped(master.call("PUT", "/limits", {"limits": list(wanted)}), openapi.LimitsOut)

    yield put
    put(*({name: value for name, value in limit.items() if name != "keys"} for limit in before))


def test_the_config_makes_accounts_and_sites_take_turns(master: Master) -> None:
    found = shaped(master.get("/limits"), openapi.LimitsOut)
    assert [(limit["name"], limit["task_type"], limit["key"]) for limit in found["limits"]] == [
        ("account", "*", ["username"]),
        ("site", "crawl", ["task_data.host"]),
    ]


def test_a_limit_holds_and_says_what_it_counts(master: Master, limits: Any) -> None:
    limits({"name": "user", "key": "username", "max_running": 1, "max_starts": 5, "window_seconds": 60})
    master.register("limited-1", task_types=["limited"], max_concurrent_tasks=10)
    first, second = master.submit(
        {"task_type": "limited", "username": "张三"}, {"task_type": "limited", "username": "张三"}
    )
    [task] = pull(master, "limited-1", limit=9)
    assert task["id"] == first and pull(master, "limited-1", limit=9) == []
    why = shaped(master.get(f"/tasks/{second}/why"), openapi.WhyOut)
    assert (why["reason"], why["limit"]["name"], why["limit"]["value"]) == ("limit_running", "user", ["张三"])
    assert why["next_look_seconds"] is None and "1 of 1 run" in why["detail"]
    [user] = shaped(master.get("/limits"), openapi.LimitsOut)["limits"]
    [key] = user["keys"]
    assert (key["value"], key["running"], key["starts_in_window"], key["held_by"]) == (["张三"], 1, 1, "max_running")
    master.report("limited-1", task, "completed")
    assert [task["id"] for task in pull(master, "limited-1", limit=9)] == [second]


@pytest.mark.parametrize(
    ("wanted", "code", "field"),
    [
        ([{"name": "a", "key": "user"}], "invalid_field", "limits[0].key"),
        ([{"name": "a", "key": ["username", "username"]}], "invalid_field", "limits[0].key"),
        ([{"name": "a", "key": ["username", 3]}], "invalid_field", "limits[0].key[1]"),
        ([{"name": "a", "max_running": 0}], "invalid_field", "limits[0].max_running"),
        ([{"name": "a", "max_starts": 3}], "invalid_field", "limits[0].window_seconds"),
        ([{"name": "a", "window_seconds": 3}], "invalid_field", "limits[0].max_starts"),
        ([{"name": "a"}, {"name": "a"}], "invalid_field", "limits[1].name"),
        ([{"name": "a", "task_type": "cr awl"}], "invalid_field", "limits[0].task_type"),
        ([{"name": "a", "max_runing": 3}], "unknown_field", "limits[0].max_runing"),
        ([{"key": "username"}], "missing_field", "limits[0].name"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_and_changes_nothing(
    master: Master, wanted: list[Numbers], code: str, field: str
) -> None:
    before = master.get("/limits")
    problem(master.api("PUT", "/limits", {"limits": wanted}), 422, code, field)
    assert master.get("/limits") == before


def test_a_report_closes_its_key_for_everybody_until_it_opens_by_itself(master: Master, limits: Any) -> None:
    limits({"name": "user", "key": "username"})
    for name in ("closing-1", "closing-2"):
        master.register(name, task_types=["closing"], max_concurrent_tasks=10)
    first, second = master.submit(*[{"task_type": "closing", "username": "joe"}] * 2)
    [task] = pull(master, "closing-1")
    master.report("closing-1", task, "failed", error_message="429", limit_closed_seconds=3, limit_name="user")
    assert pull(master, "closing-2") == []
    why = shaped(master.get(f"/tasks/{second}/why"), openapi.WhyOut)
    assert why["reason"] == "limit_closed" and 0 < why["next_look_seconds"] <= 3
    assert master.get(f"/tasks/{first}")["retry_count"] == 0
    query = {"device_id": "closing-2", "boot_id": "boot-1", "limit": 9, "wait": 8}  # less than dispatch_interval
    assert second in [task["id"] for task in master.call("GET", "/tasks/pull", params=query)["tasks"]]


@pytest.mark.parametrize("until", ["2999-01-01T00:00:00Z", "2999-01-01T08:00:00+08:00"])
def test_a_report_may_name_the_moment_and_a_person_may_open_it(master: Master, limits: Any, until: str) -> None:
    limits({"name": "user", "key": "username"})
    master.register("until-1", task_types=["until"], max_concurrent_tasks=10)
    first, second = master.submit(*[{"task_type": "until", "username": "joe"}] * 2)
    [task] = pull(master, "until-1")
    master.report("until-1", task, "snoozed", snooze_seconds=3600, limit_closed_until=until)
    assert pull(master, "until-1", limit=9) == []
    why = shaped(master.get(f"/tasks/{first}/why"), openapi.WhyOut)  # it waits for its time; the limit is told too
    assert (why["reason"], why["limit"]["name"], why["limit"]["held_by"]) == ("scheduled", "user", "closed")
    assert 3000 < why["next_look_seconds"] <= 3600 and "limit user for joe is closed until" in why["detail"]
    problem(master.api("POST", "/limits/none/open", {}), 404, "unknown_limit", "name")
    opened = shaped(master.call("POST", "/limits/user/open", {"value": ["joe"]}), openapi.LimitOpenedOut)
    assert opened == {"name": "user", "opened": 1}
    assert [task["id"] for task in pull(master, "until-1", limit=9)] == [second]


@pytest.mark.parametrize("said", [{"limit_closed_until": "soon"}, {"limit_closed_until": "1999-01-01T00:00:00Z"},
                                  {"limit_closed_seconds": -3}, {"limit_closed_seconds": 0}])  # fmt: skip
def test_what_a_device_learned_wrongly_costs_no_report(master: Master, limits: Any, said: Numbers) -> None:
    limits({"name": "user", "key": "username"})
    master.register("wrong-1", task_types=["wrong"], max_concurrent_tasks=10)
    master.submit(*[{"task_type": "wrong", "username": "joe"}] * 2)
    [task] = pull(master, "wrong-1")
    assert master.report("wrong-1", task, "snoozed", snooze_seconds=3600, **said)["outcome"] == "accepted"
    [other] = pull(master, "wrong-1", limit=9)
    master.report("wrong-1", other, "completed")


def test_lanes_types_and_everything_are_paused_with_a_reason_that_is_shown(master: Master) -> None:
    master.register("paused-1", task_types=["paused"], max_concurrent_tasks=10)
    task_id = master.submit_one("paused")
    [lane] = shaped(master.get("/lanes?task_type=paused"), openapi.LanesOut)["lanes"]
    assert (lane["waiting"], lane["paused"], lane["next_task_id"]) == (1, False, task_id)
    things = [
        (f"/lanes/{lane['id']}", "lane", str(lane["id"])),
        ("/task-types/paused", "type", "paused"),
        ("/system", "all", None),
    ]
    for path, scope, name in things:
        paused = shaped(master.call("POST", f"{path}/pause", {"reason": "周末"}), openapi.PauseChangedOut)
        assert paused == {"scope": scope, "name": name, "paused": True, "reason": "周末"}
        assert pull(master, "paused-1") == []
        why = shaped(master.get(f"/tasks/{task_id}/why"), openapi.WhyOut)
        assert why["reason"] == f"{scope}_paused" and "周末" in why["detail"]
        overview = shaped(master.get("/system/overview"), replies.OverviewOut)
        assert {"scope": scope, "name": name, "reason": "周末"} in overview["paused"]
        resumed = shaped(master.call("POST", f"{path}/resume"), openapi.PauseChangedOut)
        assert resumed == {"scope": scope, "name": name, "paused": False, "reason": None}
        assert master.get("/system/overview")["paused"] == []
    assert [task["id"] for task in pull(master, "paused-1")] == [task_id]
    problem(master.api("POST", "/lanes/999999/pause", {}), 404, "unknown_lane", "lane_id")
    problem(master.api("POST", "/lanes/x/pause", {}), 422, "invalid_field", "lane_id")


def test_lanes_come_in_pages(master: Master) -> None:
    for n in range(5):
        master.submit_one("paged", username=f"user-{n}")
    found: list[int] = []
    cursor: str | None = ""
    while cursor is not None:
        page = shaped(master.get(f"/lanes?task_type=paged&limit=2&cursor={cursor}"), openapi.LanesOut)
        found += [lane["id"] for lane in page["lanes"]]
        cursor = page["next_cursor"]
    assert len(found) == len(set(found)) == 5 and found == sorted(found, reverse=True)


def test_a_task_says_which_device_it_would_rather_go_to(master: Master) -> None:
    master.register("rather-1", task_types=["rather"], max_concurrent_tasks=10)
    task_id = master.submit_one("rather", same_device_as="joe", prefer_seconds=5)
    task = master.get(f"/tasks/{task_id}")
    assert (task["same_device_as"], task["prefer_seconds"]) == ("joe", 5)
    assert [task["id"] for task in pull(master, "rather-1")] == [task_id]
    problem(
        master.api("POST", "/tasks", {"task_type": "rather", "prefer_seconds": 5}),
        422,
        "invalid_field",
        "prefer_seconds",
    )


def test_the_limits_of_the_config_hold_and_those_of_the_api_survive_a_restart(
    tmp_path: Path, programs: list[Program]
) -> None:
    configured = [{"name": "all", "task_type": "echo", "max_running": 2}]
    master = Master(tmp_path, limits=configured)
    programs.append(master)
    master.register("shop-1", task_types=["echo"], max_concurrent_tasks=10)
    master.submit(*[{"task_type": "echo"}] * 9)
    assert len(pull(master, "shop-1", limit=9)) == 2
    master.call("PUT", "/limits", {"limits": [{**configured[0], "max_running": 3}]})
    assert len(pull(master, "shop-1", limit=9)) == 1
    master.kill()
    master.start()
    master.register("shop-1", task_types=["echo"], max_concurrent_tasks=10)
    assert pull(master, "shop-1", limit=9) == []
    [limit] = master.get("/limits")["limits"]
    assert (limit["max_running"], limit["keys"][0]["running"]) == (3, 3)


def test_a_config_with_a_wrong_limit_stops_the_start_with_one_line(tmp_path: Path, programs: list[Program]) -> None:
    wrong = [{"name": "user", "key": "usernam"}]
    with pytest.raises(AssertionError, match=r"(?s)ended with 2: .*limits\[0\].key must be username"):
        programs.append(Master(tmp_path, limits=wrong))


def test_a_long_queue_moves_after_the_answer(tmp_path: Path, programs: list[Program]) -> None:
    master = Master(tmp_path, limits=[])
    programs.append(master)
    for _ in range(3):
        master.submit(*[{"task_type": "echo", "username": "joe"}] * 2000)
    reply = master.call("PUT", "/limits", {"limits": [{"name": "user", "key": "username", "max_running": 1}]})
    assert 0 < reply["moving"] < 6000
    wait_for("the last task", lambda: master.get("/limits")["moving"] == 0)
