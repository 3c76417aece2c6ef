"""Was anything lost, invented, done twice, left behind? A function of what was written down; it asks no program.

`Evidence` is what four sides say: the producers' history, the witness of executions, what the proxy heard the master
answer, and the final state as the API and the database file tell it. `check` compares them. Every count of a `Verdict`
must be 0; each finding is a sentence with the ids to look for.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

FINAL = ("completed", "failed", "cancelled")
EXECUTION_TIMEOUT = 60.0
LOSSES = ("lost", "silent_since_start")
COUNTS = ("lost", "unexpected", "double-accepted", "stuck", "limits broken", "early expiries", "results dropped",
          "books wrong", "server errors")  # fmt: skip


@dataclass
class Evidence:
    """Lists of records, as they are written to evidence.json. Times are CLOCK_MONOTONIC, one clock for all."""

    device_timeout: float
    max_running: int
    ended_at: float
    history: list[dict[str, Any]]
    """Producers: submit (keys), submitted (keys, ids, status), cancel (id), cancelled (id, status)."""
    witness: list[dict[str, Any]]
    """Executions: begin, end, cut (token, task, assignment, ...); spools: spooled (party, assignments)."""
    calls: list[dict[str, Any]]
    """What the master answered: register (or may have taken, status 0), beat, pull, report; refused (500 and more)."""
    faults: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    """GET /tasks/export with results."""
    attempts: list[dict[str, Any]]
    counters: dict[str, dict[str, int]] = field(default_factory=dict)
    """by_state as the API says it, for all and for each batch."""
    books: list[str] = field(default_factory=list)
    """What the file's own counters say against its rows; empty when they agree."""
    integrity: str = "ok"

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Evidence:
        return cls(**json.loads(path.read_text()))


@dataclass
class Verdict:
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, count: str, finding: str) -> None:
        assert count in COUNTS
        self.counts[count] += 1
        self.findings.append(f"{count}: {finding}")

    @property
    def is_clean(self) -> bool:
        return not self.counts


def check(evidence: Evidence) -> Verdict:
    verdict = Verdict()
    facts = Facts(evidence)
    _check_submits(facts, verdict)
    _check_ends(facts, verdict)
    _check_reports(facts, verdict)
    _check_results(facts, verdict)
    _check_cancels(facts, verdict)
    _check_spools(facts, verdict)
    _check_expiries(facts, verdict)
    _check_limits(facts, verdict)
    _check_books(facts, verdict)
    _measure(facts, verdict)
    return verdict


class Facts:
    """The evidence, looked up by what the checks ask for."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.tasks = {task["id"]: task for task in evidence.tasks}
        self.attempts = {attempt["id"]: attempt for attempt in evidence.attempts}
        self.attempts_of: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        for attempt in sorted(evidence.attempts, key=lambda attempt: attempt["id"]):
            self.attempts_of[attempt["task_id"]].append(attempt)
        self.rows: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for task in evidence.tasks:
            self.rows[task["batch"], task["unique_key"]].append(task)
        self.begun = {line["token"]: line for line in evidence.witness if line["e"] == "begin"}
        self.ended = {line["token"]: line for line in evidence.witness if line["e"] == "end"}
        self.acts: dict[tuple[str, str], str] = {}
        for line in evidence.history:
            if line["f"] == "submit":
                self.acts.update({(batch, key): act for batch, key, act in line["keys"]})
        self.reports = [
            (call, assignment, outcome, token, verdict)
            for call in evidence.calls
            if call["f"] == "report"
            for assignment, outcome, token, verdict in call["reports"]
        ]
        self.given: dict[int, tuple[float, float]] = {}
        """Each attempt was given to its device in this time: from the pull's question to its answer."""
        for call in sorted(evidence.calls, key=lambda call: call["to"]):
            for assignment in call.get("given", ()):
                self.given.setdefault(assignment, (call["from"], call["to"]))


# -- the checks -----------------------------------------------------------------------------------------------


def _check_submits(facts: Facts, verdict: Verdict) -> None:
    """Each acknowledged submit is a row, the same that was promised; each row was submitted, once."""
    acknowledged = 0
    for line in facts.evidence.history:
        if line["f"] != "submitted":
            continue
        if line["ids"] is None:
            if line["status"]:
                verdict.add("server errors", f"a submit was refused with {line['status']}: {line['answer']}")
            continue
        for (batch, key, _), task_id in zip(line["keys"], line["ids"], strict=True):
            acknowledged += 1
            if not any(row["id"] == task_id for row in facts.rows[batch, key]):
                verdict.add("lost", f"task {task_id} ({batch}/{key}) was acknowledged and is not there")
    verdict.figures["submits acknowledged"] = acknowledged
    children = {(batch, f"{key}/child"): (batch, key) for (batch, key), act in facts.acts.items() if act == "spawn"}
    for (batch, key), rows in facts.rows.items():
        if len(rows) > 1:
            ids = [row["id"] for row in rows]
            verdict.add("unexpected", f"one key, several tasks: {batch}/{key} is {ids}")
        if (batch, key) not in facts.acts and rows:
            parents = facts.rows.get(children.get((batch, key), ("", "")), [])
            if not any(parent["status"] == "completed" for parent in parents):
                verdict.add("unexpected", f"task {rows[0]['id']} ({batch}/{key}) was submitted by nobody")
    for child, parent in children.items():
        if any(row["status"] == "completed" for row in facts.rows.get(parent, ())) and not facts.rows.get(child):
            verdict.add("lost", f"{parent} completed without the task that comes of it")


def _check_ends(facts: Facts, verdict: Verdict) -> None:
    for task in facts.evidence.tasks:
        if task["status"] not in FINAL:
            verdict.add("stuck", f"task {task['id']} is {task['status']}")
    for attempt in facts.evidence.attempts:
        if attempt["status"] in ("assigned", "running"):
            verdict.add("stuck", f"attempt {attempt['id']} of task {attempt['task_id']} is {attempt['status']}")


def _check_reports(facts: Facts, verdict: Verdict) -> None:
    """What a device was told is accepted is in the books; a task's completion is accepted once."""
    completions: defaultdict[int, list[int]] = defaultdict(list)
    accepted = 0
    for _, assignment, outcome, token, answer in facts.reports:
        if answer != "accepted" or outcome == "running":
            continue
        accepted += 1
        attempt = facts.attempts.get(assignment)
        if attempt is None:
            verdict.add("lost", f"attempt {assignment} was accepted as {outcome} and is not there")
        elif outcome == "completed":
            completions[attempt["task_id"]].append(assignment)
            task = facts.tasks.get(attempt["task_id"], {})
            if task.get("status") != "completed":
                verdict.add("lost", f"attempt {assignment}: accepted as completed, task is {task.get('status')}")
            elif token != _token(task):
                verdict.add("double-accepted", f"attempt {assignment}: its result was accepted, and is not the task's")
        elif outcome not in (attempt["status"], attempt["late_outcome"]):
            verdict.add("lost", f"attempt {assignment}: accepted as {outcome}, it is {attempt['status']}")
    for task_id, assignments in completions.items():
        if len(assignments) > 1:
            verdict.add("double-accepted", f"task {task_id}: completions accepted of attempts {assignments}")
    verdict.figures["reports acknowledged"] = accepted


def _check_results(facts: Facts, verdict: Verdict) -> None:
    """A completed task has one completed attempt, and the result of one witnessed execution of that attempt."""
    for task in facts.evidence.tasks:
        completed = [a["id"] for a in facts.attempts_of[task["id"]] if a["status"] == "completed"]
        if task["status"] != "completed":
            if completed:
                verdict.add("lost", f"task {task['id']} is {task['status']}, its attempts {completed} completed")
            continue
        execution = facts.ended.get(_token(task))
        if len(completed) != 1 or completed != [task["assignment_id"]]:
            verdict.add("double-accepted", f"task {task['id']}: completed attempts {completed}")
        elif execution is None:
            verdict.add("unexpected", f"task {task['id']} has a result that no witnessed execution made")
        elif execution["assignment"] != task["assignment_id"]:
            verdict.add(
                "double-accepted",
                f"task {task['id']} has the result of attempt {execution['assignment']}, not of {task['assignment_id']}",
            )


def _token(task: dict[str, Any]) -> str:
    return str((task.get("result") or {}).get("token"))


def _check_cancels(facts: Facts, verdict: Verdict) -> None:
    for line in facts.evidence.history:
        if line["f"] == "cancelled" and line["status"] == 200:
            task = facts.tasks.get(line["id"])
            if task is None or task["status"] != "cancelled":
                verdict.add("lost", f"task {line['id']}: a cancel was acknowledged, it is {task and task['status']}")


def _check_spools(facts: Facts, verdict: Verdict) -> None:
    """What a spool had promised to keep came to the master, however its device ended."""
    promised = spooled(facts.evidence.witness)
    for assignment in sorted(promised - arrived(facts.evidence.calls)):
        verdict.add("results dropped", f"a device had spooled attempt {assignment}; it never came")
    verdict.figures["reports spooled"] = len(promised)


def spooled(witness: list[dict[str, Any]]) -> set[int]:
    """The attempts whose report is on a device's disk, as its worker says; a twin's disk never comes back."""
    return {
        assignment
        for line in witness
        if line["e"] == "spooled" and not line["party"].startswith("twin")
        for assignment in line["assignments"]
    }


def arrived(calls: list[dict[str, Any]]) -> set[int]:
    """The attempts whose report the master has answered."""
    return {
        assignment
        for call in calls
        if call["f"] == "report"
        for assignment, outcome, _, _ in call["reports"]
        if outcome != "running"
    }


def _check_expiries(facts: Facts, verdict: Verdict) -> None:
    """A lease ends because its device was silent, or another process of it came; never while the master hears it."""
    silences = _silences(facts.evidence)
    for call in facts.evidence.calls:
        if call["f"] == "register":  # a new process, which does not hold what the one before it held
            silences[call["device"]].append((call["from"], call["to"]))
    losses = 0
    for attempts in facts.attempts_of.values():
        for n, attempt in enumerate(attempts):
            begin, _ = facts.given.get(attempt["id"], (-math.inf, 0.0))
            following = attempts[n + 1]["id"] if n + 1 < len(attempts) else -1
            _, end = facts.given.get(following, (0.0, facts.evidence.ended_at))
            device = attempt["device_id"]
            if attempt["status"] == "timeout":
                if end - begin < EXECUTION_TIMEOUT:
                    verdict.add("early expiries", f"attempt {attempt['id']} timed out within {end - begin:.1f} s")
            elif attempt["status"] == "released" and attempt["error_type"] in LOSSES:
                losses += 1
                if not any(quiet < end and heard > begin for quiet, heard in silences[device]):
                    verdict.add(
                        "early expiries",
                        f"attempt {attempt['id']} of {device} was released as {attempt['error_type']} between"
                        f" {begin:.1f} and {end:.1f} s, although its device was heard and was the same",
                    )
    verdict.figures["leases lost"] = losses


def _silences(evidence: Evidence) -> defaultdict[str, list[tuple[float, float]]]:
    """The times in which the master may have heard no beat of a device for device_timeout. One that it refused, as on a
    full disk, was none; and a device beats a while after it registers, so that counts as one."""
    beats: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for call in evidence.calls:
        if call["f"] in ("beat", "register") and call["status"] == 200:
            beats[call["device"]].append((call["from"], call["to"]))
    silences: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for device, heard in beats.items():
        heard.sort()
        ends = [*(to for _, to in heard), evidence.ended_at]
        for (quiet_from, _), heard_at in zip(heard, ends[1:], strict=True):
            if heard_at - quiet_from >= evidence.device_timeout:
                silences[device].append((quiet_from, heard_at))
    return silences


def _check_limits(facts: Facts, verdict: Verdict) -> None:
    """Never more than max_running executions of one username at once, of those whose place the master had not taken
    back: which ended with a report in time, sooner after their delivery than a silence could have cost them."""
    moments: defaultdict[str, list[tuple[float, int, int]]] = defaultdict(list)
    counted = 0
    for token, end in facts.ended.items():
        attempt, begin = facts.attempts.get(end["assignment"]), facts.begun[token]
        if end["username"] is None or attempt is None or attempt["late_outcome"] is not None:
            continue
        given_at, _ = facts.given.get(end["assignment"], (-math.inf, 0.0))
        if (
            attempt["status"] in ("completed", "failed", "snoozed")
            and end["t"] - given_at < facts.evidence.device_timeout
        ):
            counted += 1
            moments[end["username"]] += [(begin["t"], 1, end["assignment"]), (end["t"], -1, end["assignment"])]
    for username, changes in moments.items():
        running: set[int] = set()
        for _, change, assignment in sorted(changes):
            running = running | {assignment} if change > 0 else running - {assignment}
            if len(running) > facts.evidence.max_running:
                verdict.add("limits broken", f"{username} runs attempts {sorted(running)} at once")
    verdict.figures["executions under a limit, counted"] = counted


def _check_books(facts: Facts, verdict: Verdict) -> None:
    evidence = facts.evidence
    for scope, counted in evidence.counters.items():
        rows = Counter(task["status"] for task in evidence.tasks if scope in ("", task["batch"]))
        if {state: n for state, n in counted.items() if n} != dict(rows):
            verdict.add("books wrong", f"counters of {scope or 'all'}: {counted}, rows: {dict(rows)}")
    for sentence in evidence.books:
        verdict.add("books wrong", sentence)
    if evidence.integrity != "ok":
        verdict.add("books wrong", f"integrity_check: {evidence.integrity}")
    for call in evidence.calls:
        if call["f"] == "refused" and call["status"] not in (503, 507):
            verdict.add("server errors", f"{call['path']} answered {call['status']}: {call['answer']}")


# -- the figures ----------------------------------------------------------------------------------------------


def _measure(facts: Facts, verdict: Verdict) -> None:
    evidence, figures = facts.evidence, verdict.figures
    figures["tasks"] = len(evidence.tasks)
    figures["tasks by end"] = dict(Counter(task["status"] for task in evidence.tasks))
    figures["executions witnessed"] = len(facts.begun)
    again = [a for attempts in facts.attempts_of.values() for a in attempts[:-1]]
    figures["attempts after which a task ran again, by end"] = dict(
        Counter(f"{a['status']} {a['error_type'] or ''}".strip() for a in again).most_common()
    )
    figures["answers to reports"] = dict(Counter(answer for *_, answer in facts.reports).most_common())
    figures["faults"] = dict(sorted(Counter(fault["kind"] for fault in evidence.faults).items()))
    figures["kills"] = sum(fault["kind"].startswith(("kill", "power_cut", "twin")) for fault in evidence.faults)
    figures["seconds from a fault's end to the next accepted completion"] = dict(_recoveries(facts))


def _recoveries(facts: Facts) -> Iterator[tuple[str, str]]:
    """For each kind: of that device where a device was hit, of any where the master or a producer was."""
    accepted = sorted(
        (call["to"], call["device"])
        for call, _, outcome, _, answer in facts.reports
        if outcome == "completed" and answer == "accepted"
    )
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for fault in facts.evidence.faults:
        is_device = fault["target"].startswith("shop")
        times = (at for at, device in accepted if at > fault["to"] and (not is_device or device == fault["target"]))
        by_kind[fault["kind"]] += [at - fault["to"] for at in _first(times)]
    for kind, seconds in sorted(by_kind.items()):
        if seconds:
            yield kind, f"p50 {median(seconds):.2f}, max {max(seconds):.2f} (n={len(seconds)})"


def _first(times: Iterable[float]) -> list[float]:
    return [at for at in (next(iter(times), None),) if at is not None]
