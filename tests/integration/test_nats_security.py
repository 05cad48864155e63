"""TLS and logins of NATS, with a real server: what is accepted, and what is told of the rest."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import nkeys
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from structlog.testing import capture_logs

from pgrealtime.bus.nats import NatsBus
from pgrealtime.config.model import Config
from pgrealtime.errors import LogError
from pgrealtime.log.connection import LogNames, connect
from pgrealtime.log.probe import probe_log
from tests.log_world import NatsServer

SECRET = "a secret of more than thirty-two characters"
NAMES = LogNames(name="test")
PASSWORD = "a-password-of-nats"


# -- certificates


class Authority:
    """Issues certificates; ``file`` is its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file, _ = self._write(name, self._name, self._key, is_authority=True)

    def issue(self, name: str) -> tuple[str, str]:
        """Return the files of a certificate for 127.0.0.1, and of its key."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        key = ec.generate_private_key(ec.SECP256R1())
        return self._write(name, subject, key, is_authority=False)

    def _write(
        self, name: str, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_authority: bool
    ) -> tuple[str, str]:
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        cert_file, key_file = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return str(cert_file), str(key_file)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


# -- servers and logins


def key_pair(prefix: int) -> nkeys.KeyPair:
    return nkeys.from_seed(nkeys.encode_seed(os.urandom(32), prefix))


def signed(by: nkeys.KeyPair, subject: nkeys.KeyPair, claims: dict[str, Any]) -> str:
    """Return a JWT as NATS has them."""
    issued_by, said = by.public_key.decode(), {"version": 2, **claims}
    body = {"jti": "1", "iat": int(time.time()), "iss": issued_by, "name": "test"}
    body |= {"sub": subject.public_key.decode(), "nats": said}
    head = {"typ": "JWT", "alg": "ed25519-nkey"}
    text = b".".join(_encode(json.dumps(each).encode()) for each in (head, body))
    return (text + b"." + _encode(by.sign(text))).decode()


def _encode(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


@dataclass(frozen=True, slots=True)
class Login:
    """What the server's configuration has for a login, and what section ``log`` has for it."""

    server: str
    credentials: str = ""
    """Of the file."""
    user: str = ""
    """In the URL."""


def password() -> Login:
    users = f"[{{user: app, password: {PASSWORD}}}]"
    return Login(f"authorization {{ users: {users} }}\n", user=f"app:{PASSWORD}@")


def nkey() -> Login:
    pair = key_pair(nkeys.PREFIX_BYTE_USER)
    server = f"authorization {{ users: [{{nkey: {pair.public_key.decode()}}}] }}\n"
    return Login(server, f"{pair.seed.decode()}\n")


def credentials() -> Login:
    """A user of an account of an operator, each by a JWT."""
    kinds = (nkeys.PREFIX_BYTE_OPERATOR, *[nkeys.PREFIX_BYTE_ACCOUNT] * 2, nkeys.PREFIX_BYTE_USER)
    operator, account, system, user = map(key_pair, kinds)
    names = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
    stored = ("mem_storage", "disk_storage", "streams", "consumer")
    limits = {**dict.fromkeys(names, -1), "wildcards": True}
    accounts = {
        account: {"type": "account", "limits": {**limits, **dict.fromkeys(stored, -1)}},
        system: {"type": "account", "limits": limits},
    }
    preloaded = ", ".join(
        f"{each.public_key.decode()}: {signed(operator, each, claims)}"
        for each, claims in accounts.items()
    )
    server = (
        f"operator: {signed(operator, operator, {'type': 'operator'})}\nresolver: MEMORY\n"
        f"system_account: {system.public_key.decode()}\nresolver_preload: {{ {preloaded} }}\n"
    )
    token = signed(account, user, {"type": "user", **dict.fromkeys(names[:3], -1)})
    return Login(
        server,
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n",
    )


@asynccontextmanager
async def serving(folder: Path, extra: str) -> AsyncIterator[NatsServer]:
    server = NatsServer(folder, extra=extra)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def tls_of(authority: Authority, more: str = "") -> str:
    cert_file, key_file = authority.issue("server")
    return f'tls {{ cert_file: "{cert_file}", key_file: "{key_file}", {more} }}\n'


def config_for(server: NatsServer, login: Login, folder: Path, **tls: str) -> Config:
    """Return the configuration of a replica with the login."""
    file = folder / "login"
    file.write_text(login.credentials)
    section = {
        "nats": f"tls://{login.user}127.0.0.1:{server.port}",
        "credentials_file": str(file) if login.credentials else "",
        "tls": tls,
    }
    return Config.model_validate(
        {
            "replication": {"slot": {"durable": True}},
            "cluster": {"bus": "nats", "name": "test", "secret": SECRET},
            "log": section,
        }
    )


async def refusal(config: Config) -> LogError:
    """Return what ``check`` says."""
    with pytest.raises(LogError) as raised:
        await probe_log(config)
    return raised.value


async def logged_code(config: Config) -> str:
    """Return the code that a replica logs while it tries to connect."""
    with capture_logs() as logged:

        async def stay_connected() -> None:
            async with connect(config.log, NAMES, client_name="test"):
                raise AssertionError("it is connected")

        connecting = asyncio.create_task(stay_connected())
        async with asyncio.timeout(10):
            while not logged and not connecting.done():
                await asyncio.sleep(0.01)
        connecting.cancel()
        await asyncio.wait([connecting])
        assert connecting.cancelled()
    (entry, *_) = logged
    assert PASSWORD not in str(logged)
    return str(entry["code"])


# -- tests


@pytest.mark.parametrize("make_login", [password, nkey, credentials])
async def test_logins_work_over_tls_and_others_are_refused(
    make_login: Any, authority: Authority, tmp_path: Path
) -> None:
    """A password in the URL, a seed alone, and a file with JWT and seed."""
    login, other = make_login(), make_login()
    if login.user:
        other = Login("", user="app:wrong@")
    async with serving(tmp_path, tls_of(authority) + login.server) as server:
        config = config_for(server, login, tmp_path, ca_file=authority.file)
        summary = await probe_log(config)
        bus = NatsBus(config.log, name="test", secret=SECRET, tag="abcdef")
        async with bus.running(), asyncio.timeout(10):
            while bus._client is None:
                await asyncio.sleep(0.01)
        wrong = config_for(server, other, tmp_path, ca_file=authority.file)
        error, code = await refusal(wrong), await logged_code(wrong)

    assert summary[0].endswith("the stream will be made")
    assert (error.error_code, error.message, code) == (
        *("log_denied", "NATS refuses the login"),
        "log_denied",
    )


async def test_a_server_of_another_authority_is_not_logged_in_to(
    authority: Authority, tmp_path: Path
) -> None:
    """Neither by one in the configuration nor by those of the system."""
    (folder := tmp_path / "other").mkdir()
    other = Authority(folder, "other")
    async with serving(tmp_path, tls_of(authority) + password().server) as server:
        for tls in ({"ca_file": other.file}, {}):
            config = config_for(server, password(), tmp_path, **tls)
            error, code = await refusal(config), await logged_code(config)
            assert (error.error_code, code) == ("log_tls", "log_tls")
            assert "CERTIFICATE_VERIFY_FAILED" in error.detail
            assert "log.tls.ca_file" in error.hint


async def test_a_server_may_ask_for_a_certificate(authority: Authority, tmp_path: Path) -> None:
    (folder := tmp_path / "other").mkdir()
    extra = tls_of(authority, f'ca_file: "{authority.file}", verify: true')
    async with serving(tmp_path, extra) as server:
        cert_file, key_file = authority.issue("client")
        tls = {"ca_file": authority.file, "cert_file": cert_file, "key_file": key_file}
        assert (await probe_log(config_for(server, Login(""), tmp_path, **tls)))[0]
        other_file, other_key = Authority(folder, "other").issue("client")
        for changed in (
            {"cert_file": "", "key_file": ""},
            {"cert_file": other_file, "key_file": other_key},
        ):
            config = config_for(server, Login(""), tmp_path, **{**tls, **changed})
            assert (await refusal(config)).error_code == "log_tls"


@pytest.mark.parametrize("scheme", ["tls", "nats"])
async def test_without_tls_nothing_is_sent(
    scheme: str, authority: Authority, tmp_path: Path
) -> None:
    """Somebody else at the address of NATS could have the password else."""
    received = bytearray()
    info = {"server_id": "x", "version": "2.10.0", "auth_required": True, "max_payload": 1 << 20}

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        received.extend(await reader.read(1000))
        writer.close()

    listening = await asyncio.start_server(pretend, "127.0.0.1", 0)
    server = NatsServer(tmp_path)
    server.port = listening.sockets[0].getsockname()[1]
    tls = {"ca_file": authority.file} if scheme == "nats" else {}
    config = config_for(server, password(), tmp_path, **tls)
    changed = config.log.nats.replace("tls://", f"{scheme}://")
    config = config.model_copy(update={"log": config.log.model_copy(update={"nats": changed})})
    async with listening:
        error, code = await refusal(config), await logged_code(config)

    assert (error.error_code, code) == ("log_tls", "log_tls")
    assert "the server offers no TLS" in error.detail
    assert received == b""


@pytest.mark.parametrize(
    "text",
    ["", "\n", "not a seed", "SUAAA", "-----BEGIN NATS USER JWT-----\nx\n", "\x00\x01" * 40],
    ids=["empty", "blank", "words", "short", "without a seed", "bytes"],
)
async def test_a_file_without_a_seed_is_named(text: str, tmp_path: Path) -> None:
    """At once: no server would ever accept it."""
    server = NatsServer(tmp_path)
    config = config_for(server, Login("", text or " "), tmp_path)
    assert (await refusal(config)).error_code == "log_credentials"
