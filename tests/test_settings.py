"""Does every knob keep its word: default, unit, range, source, and one line for every mistake?"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import settings
from settings import MODES, ROOT, SETTINGS, ExitCode, Settings, SettingsError

GUIDE_DEFAULTS = {
    "port": 8000, "concurrent_tasks": 3, "task_timeout": 3600, "max_retry_count": 3, "dispatch_interval": 10,
    "load_balance_strategy": "least_tasks", "heartbeat_interval": 30, "timeout_check_interval": 60,
    "device_timeout": 300, "enable_monitoring": True,
}  # fmt: skip
GUIDE_KEYS = {*GUIDE_DEFAULTS, "mode", "device_id", "device_name", "host", "master_url", "api_key"}
KEY = "k3y-of-a-test-that-nobody-uses"


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(settings, "default_config_path", lambda mode: tmp_path / "none" / f"{mode}.json")
    for name in [name for name in os.environ if name.startswith("AF_")]:
        monkeypatch.delenv(name)


def write(folder: Path, content: object, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def load(mode: str = "master", **how: Any) -> Settings:
    """Without the machine's own variables and files."""
    return settings.load(mode, **{"environ": {}, **how})


def refusal(mode: str = "master", **how: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load(mode, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the table ----


def test_a_password_in_a_url_is_refused_without_being_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings.from_arguments("worker", ["--device-id", "a", "--master-url", "http://shop:long-word@10.0.0.1:8000"])
    said = capsys.readouterr().err
    assert "http://***@10.0.0.1:8000" in said and "long-word" not in said


def test_the_guides_keys_and_defaults_are_the_defaults() -> None:
    assert set(settings.GUIDE_KEYS) == GUIDE_KEYS
    assert {name: getattr(Settings(), name) for name in GUIDE_DEFAULTS} == GUIDE_DEFAULTS


def test_every_key_has_a_sentence_a_known_type_and_a_range_where_it_is_a_number() -> None:
    for setting in SETTINGS:
        assert setting.sentence.endswith("."), setting.name
        assert setting.type in VALUES, setting.name
        assert ((setting.minimum is not None) and (setting.maximum is not None)) == (setting.type in ("int", "float"))


def test_every_default_passes_its_own_check(tmp_path: Path) -> None:
    every = {setting.name: setting.default for setting in SETTINGS if setting.name != "mode"}
    loaded = load("standalone", config_path=write(tmp_path, every))
    assert loaded.port == 8000 and loaded.executors == ()


def test_settings_cannot_be_changed_after_the_start() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().port = 1  # type: ignore[misc]


@pytest.mark.parametrize("mode", MODES)
def test_the_shipped_config_files_hold_every_key_of_their_mode_with_its_default(mode: str) -> None:
    shipped = json.loads((ROOT / "config" / f"distribution_{mode}.json").read_text(encoding="utf-8"))
    assert set(shipped) == {setting.name for setting in SETTINGS if mode in setting.modes}
    assert set(shipped) >= GUIDE_KEYS
    own = {"mode", "device_id", "device_name", "api_key"}
    defaults = {setting.name: setting.default for setting in SETTINGS if mode in setting.modes}
    for name in set(shipped) - own:
        assert shipped[name] == (list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name]), name
    assert shipped["mode"] == mode


@pytest.mark.parametrize("mode", MODES)
def test_no_committed_config_file_holds_a_key(mode: str) -> None:
    """As committed: scripts/init_distribution.py writes a key into the working copy."""
    committed = ["git", "show", f"HEAD:config/distribution_{mode}.json"]
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    found = subprocess.run(committed, cwd=ROOT, capture_output=True, timeout=60, check=False)
    if found.returncode != 0:
        pytest.skip("not in a git repository")
    assert json.loads(found.stdout)["api_key"] == ""


# ---- where a value comes from ----


def test_a_flag_wins_over_the_environment_that_over_the_file_and_that_over_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, {"port": 1001})
    assert load().port == 8000
    assert load(config_path=path).port == 1001
    assert load(config_path=path, environ={"AF_PORT": "1002"}).port == 1002
    assert load(config_path=path, environ={"AF_PORT": "1002"}, flags={"port": "1003"}).port == 1003


VALUES: dict[str, tuple[str, object]] = {
    "str": ("text-1", "text-1"),
    "int": ("5000", 5000),
    "float": ("2.5", 2.5),
    "bool": ("false", False),
    "tuple[str, ...]": ("one,two", ("one", "two")),
    "tuple[dict[str, Any], ...]": ('[{"name": "user", "key": "username"}]', ({"name": "user", "key": "username"},)),
    "dict[str, str]": ('{"acme": "t0ken-of-a-test"}', {"acme": "t0ken-of-a-test"}),
}
OWN_TEXTS = {
    "mode": "standalone",
    "master_url": "http://10.0.0.1:9000",
    "appsflyer_url": "http://127.0.0.1:9001",
    "crawl_proxy": "http://127.0.0.1:9002",
    "load_balance_strategy": "mine:Choice",
    "backup_at": "04:15",
    "log_level": "DEBUG",
    "log_console_level": "ERROR",
}
SMALL = [
    "concurrent_tasks",
    "max_retry_count",
    "log_backup_count",
    "heartbeat_retention_days",
    "event_retention_days",
    "give_up_days",
]
OWN_NUMBERS = dict.fromkeys([*SMALL, "backup_keep", "max_event_streams", "crawl_host_connections"], "7")
NETWORKS = ("10.0.0.0/8", "fd00::/8")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_key_can_be_set_by_its_variable(setting: settings.Setting) -> None:
    text, expected = VALUES[setting.type]
    text = {**OWN_TEXTS, **OWN_NUMBERS}.get(setting.name, text)
    expected = OWN_TEXTS.get(setting.name, int(text) if setting.name in OWN_NUMBERS else expected)
    if setting.check is settings._check_networks:
        text, expected = ",".join(NETWORKS), NETWORKS
    if setting.is_path:
        paths = [str(ROOT / part) for part in (expected if isinstance(expected, tuple) else (expected,))]
        expected = tuple(paths) if setting.type.startswith("tuple") else paths[0]
    # An interval as short as 2.5 s beside it, because a device must not be silent for longer than its timeout.
    environ = {setting.variable: text, **({"AF_HEARTBEAT_INTERVAL": "2"} if setting.name == "device_timeout" else {})}
    assert getattr(load("standalone", environ=environ, starting=False), setting.name) == expected


def test_a_list_in_a_variable_may_be_json_or_separated_by_commas() -> None:
    assert load("standalone", environ={"AF_TAGS": "gpu, selectors"}).tags == ("gpu", "selectors")
    assert load("standalone", environ={"AF_TAGS": '["gpu", "selectors"]'}).tags == ("gpu", "selectors")


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load(environ={"AF_PORT": ""}).port == 8000


def test_a_flag_for_a_list_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = settings.from_arguments("standalone", ["--tags", "a,b", "--tags", "c"])
    assert found.tags == ("a", "b", "c")


def test_a_relative_path_starts_at_the_projects_folder_wherever_the_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(flags={"database": "x/y.db"}).database == str(ROOT / "x" / "y.db")
    assert load(flags={"database": str(tmp_path / "z.db")}).database == str(tmp_path / "z.db")


def test_a_variable_of_another_mode_is_no_mistake_because_one_environment_serves_all() -> None:
    assert load("worker", environ={"AF_DEVICE_ID": "d", "AF_DATABASE": "x.db"}).device_id == "d"


def test_a_misspelt_variable_is_refused_and_a_strangers_variable_is_not() -> None:
    assert refusal(environ={"AF_PROT": "1"}) == "AF_PROT: is no setting; did you mean AF_PORT?"
    assert refusal(environ={"AF_HEARTBEAT_INTERVALL": "1"}).endswith("did you mean AF_HEARTBEAT_INTERVAL?")
    assert load(environ={"AF_APPSFLYER_TOKEN": "of an executor"}).port == 8000


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.json"
    path.write_bytes(b"\xef\xbb\xbf" + '{"device_name": "店里的电脑"}'.encode())
    assert load(config_path=path).device_name == "店里的电脑"


# ---- what is refused ----

WRONG = [
    ("port", True, "whole number"),
    ("port", 80000, "from 0 to 65535"),
    ("port", -1, "from 0 to 65535"),
    ("port", 8000.0, "whole number"),
    ("port", "8000", "whole number"),
    ("port", None, "whole number"),
    ("port", 10**400, "whole number"),
    ("heartbeat_interval", 10**400, "a number"),
    ("heartbeat_interval", True, "a number"),
    ("heartbeat_interval", 0, "from 0.1 to 3600"),
    ("device_timeout", 30, "more than heartbeat_interval"),
    ("enable_monitoring", 1, "true or false"),
    ("enable_monitoring", "true", "true or false"),
    ("mode", "slave", "write master, worker, standalone"),
    ("log_level", "DEBUGG", 'did you mean "DEBUG"?'),
    ("load_balance_strategy", "least_task", 'did you mean "least_tasks"?'),
    ("device_id", "a b", "1 to 64"),
    ("device_id", "a" * 65, "1 to 64"),
    ("device_id", "店", "1 to 64"),
    ("device_id", "a\n", "without control signs"),
    ("device_name", "a\u0000b", "without control signs"),
    ("device_name", "a\ud800b", "without control signs"),
    ("host", "http://localhost", "address or a host name"),
    ("host", "localhost:8000", "address or a host name"),
    ("host", "", "address or a host name"),
    ("host", "999.1.1.1", "address or a host name"),
    ("master_url", "localhost:8000", "http://HOST:PORT"),
    ("master_url", "ftp://localhost", "http://HOST:PORT"),
    ("master_url", "http://user:word@localhost:8000", "http://HOST:PORT"),
    ("master_url", "http://localhost:8000/api", "http://HOST:PORT"),
    ("master_url", "http://localhost:99999", "http://HOST:PORT"),
    ("master_url", "http://:8000", "http://HOST:PORT"),
    ("database", "", "write a path"),
    ("allowed_hosts", ["http://x"], "host names"),
    ("tags", "one,two", "write a list"),
    ("tags", [1], "write a list"),
    ("tags", ["a b"], "64 tags"),
    ("pull_wait_seconds", 26, "from 0 to 25"),
    ("credentials", ["acme"], 'for instance {"name": "token"}'),
    ("credentials", {"acme": 7}, 'for instance {"name": "token"}'),
    ("credentials", {"": "t0ken-of-a-test"}, "names of 1 to 128"),
    ("credentials", {"acme": "short"}, 'the token of "acme" must be 8 to 8192'),
    ("credentials", {"acme": "two words in it"}, "without spaces"),
    ("credentials", {"acme": "your-token-here"}, "is an example"),
    ("appsflyer_url", "http://hq1.appsflyer.com", "write https://"),
    ("appsflyer_url", "https://hq1.appsflyer.com/api", "write https://HOST"),
]


@pytest.mark.parametrize(("key", "value", "advice"), WRONG)
def test_a_wrong_value_names_file_key_value_and_what_to_write(
    tmp_path: Path, key: str, value: object, advice: str
) -> None:
    path = write(tmp_path, {key: value})
    sentence = refusal("standalone", config_path=path)
    assert sentence.startswith(f"{path}: {key}") and advice in sentence
    assert len(sentence) < len(str(path)) + 300


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e400", "1_0", "３０", "0x10", "", " "])
def test_what_is_no_plain_number_is_refused_in_a_flag(word: str) -> None:
    assert refusal(flags={"dispatch_interval": word}).startswith("--dispatch-interval: dispatch_interval = ")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_what_is_no_finite_number_is_refused_in_a_file(tmp_path: Path, word: str) -> None:
    path = write(tmp_path, f'{{"dispatch_interval": {word}}}')
    assert refusal(config_path=path).startswith(str(path))


def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path, {"hearbeat_interval": 3})
    assert refusal(config_path=path).endswith('is no setting; take the line out; did you mean "heartbeat_interval"?')
    assert "did you mean" not in refusal(config_path=write(tmp_path, {"zzzz": 3}))


def test_a_key_of_another_mode_is_refused_in_a_file_and_says_whose_it_is(tmp_path: Path) -> None:
    sentence = refusal(config_path=write(tmp_path, {"mode": "master", "state_folder": "x"}))
    assert "is a setting of worker and standalone" in sentence


BAD_FILES = [
    ("", "is not JSON"),
    ("{", "is not JSON"),
    ("[1]", "holds a list"),
    ("null", "holds a NoneType"),
    ('{"port": 1, "port": 2}', "port: stands there more than once"),
    ("[" * 100000, "is not JSON"),
    ('{"port": ' + "9" * 6000 + "}", ": "),
    ('{"a": "' + "x" * 2**20 + '"}', "larger than 1 MiB"),
]


@pytest.mark.parametrize(("content", "advice"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_that_is_no_object_of_settings_is_one_clear_line(tmp_path: Path, content: str, advice: str) -> None:
    path = write(tmp_path, content)
    sentence = refusal(config_path=path)
    assert sentence.startswith(str(path)) and advice in sentence and len(sentence) < len(str(path)) + 400


def test_a_file_that_is_missing_a_folder_or_not_text_is_one_clear_line(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(config_path=tmp_path / "none.json")
    assert "cannot be read" in refusal(config_path=tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")
    assert "is not JSON" in refusal(config_path=tmp_path / "bytes")


def test_a_file_of_another_mode_is_refused_but_a_standalone_file_starts_all_three(tmp_path: Path) -> None:
    of_worker = write(tmp_path, {"mode": "worker"}, "worker.json")
    assert "this file is for the worker and cannot start a master" in refusal("master", config_path=of_worker)
    assert "cannot start a standalone" in refusal("standalone", config_path=of_worker)
    of_both = write(tmp_path, {"mode": "standalone", "database": "x.db", "state_folder": "y"}, "both.json")
    for mode in MODES:
        assert load(mode, config_path=of_both).mode == mode
    assert load("worker", config_path=of_both).device_id == "standalone"


def test_the_mode_of_the_environment_does_not_stop_what_a_standalone_starts() -> None:
    assert load("master", environ={"AF_MODE": "standalone"}).mode == "master"
    assert "a master is being started" in refusal("master", environ={"AF_MODE": "worker"})
    assert load("master", environ={"AF_MODE": "worker"}, flags={"mode": "master"}).mode == "master"


# ---- keys and names ----


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.10", "example.org"])
def test_a_host_that_others_can_reach_is_refused_without_a_key(host: str) -> None:
    assert "run python scripts/init_distribution.py" in refusal("standalone", flags={"host": host})
    assert load("standalone", flags={"host": host}, environ={"AF_API_KEY": KEY}).host == host
    assert load("master", flags={"host": host}).host == host  # it looks for a key in its database first


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert settings.is_loopback(host)
    assert load(flags={"host": host}).api_key == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "127.0.0.1.example.org", "localhost.example.org", "127.1"])
def test_only_loopback_is_loopback(host: str) -> None:
    assert not settings.is_loopback(host)


@pytest.mark.parametrize("key", ["your-secure-api-key-here", "changeme", "admin", "default_token", "ADMIN"])
def test_an_example_key_out_of_a_document_is_refused(key: str) -> None:
    sentence = refusal(environ={"AF_API_KEY": key})
    assert "everybody knows" in sentence and key not in sentence


@pytest.mark.parametrize("key", ["with space", "tab\t", "line\nend", "密钥", "nul\0"])
def test_a_key_that_a_header_cannot_carry_is_refused_without_showing_it(key: str) -> None:
    sentence = refusal(environ={"AF_API_KEY": key})
    assert "api_key = (hidden)" in sentence and key not in sentence


def test_a_worker_needs_a_device_id_and_a_standalone_has_one() -> None:
    assert "--device-id shop-7" in refusal("worker")
    assert load("worker", starting=False).device_id == ""
    assert load("worker", flags={"device_id": "shop-7"}).device_name == "shop-7"
    assert load("standalone").device_id == "standalone"


# ---- the command line ----


def ended(capsys: pytest.CaptureFixture[str], mode: str, argv: list[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        settings.from_arguments(mode, argv)
    out, err = capsys.readouterr()
    return int(str(int(caught.value.code or 0))), out, err


def test_a_mistake_on_the_command_line_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ended(capsys, "master", ["--port", "eighty"])
    assert (code, out) == (ExitCode.SETTINGS, "")
    assert err.startswith('--port: port = "eighty": write a whole number from 0 to 65535') and err.count("\n") == 1


def test_an_unknown_flag_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert 'did you mean "--device-id"?' in ended(capsys, "worker", ["--devise-id", "x"])[2]
    assert "a master has none" in ended(capsys, "master", ["--state-folder", "x"])[2]


def test_no_abbreviation_of_a_flag_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(capsys, "master", ["--por", "1"])[0] == ExitCode.SETTINGS


@pytest.mark.parametrize("argv", [["--api-key", KEY], [f"--api-key={KEY}"]])
def test_a_key_on_the_command_line_is_refused_and_not_repeated(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    code, _, err = ended(capsys, "master", argv)
    assert code == ExitCode.SETTINGS and "AF_API_KEY" in err and KEY not in err


def test_show_config_says_value_unit_and_source_and_never_the_key(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AF_DISPATCH_INTERVAL", "0.5")
    path = write(tmp_path, {"api_key": KEY, "task_timeout": 60})
    code, out, _ = ended(capsys, "master", ["--config", str(path), "--port", "0", "--show-config"])
    assert code == ExitCode.OK and KEY not in out
    lines = dict(line.split(" = ", 1) for line in out.splitlines())
    assert set(lines) == {setting.name for setting in SETTINGS if "master" in setting.modes}
    assert lines["port"] == "0 TCP port   [--port]"
    assert lines["dispatch_interval"] == "0.5 seconds   [AF_DISPATCH_INTERVAL]"
    assert lines["task_timeout"] == f"60 seconds   [{path}]"
    assert lines["max_retry_count"] == "3 retries   [default]"
    assert lines["api_key"].startswith("(hidden)")


def test_show_config_into_a_pipe_that_nobody_reads_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(ROOT / "worker.py"), "--show-config", "--device-id", "a"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (ExitCode.OK, "")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(capsys, "worker", ["--version"])[:2] == (0, f"af-distribution {settings.VERSION}\n")


def test_help_names_every_flag_of_the_mode_and_none_for_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    for mode in MODES:
        text = ended(capsys, mode, ["--help"])[1]
        for setting in SETTINGS:
            shown = re.search(rf"^ +{setting.flag} ", text, re.M) is not None
            assert shown == (mode in setting.modes and not setting.secret), (mode, setting.name)


def test_the_settings_of_a_process_do_not_show_the_key_when_printed() -> None:
    assert KEY not in repr(load(environ={"AF_API_KEY": KEY}))


def test_a_credential_is_shown_nowhere_not_even_where_it_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path, {"credentials": {"acme": KEY}})
    code, out, _ = ended(capsys, "worker", ["--config", str(path), "--device-id", "a", "--show-config"])
    assert code == ExitCode.OK and KEY not in out and "credentials = (hidden)" in out
    assert KEY not in repr(load("worker", config_path=path, starting=False))
    assert KEY not in refusal("worker", environ={"AF_CREDENTIALS": KEY})
    assert KEY not in refusal("worker", config_path=write(tmp_path, {"credentials": {"acme": KEY + " x"}}))


def test_it_runs_on_python_3_9_with_nothing_but_the_standard_library(tmp_path: Path) -> None:
    """The oldest Python on this machine that pyenv has; without one only this one's standard library is tried."""
    shutil.copy(ROOT / "settings.py", tmp_path)
    old = sorted(Path.home().glob(".pyenv/versions/3.9.*/bin/python"))
    program = "import settings; print(settings.load('worker', flags={'device_id': 'x'}, environ={}).device_id)"
    run = subprocess.run(
        [str(old[0]) if old else sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, '.'); {program}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (run.stdout, run.stderr) == ("x\n", "")


# ---- the log ----


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "new" / "folder" / "distribution.log"
    root = logging.getLogger()
    level, before = root.level, list(root.handlers)
    yield path
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()


def logged(path: Path, **values: Any) -> Settings:
    found = dataclasses.replace(Settings(), log_file=str(path), **values)
    settings.configure_logging(found)
    return found


def test_the_log_goes_to_its_file_and_to_stderr_in_one_line(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(log_file)
    logging.getLogger("master").info("start task=%d", 7)
    line = log_file.read_text(encoding="utf-8")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO     master: start task=7\n", line)
    out, err = capsys.readouterr()
    assert (out, err) == ("", line)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_only_its_owner_can_read_the_log_and_what_it_was_rotated_to(log_file: Path) -> None:
    logged(log_file, log_max_bytes=1024, log_backup_count=2)
    for number in range(200):
        logging.getLogger("x").info("line %d", number)
    files = sorted(log_file.parent.iterdir())
    assert [file.name for file in files] == ["distribution.log", "distribution.log.1", "distribution.log.2"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert all(file.stat().st_size <= 1024 for file in files)


@pytest.mark.parametrize("level", settings.LOG_LEVELS)
def test_each_of_the_five_levels_hides_what_is_below_it(log_file: Path, level: str) -> None:
    logged(log_file, log_level=level)
    for name in settings.LOG_LEVELS:
        logging.getLogger("x").log(logging.getLevelName(name), "said at %s", name)
    said = re.findall(r"said at (\w+)", log_file.read_text(encoding="utf-8"))
    assert said == list(settings.LOG_LEVELS[settings.LOG_LEVELS.index(level) :])


def test_the_console_may_be_quieter_than_the_file(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(log_file, log_console_level="WARNING")
    logging.getLogger("x").info("only in the file")
    logging.getLogger("x").warning("in both")
    assert log_file.read_text(encoding="utf-8").count("\n") == 2
    err = capsys.readouterr().err
    assert "in both" in err and "only in the file" not in err


def test_a_name_with_line_ends_cannot_forge_a_record(log_file: Path) -> None:
    logged(log_file)
    logging.getLogger("x").warning("device=%s", "a\r\n2026-01-01T00:00:00.000Z CRITICAL x: forged\u2028\x1b[2J")
    (line,) = log_file.read_text(encoding="utf-8").splitlines()
    assert r"a\r\n2026" in line and r"\u2028\x1b[2J" in line


def test_the_key_never_reaches_the_log_in_a_message_or_a_traceback(
    log_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logged(log_file, api_key=KEY)
    try:
        raise ValueError(f"Bearer {KEY} was refused")
    except ValueError:
        logging.getLogger("x").exception("with key %s", KEY)
    text = log_file.read_text(encoding="utf-8") + capsys.readouterr().err
    assert KEY not in text and "Bearer *** was refused" in text and "with key ***" in text


def test_a_credential_never_reaches_the_log(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(log_file, mode="worker", credentials={"acme": KEY})
    logging.getLogger("x").warning("with token %s", KEY)
    text = log_file.read_text(encoding="utf-8") + capsys.readouterr().err
    assert KEY not in text and "with token ***" in text


def test_a_second_set_up_replaces_the_first(log_file: Path) -> None:
    logged(log_file)
    logged(log_file)
    logging.getLogger("x").info("once")
    assert log_file.read_text(encoding="utf-8").count("once") == 1


def test_a_log_that_cannot_be_written_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        logged(tmp_path / "file" / "distribution.log")
    assert caught.value.code == ExitCode.SETTINGS
    err = capsys.readouterr().err
    assert err.startswith("log_file: ") and "cannot be written" in err and err.count("\n") == 1


SHARING = """
import dataclasses, logging, sys, settings
found = dataclasses.replace(settings.Settings(), log_file=sys.argv[1], log_max_bytes=20000, log_backup_count=900)
settings.configure_logging(found)
for number in range(2000):
    logging.getLogger(sys.argv[2]).info("record %s-%d.", sys.argv[2], number)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot rename a file that another process has open")
def test_two_processes_that_share_a_rotating_log_lose_no_record(tmp_path: Path) -> None:
    path = tmp_path / "shared.log"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", SHARING, str(path), name],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for name in ("one", "two")
    ]
    for writer in writers:
        _, err = writer.communicate(timeout=100)
        assert writer.returncode == 0 and b"Traceback" not in err
    text = "".join(file.read_text(encoding="utf-8") for file in tmp_path.iterdir())
    assert text.count("\n") == 4000
    assert set(re.findall(r"record (\w+-\d+)\.", text)) == {
        f"{name}-{n}" for name in ("one", "two") for n in range(2000)
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crawl_allow_networks", "lan"),
        ("crawl_allow_networks", "10.0.0.1/8"),
        ("crawl_allow_networks", "10.0.0.0/33"),
        ("crawl_proxy", "socks5://127.0.0.1:1080"),
        ("crawl_proxy", "127.0.0.1:3128"),
        ("crawl_proxy", "http://127.0.0.1:3128/path"),
        ("crawl_user_agent", " x"),
        ("crawl_user_agent", "a\u4e2d"),
    ],
)
def test_a_crawl_setting_that_cannot_work_stops_the_start(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}.*write"):
        load("worker", environ={f"AF_{name.upper()}": value}, starting=False)
