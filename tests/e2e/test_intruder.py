"""What does a real browser do with a stranger's page, and with a stranger's text on ours? A canary listens."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from crawl_site import Canary

KEY = "a-key-of-a-test-that-nobody-else-knows"


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A site of somebody else on another port, which is the same "site" for a cookie and another origin."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    folder = tmp_path / "stranger"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()
    thread.join(60)


def test_a_strangers_text_in_every_field_calls_nobody_and_runs_nothing(start_master, open_tab, canary: Canary):
    master = start_master()
    away = f"http://127.0.0.1:{canary.port}"
    hostile = (
        f'"\'><img src="{away}/i" onerror="window.pwned=1"><script src="{away}/s"></script><svg onload="window.pwned=1">'
        f'<link rel=stylesheet href="{away}/c"><iframe src="{away}/f"></iframe><base href="{away}/">'
    )
    names = dict.fromkeys(("username", "app_id", "batch"), hostile[:128])
    data = {"url": "javascript:window.pwned=1", "image": f"{away}/d", hostile: hostile}
    master.register("shop-1", device_name=hostile[:128])
    task = master.submit_one(**names, task_data=data)
    [taken] = master.pull("shop-1")
    texts = dict.fromkeys(("error_message", "error_type", "log_tail"), hostile)
    master.report("shop-1", taken, "failed", retry=False, result={"link": "javascript:window.pwned=1", **data}, **texts)
    tab = open_tab(master.url + "/")
    for view in ("", "tasks", f"tasks/{task}", "devices", "devices/shop-1", "batches", "events", f"new?from={task}"):
        tab.page.goto(f"{master.url}/#/{view}")
        tab.page.wait_for_load_state("networkidle" if view != "events" else "load")
        tab.page.locator("main").wait_for()
        assert tab.page.evaluate("window.pwned") is None, view
        assert tab.page.locator("a[href^='javascript:'], main img, main iframe, base, body script").count() == 0, view
    assert canary.connections() == 0


def test_a_strangers_page_orders_nothing_reads_nothing_and_frames_nothing(start_master, chromium, stranger):
    master = start_master(api_key=KEY)
    url, folder = stranger
    api = f"{master.url}/api/distribution"
    (folder / "attack.html").write_text(f"""<!doctype html><title>attack</title>
<iframe id=frame src="{master.url}/"></iframe><iframe name=hidden></iframe>
<form id=form method=post action="{api}/tasks" enctype="text/plain" target=hidden>
<input name='{{"task_type":"stolen","username":"' value='"}}'></form>
<script>
const told = {{}};
const attempt = async (name, path, options) => {{
  try {{ const reply = await fetch("{api}" + path, {{credentials: "include", ...options}}); told[name] = reply.type + reply.status; }}
  catch (error) {{ told[name] = "refused"; }}
}};
const json = {{"Content-Type": "application/json"}};
const body = JSON.stringify({{task_type: "stolen"}});
document.getElementById("form").submit();
Promise.all([
  attempt("read", "/devices", {{}}),
  attempt("json", "/tasks", {{method: "POST", headers: json, body}}),
  attempt("simple", "/tasks", {{method: "POST", mode: "no-cors", body}}),
  attempt("delete", "/devices/shop-1", {{method: "DELETE"}}),
  new Promise((done) => {{ const events = new EventSource("{api}/events", {{withCredentials: true}});
    events.onerror = () => {{ told.events = "refused"; events.close(); done(); }};
    events.onopen = () => {{ told.events = "open"; events.close(); done(); }}; }}),
]).then(() => {{ document.title = "done"; window.told = told; }});
</script>""")
    master.register("shop-1")
    with contextlib.closing(chromium.new_context()) as context:
        page = context.new_page()
        page.goto(master.url)
        login = "fetch('/api/distribution/login', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: key})"
        assert page.evaluate(f"(key) => {login}.then((reply) => reply.ok)", json.dumps({"key": KEY}))
        assert page.evaluate("fetch('/api/distribution/devices').then((reply) => reply.ok)"), (
            "the browser has a session"
        )
        page.goto(f"{url}/attack.html")
        page.wait_for_function("document.title === 'done'")
        told = page.evaluate("window.told")
        assert told["read"] == told["json"] == told["delete"] == told["events"] == "refused"
        assert told["simple"] in ("opaque0", "refused")
        frames = [frame for frame in page.frames if frame.parent_frame]
        assert len(frames) == 2 and not any(frame.query_selector("main") for frame in frames), "framed by nobody"
    assert master.get("/tasks/stats")["by_state"]["pending"] == 0
    assert [device["device_id"] for device in master.get("/devices")["devices"]] == ["shop-1"]
