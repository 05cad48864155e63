"""The files of ``config/auth`` make tokens that a service with their issuers accepts."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
import yaml

from tests.conformance.http_client import Request, send
from tests.e2e.service import Service, service
from tests.lacking import lacking

_ROOT = Path(__file__).resolve().parents[2]
_FILES = _ROOT / "config" / "auth"
_DJANGO = _ROOT / "tests" / ".python" / "django"
_NODE_MODULES = _ROOT / "tests" / "node_modules"
_SECRETS = {
    name: f"{name}, which has more than thirty-two bytes"
    for name in (
        *("REALTIME_SECRET", "DJANGO_SECRET_KEY", "SUPABASE_JWT_SECRET", "PGRST_JWT_SECRET"),
        "DIRECTUS_SECRET",
    )
}
_ANN, _BOB = "6f1d8a52-1111-4222-8333-444455556666", "7a2b9c63-1111-4222-8333-444455556666"
_SCHEMA = f"""
CREATE SCHEMA auth;
CREATE TABLE users (id bigint PRIMARY KEY, password_digest text);
CREATE TABLE auth_user (id int PRIMARY KEY, password text, is_active boolean NOT NULL);
CREATE TABLE auth.users (id uuid PRIMARY KEY, encrypted_password text);
CREATE TABLE directus_users (id uuid PRIMARY KEY, password text, status text NOT NULL);
CREATE TABLE notes (id text PRIMARY KEY, owner text NOT NULL);
INSERT INTO users VALUES (7);
INSERT INTO auth_user VALUES (8, '', true), (9, '', false);
INSERT INTO auth.users VALUES ('{_ANN}');
INSERT INTO directus_users VALUES ('{_BOB}', '', 'active'), ('{_ANN}', '', 'suspended');
INSERT INTO notes VALUES ('of 7', '7'), ('of 8', '8'), ('of 9', '9'), ('ann', '{_ANN}'),
  ('bob', '{_BOB}');
"""
_MINE = '@request.auth.id != "" && owner = @request.auth.id'

_CALL_DJANGO = """
import json, os
from django.conf import settings
settings.configure(
    SECRET_KEY=os.environ["DJANGO_SECRET_KEY"], REALTIME_SECRET=os.environ["REALTIME_SECRET"],
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"], USE_TZ=True,
)
import django
django.setup()
from django.contrib.auth.models import AnonymousUser, User
from django.test import RequestFactory
import django_pyjwt, django_simplejwt

def call(view, user):
    request = RequestFactory().get("/realtime-token")
    request.user = user
    response = view.realtime_token(request)
    return response.status_code, json.loads(response.content).get("token", "")

print(json.dumps([
    call(django_pyjwt, User(pk=7)),
    call(django_simplejwt, User(pk=8)),
    call(django_simplejwt, User(pk=9)),
    call(django_pyjwt, AnonymousUser()),
    call(django_simplejwt, AnonymousUser()),
]))
"""
_CALL_EXPRESS = """
import { realtimeToken } from "./express.mjs";
const answers = [];
const response = {
  code: 200,
  status(code) { this.code = code; return this; },
  json(body) { answers.push([this.code, body.token ?? ""]); this.code = 200; },
};
realtimeToken({ user: { id: 7 } }, response);
realtimeToken({}, response);
console.log(JSON.stringify(answers));
"""
_CALL_RAILS = """
require "json"
require "./rails"
puts JSON.generate([[200, RealtimeToken.for(Struct.new(:id).new(7))]])
"""


async def _answers(folder: Path, *command: str, **environ: str) -> list[tuple[int, str]]:
    """Run a program in a folder; return the answers that it prints."""
    program = shutil.which(command[0])
    if program is None:
        lacking(f"there is no {command[0]}")
    process = await asyncio.create_subprocess_exec(
        program,
        *command[1:],
        cwd=folder,
        env={**os.environ, **_SECRETS, **environ},
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return [(status, token) for status, token in json.loads(out)]


async def _listed(running: Service, token: str) -> list[str]:
    """Return the notes that the token's user may see."""
    path = "/api/collections/notes/records?sort=id"
    request = Request(method="GET", path=path, headers={"Authorization": token})
    answer = await send(request, running.address)
    assert answer.head.status == 200
    return [item["id"] for item in json.loads(answer.body)["items"]]


async def test_the_files_make_tokens_that_are_accepted(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the user for whom each was made, and of no other."""
    if not _DJANGO.is_dir() or not (_NODE_MODULES / "jsonwebtoken").is_dir():
        lacking("Django or jsonwebtoken isn't installed: sh tests/run.sh installs them")
    for name, secret in _SECRETS.items():
        monkeypatch.setenv(name, secret)
    for file in _FILES.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "node_modules").symlink_to(_NODE_MODULES)
    (tmp_path / "call.mjs").write_text(_CALL_EXPRESS)
    django, express, rails = await asyncio.gather(
        _answers(
            tmp_path,
            *(sys.executable, "-c", _CALL_DJANGO),
            PYTHONPATH=f"{_DJANGO}{os.pathsep}{tmp_path}",
        ),
        _answers(tmp_path, "node", "call.mjs"),
        _answers(tmp_path, "ruby", "-e", _CALL_RAILS),
    )
    assert [status for status, _ in django] == [200, 200, 200, 401, 401]
    assert [status for status, _ in express] == [200, 401]

    def signed(secret: str, **claims: Any) -> str:
        return jwt.encode({"exp": time.time() + 600, **claims}, _SECRETS[secret])

    everything = ["ann", "bob", "of 7", "of 8", "of 9"]
    supabase, directus = "SUPABASE_JWT_SECRET", "DIRECTUS_SECRET"
    of_directus = {"iss": "directus", "role": _ANN, "app_access": True, "admin_access": False}
    expected = [
        (django[0][1], ["of 7"]),
        (django[1][1], ["of 8"]),
        (django[2][1], []),  # isn't active
        (express[0][1], ["of 7"]),
        (rails[0][1], ["of 7"]),
        (signed(supabase, sub=_ANN, aud="authenticated", role="authenticated"), ["ann"]),
        (signed(supabase, iss="supabase", role="anon"), []),
        (signed(supabase, iss="supabase", role="service_role"), everything),
        (signed("PGRST_JWT_SECRET", role="web_user", user_id="7"), ["of 7"]),
        (signed(directus, **of_directus, id=_BOB), ["bob"]),
        (signed(directus, **of_directus, id=_ANN), []),  # is suspended
        (signed(directus, **{**of_directus, "admin_access": True}, id=_BOB), everything),
        (signed(directus, **{**of_directus, "iss": "other"}, id=_BOB), []),
    ]
    file = yaml.safe_load((_FILES / "issuers.yaml").read_text())
    notes = {"table": "notes", "list_rule": _MINE}
    async with service(
        database_url,
        tmp_path,
        collections={**file["collections"], "notes": notes},
        sections={"auth": file["auth"]},
        schema=_SCHEMA,
    ) as running:
        assert [await _listed(running, token) for token, _ in expected] == [
            ids for _, ids in expected
        ]
