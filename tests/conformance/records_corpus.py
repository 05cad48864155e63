"""Replays the records corpus: list and view requests, over HTTP, against the running program.

A corpus is a folder with ``cases.json`` and ``rules.json``; the data is always that of
``tests/rules-corpus`` and ``tests/records-corpus``, whose READMEs document both.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import psycopg

from pgrealtime.config.model import (
    CollectionConfig,
    Config,
    DatabaseConfig,
    HiddenFieldsMode,
    RecordsConfig,
    ServerConfig,
)
from pgrealtime.service.build import run_service
from tests.conformance import rules_corpus
from tests.conformance.http_client import Address, Answer, Request, send
from tests.conformance.issuers import auth_config, signed_token
from tests.lacking import lacking

CORPUS = Path(__file__).parent.parent / "records-corpus"

Case: TypeAlias = Mapping[str, Any]
RuleSet: TypeAlias = Mapping[str, list[str | None]]

READ_ONLY = ("stats",)
"""Collections over views."""
ORDERS = {"items": ("created",)}
"""Rows of other collections were inserted in the order of their ids."""


@dataclass(slots=True)
class Report:
    """Results of a corpus run."""

    right: list[str] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)
    """Cases that differ and are listed with the reason."""
    wrong: list[str] = field(default_factory=list)
    """Other cases that differ, one line each."""

    def add(self, other: Report) -> None:
        """Add the results of another run."""
        self.right += other.right
        self.excused += other.excused
        self.wrong += other.wrong

    def __str__(self) -> str:
        counts = f"{len(self.right)} right, {len(self.excused)} excused, {len(self.wrong)} wrong"
        return "\n".join([counts, *self.wrong])


def read(folder: Path, name: str) -> Any:
    """Return a file of a corpus; what a folder lacks is taken from ours."""
    path = folder / name
    return json.loads((path if path.exists() else CORPUS / name).read_text(encoding="utf-8"))


def load(database_url: str) -> None:
    """Load the data into an empty database."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute((rules_corpus.CORPUS / "schema.sql").read_bytes())
        connection.execute((CORPUS / "extra.sql").read_bytes())


@asynccontextmanager
async def serving(
    database_url: str, folder: Path, rules: RuleSet, *, hidden: HiddenFieldsMode = "pocketbase"
) -> AsyncIterator[Address]:
    """Run the program on the corpus's data, under one of its rule sets."""
    described = {one["name"]: one for one in read(folder, "schema.json")["collections"]}
    config = Config(
        database=DatabaseConfig(url=database_url),
        server=ServerConfig(host="127.0.0.1", port=0),
        records=RecordsConfig(nulls="zero", hidden=hidden),
        auth=auth_config(name for name, one in described.items() if one["kind"] == "auth"),
        collections={name: _configured(one, rules) for name, one in described.items()},
    )
    async with run_service(config) as service:
        yield Address(host="127.0.0.1", port=service.port)


def _configured(described: Mapping[str, Any], rules: RuleSet) -> CollectionConfig:
    name = described["name"]
    list_rule, view_rule = rules.get(name, ["", ""])
    return rules_corpus.configured(described).model_copy(
        update={
            "collection_id": described["id"],
            "list_rule": list_rule,
            "view_rule": view_rule,
            "manage_rule": rules.get(f"{name}:manage"),
            "stream": name not in READ_ONLY,
            "id": "id" if name in READ_ONLY else "",
            "order": ORDERS.get(name, ()),
        }
    )


def token_of(caller: str) -> str:
    """Return the token of a caller, empty for a guest."""
    if caller == "guest":
        return ""
    if caller == "superuser":
        return signed_token("users", "root", role="admin")
    collection, record_id = caller.split("/")
    return signed_token(collection, record_id)


_TOKEN = re.compile(r"\{(superuser|\w+/\w+)\}")


def request_of(case: Case, number: int) -> Request:
    """Return a case's request, from an address of its own: answers to guesses are delayed."""
    asked = case["request"]
    headers = dict(asked.get("headers", {}))
    filled = {
        name: _TOKEN.sub(lambda found: token_of(found[1]), value) for name, value in headers.items()
    }
    if "Authorization" not in filled and (own := token_of(asked["as"])):
        filled["Authorization"] = own
    return Request(
        method=asked["method"],
        path=_TOKEN.sub(lambda found: token_of(found[1]), asked["path"]),
        headers=filled,
        body=asked.get("body", "").encode(),
        source_ip=f"127.1.{number // 250 % 250}.{number % 250 + 1}",
    )


async def replay(address: Address, cases: Iterable[Case], excuses: Mapping[str, str]) -> Report:
    """Send each case and compare; ``excuses`` are reasons by tag or name of a case."""
    report = Report()
    for number, case in enumerate(cases):
        answer = await send(request_of(case, number), address)
        difference = difference_of(case, answer)
        if difference is None:
            report.right.append(case["name"])
        elif any(key in excuses for key in _keys_of(case)):
            report.excused.append(case["name"])
        else:
            asked = case["request"]
            report.wrong.append(
                f"{case['name']} {case['rules']} {asked['as']} {asked['method']} {asked['path']}: "
                f"{difference}"
            )
    return report


async def replay_sdk(address: Address, cases: Sequence[Case], excuses: Mapping[str, str]) -> Report:
    """Make the calls of the cases with the official SDK, and compare what it sent and returned."""
    calls = [{**case["sdk"], "token": token_of(case["sdk"]["as"])} for case in cases]
    node = shutil.which("node") or lacking("no Node")
    process = await asyncio.create_subprocess_exec(
        node,
        str(Path(__file__).with_name("sdk_reads.mjs")),
        f"http://{address.host}:{address.port}",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate(json.dumps(calls).encode())
    report = Report()
    for case, result in zip(cases, json.loads(output), strict=True):
        difference = sdk_difference(case, result)
        if difference is None:
            report.right.append(case["name"])
        elif any(key in excuses for key in _keys_of(case)):
            report.excused.append(case["name"])
        else:
            report.wrong.append(f"{case['name']} {case['sdk']}: {difference}")
    return report


def _keys_of(case: Case) -> tuple[str, ...]:
    return case["name"], f"order:{case.get('order')}", *case["tags"]


# --- comparison


def difference_of(case: Case, answer: Answer) -> str | None:
    """Return how an answer differs from the recorded one; None if it doesn't."""
    wanted = case["response"]
    if answer.head.status != wanted["status"]:
        return f"status {answer.head.status}, wanted {wanted['status']}: {answer.body[:200]!r}"
    for name, value in wanted.get("headers", {}).items():
        if answer.head.header(name) != value:
            return f"header {name} {answer.head.header(name)!r}, wanted {value!r}"
    text = answer.body.decode()
    if text == wanted["body"]:
        return None
    try:
        got, expected = json.loads(text), json.loads(wanted["body"])
    except ValueError:
        return f"{text[:300]!r}, wanted {wanted['body'][:300]!r}"
    return json_difference(case, got, expected)


def sdk_difference(case: Case, result: Mapping[str, Any]) -> str | None:
    """Return how a call's result differs from the recorded one; None if it doesn't."""
    wanted = case["response"]
    if result["requests"] != wanted["requests"]:
        return f"sent {result['requests']}, wanted {wanted['requests']}"
    if "error" in wanted or "error" in result:
        same = result.get("error") == wanted.get("error")
        return None if same else f"{result.get('error')}, wanted {wanted.get('error')}"
    got, expected = result["value"], wanted["value"]
    if isinstance(expected, list):
        got, expected = {"items": got}, {"items": expected}
    return json_difference(case, got, expected)


def json_difference(case: Case, got: Any, expected: Any) -> str | None:
    """Return how two values differ, where the case says that an order is open."""
    got, expected = _normalized(got), _normalized(expected)
    if isinstance(expected, dict) and isinstance(got, dict) and "items" in expected:
        got_items, wanted_items = got.pop("items", None), expected.pop("items")
        if got != expected:
            return f"{got}, wanted {expected}"
        return _items_difference(case, got_items, wanted_items)
    return None if got == expected else f"{_text(got)}, wanted {_text(expected)}"


def _items_difference(case: Case, got: Any, wanted: list[Any]) -> str | None:
    if not isinstance(got, list) or len(got) != len(wanted):
        return f"{_text(got)}, wanted {_text(wanted)}"
    match case.get("order"):
        case "any":
            groups = [len(wanted)]
        case "random":
            members = [set(item) for item in got] == [set(item) for item in wanted]
            return None if members else "other members"
        case "ties":
            groups = case["ties"]
        case _:
            groups = [1] * len(wanted)
    at = 0
    for size in groups:
        ours = sorted(got[at : at + size], key=_text)
        theirs = sorted(wanted[at : at + size], key=_text)
        if ours != theirs:
            return f"at {at}: {_text(got[at:])[:300]}, wanted {_text(wanted[at:])[:300]}"
        at += size
    return None


_BACK = re.compile(r".*_via_.*|.*\(.*\)")


def _normalized(value: Any) -> Any:
    """Sort arrays of back relations in ``expand``, and make numbers comparable."""
    if isinstance(value, dict):
        made = {name: _normalized(member) for name, member in value.items()}
        expand = made.get("expand")
        if isinstance(expand, dict):
            for name, member in expand.items():
                if isinstance(member, list) and _BACK.fullmatch(name):
                    expand[name] = sorted(member, key=_text)
        return made
    if isinstance(value, list):
        return [_normalized(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 1 << 1000 else value
    return value


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def by_rules(cases: Iterable[Case]) -> Mapping[str, list[Case]]:
    """Return the cases by the name of their rule set."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case["rules"]].append(case)
    return groups
