"""Does a stranger get a file, a request sent, or an order carried out that is not his?

Three catalogues of attacks against the real programs: paths that lead out of a folder; tasks and sites that want a
device to call somebody inside of its network; pages of others that use a browser's session. Where something must not be
called, a canary listens, and at the end nobody has called it. What a browser itself does is in tests/e2e.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from crawl_site import Canary, Site, raw, refused, reply, run
from farm import Master, Worker, farm, wait_for
from test_slow_clients import Patched

import openapi
from executors.web.addresses import REFUSED

KEY = "a-key-of-a-test-that-nobody-else-knows"
SECRET = "what nobody outside may read"
PATIENCE = 60.0


# ---- paths that lead out of a folder

OUT_OF_STATIC = (
    "../secret.txt", "/../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "%2e%2e%2fsecret.txt", "%252e%252e%252fsecret.txt",
    "..\\secret.txt", "..%5csecret.txt", "./../secret.txt", "app/../../secret.txt", "app%2f..%2f..%2fsecret.txt",
    "....//secret.txt", "..;/secret.txt", "..%00/secret.txt", "secret.txt%00.js", "%c0%ae%c0%ae/secret.txt",
    "..%c0%afsecret.txt", "%uff0e%uff0e/secret.txt", "．．/secret.txt", "link.txt", "folder/secret.txt", "folder%2fsecret.txt",
    "link.txt/", "./link.txt", "loop/link.txt", "{secret}", "/{secret}", "%2f{secret}", "file://{secret}", "",
)  # fmt: skip


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """A master whose folder of static files has links in it that lead out, and a secret beside it."""
    folder = tmp_path_factory.mktemp("guarded")
    static = folder / "static"
    (static / "app").mkdir(parents=True)
    (folder / "secret.txt").write_text(SECRET)
    (static / "index.html").write_text("the page")
    (static / "link.txt").symlink_to(folder / "secret.txt")
    (static / "folder").symlink_to(folder)
    (static / "loop").symlink_to(static)
    with farm() as started:
        master = Patched(folder, f"import pathlib, web\nweb.STATIC = pathlib.Path({str(static)!r})", api_key=KEY)
        started.append(master)
        yield master


def ask_raw(master: Master, path: str, **headers: str) -> tuple[int, bytes]:
    """The path as it stands: a proper client would tidy it up."""
    with socket.create_connection(("127.0.0.1", master.port), PATIENCE) as client:
        lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        response = http.client.HTTPResponse(client)
        response.begin()
        return response.status, response.read()


@pytest.mark.parametrize("name", OUT_OF_STATIC)
def test_no_path_and_no_link_leads_out_of_the_static_files(guarded: Master, name: str) -> None:
    path = name.replace("{secret}", str(guarded.folder / "secret.txt"))
    for prefix in ("/static/", "/"):
        status, content = ask_raw(guarded, prefix + path)
        assert SECRET.encode() not in content and b"Traceback" not in content
        assert status in (400, 404, 405) or (path in ("", "./") and content == b"the page"), (status, content)


def test_the_static_files_themselves_are_there(guarded: Master) -> None:
    assert ask_raw(guarded, "/") == (200, b"the page")


@pytest.mark.parametrize(
    "name", ["..%2f..%2fsecret.txt", "%2e%2e", "worker.pyz%2f..%2f..%2fsettings.py", "/etc/passwd"]
)
def test_no_path_leads_out_of_what_devices_download(guarded: Master, name: str) -> None:
    status, content = ask_raw(guarded, f"/edge/{name}")
    assert status in (400, 404, 405) and SECRET.encode() not in content and b"root:" not in content


def test_a_stored_file_that_became_a_link_is_a_lost_file(guarded: Master) -> None:
    """Whoever can write into the folder of the tasks' files still gets nothing out of another one."""
    guarded.register("shop-1")
    content = SECRET[::-1].encode()  # as many bytes as the secret has: the length alone tells nothing
    for name, lead_away in (("file", replace_by_link), ("folder", replace_folder_by_link)):
        guarded.submit_one("echo")
        [task] = guarded.pull("shop-1")
        query = {
            **{key: task[key] for key in ("assignment_id", "lease_id")},
            "device_id": "shop-1",
            "name": f"{name}.txt",
        }
        query["sha256"] = hashlib.sha256(content).hexdigest()
        kind = {"Content-Type": "application/octet-stream"}
        guarded.call("PUT", "/tasks/artifacts", params=query, data=content, headers=kind)
        [artifact] = guarded.get(f"/tasks/{task['id']}")["artifacts"]
        url = f"/tasks/{task['id']}/artifacts/{artifact['artifact_id']}"
        assert guarded.api("GET", url).content == content
        stored = next(Path(f"{guarded.settings['database']}.artifacts").glob(f"[0-9]*/*{name}.txt"))
        lead_away(stored, guarded.folder)
        answer = guarded.api("GET", url)
        assert answer.status_code in (404, 410) and SECRET not in answer.text


def replace_by_link(stored: Path, folder: Path) -> None:
    stored.unlink()
    stored.symlink_to(folder / "secret.txt")


def replace_folder_by_link(stored: Path, folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / stored.name).write_text(SECRET)
    for path in stored.parent.iterdir():
        path.unlink()
    stored.parent.rmdir()
    stored.parent.symlink_to(elsewhere)


# ---- tasks and sites that want a device to call somebody inside

HERE_ONLY = {"crawl_allow_networks": ["127.0.0.1/32"]}  # where the site is; the canary listens at 127.0.0.2


@pytest.fixture
def inside() -> Iterator[Canary]:
    canary = Canary(host="127.0.0.2")
    yield canary
    canary.close()


def redirect(location: str, status: int = 302) -> Any:
    return reply(b"", status, Location=location)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_ladder_of_redirects_leads_to_nobody_inside(site: Site, inside: Canary, status: int) -> None:
    """Each step is judged, however many good ones came before, and in whatever spelling it says where to go."""
    for step in range(1, 5):
        site.pages[f"/{step}"] = redirect(f"{site.url}/{step + 1}", status)
    targets = [
        f"http://127.0.0.2:{inside.port}/", f"//127.0.0.2:{inside.port}/", f"http://127.2:{inside.port}/",
        f"http://2130706434:{inside.port}/", f"http://0x7f000002:{inside.port}/", f"http://[::ffff:127.0.0.2]:{inside.port}/",
        f"http://user:pw@127.0.0.2:{inside.port}/", f"http:/\\127.0.0.2:{inside.port}/", f"http:\\\\127.0.0.2:{inside.port}/",
        f"\thttp://127.0.0.2:{inside.port}/", f"http://127.0.0.2:{inside.port}#@{site.host}/",
        f"http://{site.host}@127.0.0.2:{inside.port}/", f"https://127.0.0.2:{inside.port}/",
        f"gopher://127.0.0.2:{inside.port}/_x", f"ftp://127.0.0.2:{inside.port}/", "file:///etc/passwd",
        f"jar:http://127.0.0.2:{inside.port}!/", f"source:http://127.0.0.2:{inside.port}/", "data:text/html,<title>x</title>",
    ]  # fmt: skip
    for target in targets:
        site.pages["/5"] = redirect(target, status)
        outcome = run(site.url + "/1", settings=HERE_ONLY)
        assert outcome.outcome == "failed" or outcome.result["final_url"].startswith(site.url + "/"), target
        assert inside.connections() == 0, target


def test_what_a_page_names_besides_its_links_is_not_fetched(site: Site, inside: Canary) -> None:
    """A browser would; and a robots.txt or a sitemap that names somebody inside is as much of a stranger's text."""
    away = f"http://127.0.0.2:{inside.port}"
    page = (
        f'<base href="{away}/"><meta http-equiv="refresh" content="0;url={away}/"><link rel=stylesheet href="{away}/x.css">'
        f'<img src="{away}/x.png"><script src="{away}/x.js"></script><iframe src="{away}"></iframe><title>t</title>'
    )
    site.pages["/x"] = reply(page.encode(), Refresh=f"0;url={away}/", Link=f"<{away}/x.css>; rel=preload")
    assert run(site.url + "/x", settings=HERE_ONLY).outcome == "completed"
    site.pages["/robots.txt"] = reply(f"Sitemap: {away}/sitemap.xml\n".encode(), Content_Type="text/plain")
    entities = (
        f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "{away}/e"><!ENTITY f SYSTEM "file:///etc/passwd">]>'
    )
    site.pages["/sitemap.xml"] = reply(f"{entities}<urlset><url><loc>&e;&f;</loc></url></urlset>".encode())
    for sitemap in (True, site.url + "/sitemap.xml", away + "/sitemap.xml"):
        run(site.url + "/x", settings=HERE_ONLY, sitemap=sitemap)
    assert inside.connections() == 0


def test_no_spelling_of_ipv6_loopback_is_connected_to() -> None:
    try:
        canary = Canary(socket.AF_INET6, "::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    closed: dict[str, Any] = {"crawl_allow_networks": []}
    spellings = (
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "[0000::0001]",
        "[::0.0.0.1]",
        "[::1%25lo]",
        "[::]",
        "ip6-localhost",
        "localhost",
    )
    for host in spellings:
        assert run(f"http://{host}:{canary.port}/", settings=closed).outcome == "failed", host
    assert canary.connections() == 0
    canary.close()


def test_every_network_that_is_refused_is_refused_at_both_of_its_ends() -> None:
    closed: dict[str, Any] = {"crawl_allow_networks": [], "crawl_obey_robots": False}
    for network, _ in REFUSED:
        for address in {network[0], network[-1]}:
            host = f"[{address}]" if network.version == 6 else str(address)
            assert refused(run(f"http://{host}/", settings=closed)), address


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """A real master and a real worker, whose owner lets it crawl 127.0.0.1 and no more."""
    folder = tmp_path_factory.mktemp("fleet")
    with farm() as started:
        master = Master(folder)
        started.append(master)
        started.append(Worker(master.url, folder, "shop-1", concurrent_tasks=8, **HERE_ONLY))
        yield master


def test_a_hostile_site_gets_a_real_worker_to_call_nobody(fleet: Master, site: Site, inside: Canary) -> None:
    away = f"http://127.0.0.2:{inside.port}/"
    bomb = gzip.compress(bytes(50_000_000))
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    )
    site.pages["/away"] = redirect(away)
    site.pages["/file"] = redirect("file:///etc/passwd")
    site.pages["/bomb"] = raw(head.encode() + bomb)
    site.pages["/drip"] = site.drip(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<title>", b"a")
    site.pages["/links"] = reply(f'<a href="{away}1"></a><a href="//127.0.0.2:{inside.port}/2"></a>'.encode())
    hopeless = [away, f"http://2130706434:{inside.port}/", f"http://[::ffff:127.0.0.2]:{inside.port}/", "file:///etc/passwd",
                f"{site.url}/away", f"{site.url}/file", f"{site.url}/bomb"]  # fmt: skip
    for url in hopeless:
        fleet.submit_one("crawl", batch="hopeless", task_data={"url": url})
    # A task cannot widen what its device may do.
    widened = {"url": away, "crawl_allow_networks": ["0.0.0.0/0"]}
    assert fleet.api("POST", "/tasks", {"task_type": "crawl", "task_data": widened}).status_code in (201, 422)
    follow = {"url": f"{site.url}/links", "follow": {"same_host": False}}
    fleet.submit_one("crawl", batch="links", task_data=follow)
    fleet.submit_one(
        "crawl", batch="drip", max_retry_count=0, task_data={"url": f"{site.url}/drip", "timeout_seconds": 0.5}
    )
    wait_for("the refusals", lambda: fleet.states("hopeless") == {"failed": len(hopeless)})
    wait_for("the links", lambda: fleet.states("links") == {"completed": 1, "failed": 2})
    wait_for("the end of the drip", lambda: fleet.states("drip") == {"failed": 1})
    assert inside.connections() == 0
    site.pages["/x"] = reply(b"<title>t</title>")
    fleet.submit_one("crawl", batch="after", task_data={"url": f"{site.url}/x"})
    wait_for("honest work after it", lambda: fleet.states("after") == {"completed": 1})


# ---- pages of others, and callers who say that they are somebody else

FOREIGN = (
    {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://127.0.0.1"},
    {"Origin": "{url}.evil.example"}, {"Origin": "{url}", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "{url}", "Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "none"}, {"Referer": "{url}/"}, {},
)  # fmt: skip


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    with farm() as started:
        master = Master(tmp_path_factory.mktemp("locked"), api_key=KEY)
        started.append(master)
        yield master


@pytest.fixture(scope="module")
def cookie(locked: Master) -> dict[str, str]:
    entered = requests.post(f"{locked.url}{openapi.PREFIX}/login", json={"key": KEY}, timeout=PATIENCE)
    return {"Cookie": entered.headers["Set-Cookie"].partition(";")[0]}


def routes(master: Master) -> list[tuple[str, str]]:
    paths = master.get("/openapi.json")["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods if method in METHODS]


METHODS = ("get", "post", "put", "delete", "patch")


def test_no_page_of_another_site_writes_with_a_browsers_session(locked: Master, cookie: dict[str, str]) -> None:
    """Every route that changes something, with every way in which a browser says that a page is not ours."""
    writing = [
        (method, path)
        for method, path in routes(locked)
        if method != "GET" and not path.endswith(("/login", "/logout"))
    ]
    assert len(writing) > 20
    before = locked.get("/tasks/stats")["by_state"]
    for method, path in writing:
        url = locked.url + path.replace("{", "").replace("}", "")
        for headers in FOREIGN:
            said = {name: value.replace("{url}", locked.url) for name, value in headers.items()}
            answer = locked.session.request(
                method, url, json={"task_type": "x"}, headers={**cookie, **said}, timeout=PATIENCE
            )
            assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin"), (method, path, headers)
    assert locked.get("/tasks/stats")["by_state"] == before


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_a_form_of_any_kind_is_no_order(locked: Master, cookie: dict[str, str], kind: str) -> None:
    headers = {**cookie, "Origin": locked.url, "Content-Type": kind}
    url = f"{locked.url}{openapi.PREFIX}/tasks"
    answer = requests.post(url, data=b'{"task_type": "x"}', headers=headers, timeout=PATIENCE)
    assert (answer.status_code, answer.json()["code"]) == (415, "not_json")


def test_an_open_master_takes_no_orders_from_a_page_of_another_site(fleet: Master) -> None:
    """Without a key there is no session to use: whoever reaches the address is let in, but for strangers' pages."""
    for headers in (
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "rebound.evil.example"},
    ):
        answer = fleet.api("POST", "/tasks", {"task_type": "x"}, headers=headers)
        assert answer.status_code == 403, headers
    assert fleet.get("/tasks?task_type=x")["tasks"] == []


def test_no_reply_gives_another_site_leave_to_read_it_or_to_frame_it(locked: Master, cookie: dict[str, str]) -> None:
    asks = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for method, path in [*routes(locked), ("GET", "/"), ("GET", "/static/app.js"), ("GET", "/no/such/path")]:
        for verb in ("OPTIONS", method if method == "GET" and not path.endswith("/events") else "OPTIONS"):
            url = locked.url + path.replace("{", "").replace("}", "")
            answer = locked.session.request(verb, url, headers={**cookie, **asks}, timeout=PATIENCE)
            assert not [name for name in answer.headers if name.lower().startswith("access-control-")], (verb, path)
            policy = answer.headers["Content-Security-Policy"]
            assert "frame-ancestors 'none'" in policy and "unsafe" not in policy and "*" not in policy
            assert "default-src 'none'" in policy and "base-uri 'none'" in policy and "form-action 'self'" in policy
            assert answer.headers["X-Frame-Options"] == "DENY" and answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_wrong_keys_are_counted_by_the_socket_whatever_the_headers_say(locked: Master) -> None:
    codes = []
    for number in range(15):
        names = ("X-Forwarded-For", "X_Forwarded_For", "X-Real-IP", "Forwarded", "CF-Connecting-IP")
        spoofed = dict.fromkeys(names, f"203.0.113.{number}")
        answer = locked.api("GET", "/devices", headers={"Authorization": "Bearer wrong", **spoofed})
        codes.append(answer.status_code)
    assert codes == [401] * 10 + [429] * 5
    assert locked.api("GET", "/devices").status_code == 200, "the right key still works"
