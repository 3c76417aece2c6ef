"""Which parts of the documents are made from the code, and are they fresh?

    python scripts/make_docs.py            writes docs/settings.md, docs/api.md and the made parts of docs/design.md
    python scripts/make_docs.py --check    changes nothing; ends with 1 and names what is stale

docs/design.md is written by hand except between its marks `<!-- made: NAME -->` and `<!-- end -->`. Needs what the
master needs (requirements.txt), because the route table is taken from the master's own modules.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import access
import api
import db
import openapi
import settings

ROOT = settings.ROOT
MADE = "<!-- Made by scripts/make_docs.py from {}; edit that, then run `make docs`. -->\n\n"
MODE_LETTERS = {"master": "M", "worker": "W", "standalone": "S"}
ORIGIN_OF_VALUES = (
    "A value comes from, in this order: a flag (`--port 8000`), the environment (`AF_PORT=8000`; an empty variable"
    " counts as not set), the config file (`config/distribution_<mode>.json`, or `--config FILE`), the default. An"
    " unknown key, a wrong type or a value out of range stops the start with one line that says what to write."
    " `--show-config` prints the effective values and where each comes from, without secrets. Relative paths start at"
    ' the folder of settings.py. A list is written `["one", "two"]` in a file, `one,two` in a flag or variable.\n'
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


# ---- docs/settings.md ----


def settings_page() -> str:
    groups = (
        ("The guide's keys", lambda row: row.name in settings.GUIDE_KEYS),
        ("Ours", lambda row: row.name not in settings.GUIDE_KEYS),
    )
    text = "# Settings\n\n" + MADE.format("settings.py") + ORIGIN_OF_VALUES
    text += "\nM, W, S: the modes (master, worker, standalone) that use the key and whose files may carry it.\n"
    for title, belongs in groups:
        rows = [setting_row(row) for row in settings.SETTINGS if belongs(row)]
        text += f"\n## {title}\n\n" + table(("key", "default", "unit", "may be", "modes", "what it is"), rows)
    codes = [(str(int(code)), code.name.lower(), EXIT_CODES[code]) for code in settings.ExitCode]
    text += "\n## Exit codes\n\n" + table(("code", "name", "when"), codes)
    return text + "\nA second Ctrl-C ends a program at once, with 130.\n"


EXIT_CODES = {
    settings.ExitCode.OK: "Stopped in good order, or the command did what it was asked for.",
    settings.ExitCode.UNREACHABLE: "No master answers, an export or a crawl was cut off, or --doctor found a fault.",
    settings.ExitCode.SETTINGS: "A setting, a flag or an input file is wrong; the line says what to write.",
    settings.ExitCode.CONFLICT: "Another process runs under this device id.",
    settings.ExitCode.DATABASE_BAD: "The database is not ours, empty, corrupt or cannot be written.",
    settings.ExitCode.DATABASE_IN_USE: "Another process holds the database.",
    settings.ExitCode.DATABASE_NEWER: "A newer version made this database.",
    settings.ExitCode.PORT_IN_USE: "Another program listens on the port.",
    settings.ExitCode.REFUSED: "The master refuses the key or the protocol.",
    settings.ExitCode.DISK_FULL: "The disk has no room for a start, a backup or a restore; nothing is lost.",
    settings.ExitCode.NETWORK_FILESYSTEM: "The database lies across a network (NFS, SMB and the like).",
}


def setting_row(row: settings.Setting) -> tuple[str, ...]:
    default = row.default
    is_json = default in ("", (), {}) or row.type in ("bool", "tuple[dict[str, Any], ...]")
    shown = json.dumps(default) if is_json else default
    allowed = ", ".join(row.choices)
    if row.minimum is not None and row.maximum is not None:
        allowed = f"{row.minimum:.15g} to {row.maximum:.15g}"
    modes = " ".join(MODE_LETTERS[mode] for mode in row.modes)
    sentence = row.sentence + (" Secret: it has no flag." if row.secret else "")
    return f"`{row.name}`", f"`{shown}`", row.unit, allowed, modes, sentence


# ---- docs/api.md ----


class NoHandlers:
    """Stands in for the Api where only the route table is asked for."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda call: None


def api_page() -> str:
    tables = api.routes(cast(api.Api, NoHandlers()))
    (prefix, below), (_, at_root) = tables
    operations = [route.operation for route in below]
    document = openapi.build(operations, version=settings.VERSION)
    text = "# HTTP API\n\n" + MADE.format("api.py, openapi.py and wire.py")
    text += (
        f"Everything is below `{prefix}`; `GET {prefix}/openapi.json` gives the same as an OpenAPI 3.1 document, with"
        " the replies. Send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`; a browser trades it for a cookie"
        " at `/login`. No key is needed only while no `api_key` is configured, no admin key was ever made, and the"
        " master listens on loopback. The config's `api_key` is an admin key. Errors are `application/problem+json`"
        " with a stable `code`, a `detail` that says what to do and, where it applies, the `field`. Moments are text"
        " such as `2026-11-25T13:59:07.123Z`, UTC.\n\n## Routes\n\n"
    )
    text += route_table(operations) + "\n## At the root\n\n" + route_table([route.operation for route in at_root])
    text += "\n## Who may do what\n\n" + MATRIX + role_matrix([route.operation for _, some in tables for route in some])
    text += "\n## Query parameters\n\n" + table(("route", "parameters"), query_rows(operations))
    text += "\n## Request bodies\n\nA star marks what is required.\n"
    for name in request_types(operations):
        schema = document["components"]["schemas"].get(name)
        if schema and schema.get("properties"):
            users = [f"`{op.method} {op.path}`" for op in operations if name in names_of(op.request)]
            where = f"{', '.join(users)}. " if users else ""
            text += f"\n### {name}\n\n{where}{first_line(schema.get('description', ''))}\n\n"
            text += table(("field", "is"), field_rows(schema))
    return text


def route_table(operations: Sequence[openapi.Operation]) -> str:
    rows = [(op.method, f"`{op.path}`", op.role, op.summary, str(op.status)) for op in operations]
    return table(("method", "path", "role", "what", "answers"), rows)


MATRIX = (
    "Each of viewer, submitter, operator and admin may do what the one before it may. A device's token is for that"
    " device alone: `403 not_your_device` for every other. An enroll key registers devices, so often and so long as it"
    " says. Routes for devices take keys in headers and no browser's session. Events of the kind `access` are for"
    " admins. `none` is somebody without a key. tests/test_roles.py asks a real master for every cell.\n\n"
)


def role_matrix(operations: Sequence[openapi.Operation]) -> str:
    """Every route, and which roles may use it."""
    head = ("route", "none", *access.ROLES)
    rows = [
        (f"`{op.method} {op.path}`", *("yes" if may else "" for may in who_may(op.role).values())) for op in operations
    ]
    return table(head, rows)


def who_may(role: str) -> dict[str, bool]:
    return {"none": role == access.PUBLIC, **{name: name in access.holders(role) for name in access.ROLES}}


def query_rows(operations: Sequence[openapi.Operation]) -> list[tuple[str, str]]:
    return [
        (
            f"`{op.method} {op.path}`",
            ", ".join(f"`{query.name}`" + (" (required)" if query.is_required else "") for query in op.query),
        )
        for op in operations
        if op.query
    ]


def names_of(request: Any) -> list[str]:
    kinds = request if isinstance(request, tuple) else (request,)
    return [kind.__name__ for kind in kinds if hasattr(kind, "__name__")]


def request_types(operations: Sequence[openapi.Operation]) -> list[str]:
    """The types of bodies in the order of the table, each followed by those it holds."""
    inner = {
        "RegisterIn": ["Holding"],
        "ReportsIn": ["ReportIn", "ArtifactIn"],
        "ActionIn": ["FilterIn"],
        "LimitsIn": ["LimitIn"],
    }
    found: list[str] = []
    for operation in operations:
        for name in names_of(operation.request):
            found += [name, *inner.get(name, ())]
    return list(dict.fromkeys(found))


def field_rows(schema: dict[str, Any]) -> list[tuple[str, str]]:
    required = schema.get("required", ())
    return [
        (f"`{name}`" + (" *" if name in required else ""), describe(part))
        for name, part in schema["properties"].items()
    ]


def describe(part: dict[str, Any]) -> str:
    """A field's own sentence, or the types that it may have."""
    if "anyOf" in part:
        return describe(next(one for one in part["anyOf"] if one.get("type") != "null")) + default_of(part)
    if "$ref" in part:
        return part["$ref"].rpartition("/")[2]
    if "description" in part:
        return first_line(part["description"]) + default_of(part)
    if part.get("type") == "array":
        return f"a list of {describe(part.get('items', {}))}"
    if "enum" in part:
        return " or ".join(f"`{value}`" for value in part["enum"]) + default_of(part)
    return str(part.get("type", "any JSON")) + default_of(part)


def default_of(part: dict[str, Any]) -> str:
    default = part.get("default")
    return (
        "" if default in (None, "", [], {}) else f"; {str(default).lower() if isinstance(default, bool) else default}"
    )


def first_line(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


# ---- docs/design.md: the parts between marks ----


def transitions_part() -> str:
    rows = [(f"`{verb}`", ", ".join(old) or "(new)", ", ".join(new)) for verb, (old, new) in db.TRANSITIONS.items()]
    glosses = dict(re.findall(r"^  (\w+)  +(\S.*)$", str(db.__doc__), re.MULTILINE))
    states = [(f"`{state}`", re.sub(r"\s{2,}", " ", glosses[state])) for state in db.STATES]
    drawing = str(db.__doc__).partition("\n\n")[2].partition("\n\n  scheduled   ")[0]
    tables = table(("state", "meaning"), states) + "\n" + table(("verb", "from", "to"), rows)
    return f"```\n{drawing}\n```\n\n{tables}"


def house_part() -> str:
    """File, question, imports; the import table is the one that tests/test_house.py holds."""
    house = import_table(ROOT / "tests" / "test_house.py")
    rows = []
    for name, (allowed, why) in house.items():
        names = " ".join(f"`{one}`" for one in allowed.split()) or "nothing"
        rows.append((f"{name}.py", question_of(ROOT / f"{name}.py"), names, why))
    return table(("file", "question", "may import, besides the standard library", "because"), rows)


def import_table(path: Path) -> dict[str, tuple[str, str]]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "HOUSE":
            assert node.value is not None
            return cast("dict[str, tuple[str, str]]", ast.literal_eval(node.value))
    raise SystemExit(f"{path} has no table HOUSE")


def question_of(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


PARTS: dict[str, Callable[[], str]] = {"house": house_part, "transitions": transitions_part}


def design_page(old: str) -> str:
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- made: {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
        if not pattern.search(old):
            raise SystemExit(f"docs/design.md lacks the marks <!-- made: {name} --> and <!-- end -->")
        made = make()
        old = pattern.sub(lambda match, made=made: match[1] + "\n" + made + "\n" + match[3], old)  # type: ignore[misc]
    return old


def pages() -> dict[Path, str]:
    docs = ROOT / "docs"
    design = docs / "design.md"
    return {
        docs / "settings.md": settings_page(),
        docs / "api.md": api_page(),
        design: design_page(design.read_text(encoding="utf-8")),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the documents that come from the code.")
    parser.add_argument("--check", action="store_true", help="change nothing; end with 1 when a document is stale")
    arguments = parser.parse_args(argv)
    made = pages()
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if arguments.check:
        if stale:
            print(f"stale: {names}; run make docs (python scripts/make_docs.py)", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(made[path], encoding="utf-8")
    print(f"written: {names}" if stale else "everything was fresh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
