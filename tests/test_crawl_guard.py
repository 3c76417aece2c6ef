"""Which addresses and ports may a crawl connect to? A canary listens on loopback and must never be connected to."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from crawl_site import Canary, Site, fetched, refused, reply, retried, run

from executors.web import addresses
from executors.web.addresses import Guard, Refused, literal_address, parse_address, why_not_public

CLOSED: dict[str, Any] = {"crawl_allow_networks": []}

# Every way to write loopback that some resolver takes for it.
SPELLINGS = (
    "127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0x7f000001", "2130706433", "0177.0.0.1", "017700000001", "127.0.0.1.",
    "127.255.255.254", "0.0.0.0", "0", "localhost", "localhost.", "LOCALHOST", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::127.0.0.1]",
    "[2002:7f00:1::]", "[2001:0:4136:e378:8000:63bf:80ff:fffe]", "[fe80::5efe:127.0.0.1]", "[64:ff9b:1::7f00:1]",
    "１２７.０.０.１", "①②⑦.⓪.⓪.①", "127。0。0。1", "ｌｏｃａｌｈｏｓｔ", "user@127.0.0.1", "example.com\\@127.0.0.1",
)  # fmt: skip

# One of each kind, and the edges of the nets.
NOT_PUBLIC = (
    "0.0.0.0", "0.255.255.255", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "100.127.255.255",
    "127.0.0.1", "168.63.129.16", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.0.192",
    "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1",
    "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1", "::808:808",
    "::ffff:0:7f00:1", "64:ff9b::a00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1", "2001:2::1",
    "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254",
    "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "2a00:1450::200:5efe:10.0.0.1", "4000::1", "8000::1",
)  # fmt: skip
PUBLIC = (
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
    "168.63.129.17", "172.15.255.255", "172.32.0.0", "192.167.255.255", "192.169.0.0", "223.255.255.255",
    "2606:4700::1111", "2a00:1450:4001::1", "240e::1", "64:ff9b::808:808", "::ffff:8.8.8.8",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_leaves_this_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a mistake in the guard lets through: no name but localhost is looked up, no address connected to."""
    look_up, connect, strangers = socket.getaddrinfo, socket.socket.connect, []

    def only_here(host: Any, *arguments: Any, **options: Any) -> Any:
        if literal_address(str(host)) is None and str(host).rstrip(".") != "localhost":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *arguments, **options)

    def only_loopback(self: socket.socket, where: Any) -> None:
        if not ipaddress.ip_address(where[0].partition("%")[0]).is_loopback:
            strangers.append(where)
            raise OSError("a test must not leave this machine")
        connect(self, where)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    monkeypatch.setattr(socket.socket, "connect", only_loopback)
    yield
    assert strangers == []


@pytest.mark.parametrize("text", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_known_as_one(text: str) -> None:
    assert why_not_public(parse_address(text))
    with pytest.raises(Refused):
        Guard().addresses(text, 80, 1)


@pytest.mark.parametrize("text", PUBLIC)
def test_a_public_address_is_allowed(text: str) -> None:
    assert why_not_public(parse_address(text)) is None


def test_what_ipaddress_itself_calls_private_is_never_public() -> None:
    for network, _ in addresses.REFUSED:
        for address in (network[0], network[-1]):
            assert why_not_public(address), address
    for first in range(256):
        for rest in ("0.0.0", "0.0.1", "168.0.1", "255.255.255", "64.0.0", "88.99.1"):
            address = ipaddress.ip_address(f"{first}.{rest}")
            if not address.is_global or address.is_multicast:
                assert why_not_public(address), address


@pytest.mark.parametrize("host", SPELLINGS)
def test_no_spelling_of_loopback_is_connected_to(canary: Canary, host: str) -> None:
    outcome = run(f"http://{host}:{canary.port}/", settings=CLOSED)
    assert outcome.outcome == "failed", outcome
    assert canary.connections() == 0
    # Not every resolver takes every spelling for an address; what is none is looked up, in vain.
    if outcome.retry:
        assert "was not found" in retried(outcome)
    else:
        assert "crawl_allow_networks" in refused(outcome) or "task_data.url" in refused(outcome)


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "127.1", "[::1]", "１２７.０.０.１"])
def test_the_sentence_says_what_is_refused_and_which_setting_lists_it(host: str) -> None:
    message = refused(run(f"http://{host}:8000/", settings=CLOSED))
    assert "loopback" in message and "crawl_allow_networks" in message


def test_the_outcome_of_a_refusal_is_named_refused(canary: Canary) -> None:
    assert run(f"http://127.0.0.1:{canary.port}/", settings=CLOSED).error_type == "Refused"


@pytest.mark.parametrize(
    "port", [1, 21, 22, 23, 25, 53, 81, 110, 139, 143, 445, 465, 587, 993, 1023, 2049, 6000, 6667, 10080]
)
def test_a_port_of_another_service_is_refused_also_in_a_listed_network(port: int) -> None:
    assert f"port {port} of" in refused(run(f"http://127.0.0.1:{port}/"))


@pytest.mark.parametrize("port", [80, 443, 1024, 3000, 5000, 8000, 8080, 8443, 9200, 65535])
def test_the_ports_of_the_web_are_allowed(port: int) -> None:
    Guard().check_target("http", "example.com", port)


def test_every_hop_of_a_redirect_is_judged(site: Site, canary: Canary) -> None:
    site.pages["/x"] = reply(b"", 302, Location=f"http://127.0.0.2:{canary.port}/")
    site.pages["/metadata"] = reply(b"", 302, Location="http://169.254.169.254/latest/meta-data/")
    site.pages["/file"] = reply(b"", 302, Location="file:///etc/passwd")
    only_one = {"crawl_allow_networks": ["127.0.0.1/32"]}
    assert "127.0.0.2 is loopback" in refused(run(site.url + "/x", settings=only_one))
    assert "169.254.169.254 is link-local" in refused(run(site.url + "/metadata"))
    assert "only http and https" in refused(run(site.url + "/file"))
    assert canary.connections() == 0


def test_robots_txt_is_fetched_by_the_same_rules(site: Site, canary: Canary) -> None:
    site.pages["/robots.txt"] = reply(b"", 302, Location=f"http://127.0.0.2:{canary.port}/robots.txt")
    site.pages["/x"] = reply(b"<title>t</title>")
    assert fetched(site.url + "/x", settings={"crawl_allow_networks": ["127.0.0.1/32"]})["title"] == "t"
    assert canary.connections() == 0


# --- names: the real resolver is not asked, this one answers


class Resolver:
    """socket.getaddrinfo for names that end in .test; a name's answers come one after the other, the last one stays."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.answers: dict[str, list[list[str]]] = {}
        self.asked: list[str] = []

    def __call__(self, host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if not str(host).endswith(".test"):
            return self._real(host, port, *arguments, **options)
        self.asked.append(host)
        if host not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = self.answers[host][0] if len(self.answers[host]) == 1 else self.answers[host].pop(0)
        return [info for address in found for info in self._real(address, port, type=socket.SOCK_STREAM)]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    resolver = Resolver(socket.getaddrinfo)
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    yield resolver


def test_a_name_that_rebinds_is_looked_up_once_and_the_checked_address_is_used(
    site: Site,
    canary: Canary,
    resolver: Resolver,
) -> None:
    port = int(site.host.rpartition(":")[2])
    # 127.0.0.1, which is listed, at the check; 127.0.0.2 ever after.
    resolver.answers["rebind.test"] = [["127.0.0.1"], ["127.0.0.2"]]
    site.pages["/x"] = reply(b"<title>checked</title>")
    settings = {"crawl_allow_networks": ["127.0.0.1/32"], "crawl_obey_robots": False}
    assert fetched(f"http://rebind.test:{port}/x", settings=settings)["title"] == "checked"
    assert resolver.asked == ["rebind.test"]
    assert site.requests[0][2]["Host"] == f"rebind.test:{port}"
    # A new connection is a new look-up and a new check.
    assert "127.0.0.2, which is loopback" in refused(run(f"http://rebind.test:{canary.port}/", settings=settings))
    assert canary.connections() == 0


def test_a_name_with_one_private_address_is_refused_whole(site: Site, resolver: Resolver) -> None:
    port = int(site.host.rpartition(":")[2])
    for answer in (["127.0.0.1", "10.0.0.1"], ["10.0.0.1", "127.0.0.1"], ["127.0.0.1", "::1"]):
        resolver.answers["mixed.test"] = [answer]
        assert "mixed.test has the address" in refused(run(f"http://mixed.test:{port}/"))
    assert site.requests == [] and site.robots_requests == 0


def test_a_name_without_an_address_is_tried_again(resolver: Resolver) -> None:
    assert "none.test was not found" in retried(run("http://none.test/"))


def test_a_look_up_that_hangs_ends_with_the_task(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(120) and [])
    try:
        outcome = run("http://slow.test/", timeout_seconds=0.2)
        assert "slow.test" in retried(outcome) and "took longer than" in retried(outcome)
        assert outcome.duration_seconds < 60
    finally:
        release.set()


def test_the_second_address_is_tried_where_the_first_does_not_answer(site: Site, resolver: Resolver) -> None:
    port = int(site.host.rpartition(":")[2])
    resolver.answers["two.test"] = [["127.0.0.3", "127.0.0.1"]]  # the site listens on 127.0.0.1 alone
    site.pages["/x"] = reply(b"<title>second</title>")
    assert fetched(f"http://two.test:{port}/x")["title"] == "second"


# --- with a proxy


def test_with_a_proxy_the_target_is_judged_by_what_its_name_says(canary: Canary) -> None:
    guard = Guard((), uses_proxy=True)
    guard.check_target("http", "example.com", 80)
    hosts = (
        "127.1",
        "0x7f.1",
        "2130706433",
        "[::1]",
        "localhost",
        "a.localhost",
        "router",
        "printer.local",
        "10.0.0.1",
    )
    for host in (*hosts, "metadata.google.internal", "localhost.", "169.254.169.254"):
        with pytest.raises(Refused):
            guard.check_target("http", host, 80)


def test_a_proxy_gets_the_requests_and_none_for_a_private_address(site: Site, canary: Canary) -> None:
    through = {"crawl_allow_networks": [], "crawl_proxy": site.url, "crawl_obey_robots": False}
    site.pages["http://example.com/x"] = reply(b"<title>by proxy</title>")
    assert fetched("http://example.com/x", settings=through)["title"] == "by proxy"
    assert "is loopback" in refused(run(f"http://127.0.0.1:{canary.port}/", settings=through))
    assert (len(site.requests), canary.connections()) == (1, 0)


def test_a_proxy_that_is_away_is_said_and_its_password_is_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        proxy = f"http://me:s3cret-word@127.0.0.1:{taken.getsockname()[1]}"
        message = retried(run("http://example.com/", settings={"crawl_proxy": proxy, "crawl_obey_robots": False}))
    assert "crawl_proxy" in message and "s3cret" not in message


def test_a_literal_is_read_as_the_resolver_reads_it() -> None:
    assert str(literal_address("0x7f.1")) == "127.0.0.1"
    assert str(literal_address("[::ffff:10.0.0.1]")) == "10.0.0.1"
    assert literal_address("example.com") is None
    assert literal_address("7-eleven.com") is None
