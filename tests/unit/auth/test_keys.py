"""Public keys from the configuration and from key sets served over HTTP.

Node made some of the tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import shutil
import subprocess
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from pydantic import ValidationError

from pgrealtime.auth.keys import (
    ConfiguredKeySource,
    JwksKeySource,
    key_source,
    parse_jwks,
    parse_pem,
)
from pgrealtime.auth.token import Token, VerificationKey, check_signature, parse_token
from pgrealtime.config.model import IssuerConfig
from pgrealtime.errors import AuthError
from tests.clock import Clock

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = Ed25519PrivateKey.generate()
PrivateKey: TypeAlias = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey
PRIVATE: dict[str, PrivateKey] = {"RS256": RSA, "ES256": EC, "EdDSA": ED}


def pem(key: PrivateKey | Ed448PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def jwk(algorithm: str, **members: object) -> dict[str, Any]:
    makers: dict[str, Any] = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}
    public = PRIVATE[algorithm].public_key()
    return {**json.loads(makers[algorithm].to_jwk(public)), **members}


def token_of(algorithm: str, kid: str | None = None) -> Token:
    headers = None if kid is None else {"kid": kid}
    return parse_token(
        jwt.encode({"sub": "u1"}, PRIVATE[algorithm], algorithm=algorithm, headers=headers)
    )


def published(url: str = "https://id/keys", **members: Any) -> IssuerConfig:
    return IssuerConfig(name="idp", jwks_url=url, **members)


# -- keys of the configuration


@pytest.mark.parametrize("algorithm", PRIVATE)
async def test_a_pem_key_checks_its_own_algorithm(algorithm: str) -> None:
    source = key_source(IssuerConfig(name="app", public_key=pem(PRIVATE[algorithm])))

    (key,) = await source.keys_for(token_of(algorithm))

    check_signature(token_of(algorithm), key)
    for other in PRIVATE.keys() - {algorithm}:
        assert await source.keys_for(token_of(other)) == []


@pytest.mark.parametrize("algorithm", PRIVATE)
async def test_a_public_key_is_no_secret(algorithm: str) -> None:
    """HS256 with the public key's text as secret is a classic attack.

    PyJWT's own check isn't relied on.
    """
    text = pem(PRIVATE[algorithm])
    issuer = IssuerConfig(name="app", public_key=text)
    head = parse_token(jwt.encode({"sub": "admin"}, "x" * 32)).text.rpartition(".")[0]
    signature = hmac.digest(text.encode(), head.encode(), hashlib.sha256)
    forged = parse_token(f"{head}.{urlsafe_b64encode(signature).rstrip(b'=').decode()}")

    assert await key_source(issuer).keys_for(forged) == []
    with pytest.raises(AuthError):
        check_signature(forged, parse_pem(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
        pem(rsa.generate_private_key(public_exponent=65537, key_size=1024)),
        pem(ec.generate_private_key(ec.SECP384R1())),
        pem(Ed448PrivateKey.generate()),
        ED.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
    ],
    ids=["empty", "text", "broken", "RSA-1024", "P-384", "Ed448", "private"],
)
def test_a_key_that_serves_no_accepted_algorithm_is_refused(text: str) -> None:
    with pytest.raises(AuthError) as error:
        parse_pem(text)

    assert error.value.error_code == "key_invalid"


def test_a_key_of_another_kind_than_asked_for_is_refused() -> None:
    with pytest.raises(AuthError) as error:
        key_source(IssuerConfig(name="app", public_key=pem(EC), algorithms=("RS256",)))

    assert error.value.error_code == "key_invalid"


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"secret": "s", "jwks_url": "https://id/keys"},
        {"public_key": "k", "algorithms": ["HS256"]},
        {"jwks_url": "https://id/keys", "algorithms": ["RS256", "HS256"]},
        {"secret": "s", "algorithms": ["RS256"]},
        {"secret": "s", "algorithms": ["none"]},
        {"jwks_url": "https://id/keys", "previous_secret": "s"},
        {"jwks_url": "file:///etc/passwd"},
    ],
)
def test_an_issuer_has_one_kind_of_key_and_what_it_can_check(members: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        IssuerConfig(name="app", **members)


async def test_a_previous_secret_still_counts() -> None:
    """Secrets can be changed without signing users out."""
    source = key_source(IssuerConfig(name="app", secret="new" * 11, previous_secret="old" * 11))
    token = parse_token(jwt.encode({"sub": "u1"}, "old" * 11))

    assert [key.material for key in await source.keys_for(token)] == ["new" * 11, "old" * 11]


def test_nothing_prints_a_secret() -> None:
    issuer = IssuerConfig(name="app", secret="hush-1", previous_secret="hush-2")
    token = parse_token(jwt.encode({"sub": "u1"}, "hush" * 8))

    printed = f"{issuer!r} {issuer} {VerificationKey('HS256', 'hush-3')!r} {token!r}"

    assert "hush" not in printed
    assert token.text not in printed


# -- key sets


def test_what_a_key_set_holds_for_others_is_passed_over() -> None:
    entries: list[Any] = [
        jwk("RS256", kid="a", alg="RS256", use="sig"),
        jwk("ES256", kid="b"),
        jwk("EdDSA"),
        jwk("RS256", kid="enc", use="enc"),
        jwk("RS256", kid="512", alg="RS512"),
        jwk("ES256", kid="none", alg="none"),
        {"kty": "oct", "k": "c2VjcmV0", "kid": "shared", "alg": "HS256"},
        json.loads(RSAAlgorithm.to_jwk(RSA)) | {"kid": "private"},
        {"kty": "RSA", "n": "!", "e": "AQAB"},
        {"kty": "EC", "crv": "P-384", "x": "AA", "y": "AA"},
        {"kty": ["RSA"]},
        {"kty": "RSA"},
        "key",
        None,
    ]

    keys = parse_jwks(json.dumps({"keys": entries}).encode(), published())

    assert [(key.algorithm, key.id) for key in keys] == [
        ("RS256", "a"),
        ("ES256", "b"),
        ("EdDSA", None),
    ]


@pytest.mark.parametrize("text", [b"", b"<html>", b"[]", b"{}", b'{"keys":{}}', b'{"keys":[]}'])
def test_what_holds_no_key_is_no_key_set(text: bytes) -> None:
    with pytest.raises(AuthError):
        parse_jwks(text, published())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["kty", "crv", "x", "y", "n", "e", "d", "alg", "use", "kid"]),
        _JSON | st.sampled_from(["RSA", "EC", "OKP", "P-256", "Ed25519", "AQAB", "AA"]),
    )
)
def test_no_entry_breaks_the_reading_of_the_others(entry: dict[str, Any]) -> None:
    good = jwk("ES256", kid="good")

    keys = parse_jwks(json.dumps({"keys": [entry, good]}).encode(), published())

    assert keys[-1].id == "good"


class Issuer:
    """An identity provider's key endpoint."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.status = 200
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def handle(self, _: web.Request) -> web.Response:
        self.asked += 1
        await self.may_answer.wait()
        return web.json_response({"keys": self.keys}, status=self.status)


@pytest.fixture
async def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
async def url(issuer: Issuer) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/keys", issuer.handle)
    async with TestServer(app, host="127.0.0.1") as server:
        yield str(server.make_url("/keys"))


async def test_keys_are_fetched_when_a_token_needs_them(issuer: Issuer, url: str) -> None:
    issuer.keys = [jwk("RS256", kid="a"), jwk("ES256", kid="b"), jwk("EdDSA", kid="c")]
    source = JwksKeySource(published(url))

    for algorithm, kid in (("RS256", "a"), ("ES256", "b"), ("EdDSA", "c")):
        token = token_of(algorithm, kid)
        (key,) = await source.keys_for(token)
        check_signature(token, key)

    assert issuer.asked == 1


async def test_a_key_without_an_id_and_a_token_without_one_fit_all(
    issuer: Issuer, url: str
) -> None:
    """A token that names another key is not tried with a key that has a name (RFC 7515, 4.1.4)."""
    issuer.keys = [jwk("RS256"), jwk("RS256", kid="b")]
    source = JwksKeySource(published(url))

    assert [key.id for key in await source.keys_for(token_of("RS256", "b"))] == [None, "b"]
    assert [key.id for key in await source.keys_for(token_of("RS256", "a"))] == [None]
    assert [key.id for key in await source.keys_for(token_of("RS256"))] == [None, "b"]


async def test_an_unknown_kid_is_asked_for_once_a_minute(issuer: Issuer, url: str) -> None:
    """Callers must not be able to make the service flood the issuer.

    A new key is found nevertheless.
    """
    clock = Clock()
    source = JwksKeySource(published(url), clock=clock)
    issuer.keys = [jwk("RS256", kid="a")]
    assert await source.keys_for(token_of("RS256", "a"))
    issuer.keys = [jwk("ES256", kid="b")]

    for _ in range(5):
        assert await source.keys_for(token_of("ES256", "b")) == []
    assert issuer.asked == 1
    clock.now += 60

    assert await source.keys_for(token_of("ES256", "b"))
    assert await source.keys_for(token_of("RS256", "a")) == []
    assert issuer.asked == 2


async def test_all_callers_that_wait_for_a_fetch_share_it(issuer: Issuer, url: str) -> None:
    issuer.keys = [jwk("RS256", kid="a")]
    issuer.may_answer.clear()
    source = JwksKeySource(published(url))
    waiting = [asyncio.create_task(source.keys_for(token_of("RS256", "a"))) for _ in range(50)]
    impatient = asyncio.create_task(source.keys_for(token_of("RS256", "a")))
    await asyncio.sleep(0)
    impatient.cancel()
    issuer.may_answer.set()

    found = await asyncio.wait_for(asyncio.gather(*waiting), 5)

    assert all(len(keys) == 1 for keys in found)
    assert issuer.asked == 1


@pytest.mark.parametrize("fault", ["status", "empty", "gone"])
async def test_a_failed_fetch_leaves_the_old_keys_in_force(
    issuer: Issuer, url: str, fault: str
) -> None:
    clock = Clock()
    source = JwksKeySource(published(url), clock=clock)
    issuer.keys = [jwk("RS256", kid="a")]
    assert await source.keys_for(token_of("RS256", "a"))
    clock.now += 60
    issuer.keys = [] if fault == "empty" else [jwk("ES256", kid="b")]
    issuer.status = 500 if fault == "status" else 200
    if fault == "gone":
        source._issuer = published("http://127.0.0.1:9/keys")

    assert await source.keys_for(token_of("ES256", "b")) == []
    assert await source.keys_for(token_of("RS256", "a"))


async def test_keys_are_refreshed_in_the_background(issuer: Issuer, url: str) -> None:
    """A key that the issuer withdrew becomes invalid, also if no token has an unknown one."""
    issuer.keys = [jwk("RS256", kid="a")]
    source = JwksKeySource(published(url), refresh_seconds=0.01)
    task = asyncio.create_task(source.run())
    try:
        assert await source.keys_for(token_of("RS256", "a"))
        issuer.keys = [jwk("ES256", kid="b")]
        async with asyncio.timeout(5):
            while await source.keys_for(token_of("RS256", "a")):
                await asyncio.shield(source._start_or_join_fetch())
        assert await source.keys_for(token_of("ES256", "b"))
    finally:
        task.cancel()


async def test_a_token_of_an_algorithm_not_asked_for_never_makes_a_fetch(
    issuer: Issuer, url: str
) -> None:
    source = JwksKeySource(published(url, algorithms=["ES256"]))

    assert await source.keys_for(token_of("RS256", "a")) == []
    assert await source.keys_for(parse_token(jwt.encode({}, "x" * 32))) == []
    assert issuer.asked == 0


_NODE = """
const { generateKeyPairSync, sign } = require("node:crypto");
const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
const kinds = {
  RS256: ["rsa", { modulusLength: 2048 }, "sha256"],
  ES256: ["ec", { namedCurve: "P-256" }, "sha256"],
  EdDSA: ["ed25519", {}, null],
};
const made = Object.entries(kinds).map(([alg, [type, options, hash]]) => {
  const { privateKey, publicKey } = generateKeyPairSync(type, options);
  const head = part({ alg, kid: alg }) + "." + part({ sub: "u1" });
  const key = { key: privateKey, dsaEncoding: "ieee-p1363" };
  const token = head + "." + sign(hash, Buffer.from(head), key).toString("base64url");
  return {
    token,
    jwk: { ...publicKey.export({ format: "jwk" }), kid: alg },
    pem: publicKey.export({ format: "pem", type: "spki" }),
  };
});
process.stdout.write(JSON.stringify(made));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node isn't installed")
async def test_tokens_and_keys_of_another_maker_are_read_alike(issuer: Issuer, url: str) -> None:
    made = subprocess.run(  # noqa: ASYNC221 (nothing else runs meanwhile)
        ["node", "-e", _NODE], capture_output=True, text=True, check=True, timeout=60
    )
    tokens = json.loads(made.stdout)
    issuer.keys = [one["jwk"] for one in tokens]
    source = JwksKeySource(published(url))

    for one in tokens:
        token = parse_token(one["token"])
        (key,) = await source.keys_for(token)
        check_signature(token, key)
        check_signature(token, parse_pem(one["pem"]))
        assert await ConfiguredKeySource([parse_pem(one["pem"])]).keys_for(token)


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 70}.example"])
async def test_a_host_that_is_no_name_leaves_the_keys_in_force(host: str) -> None:
    """An issuer can redirect to one: the refresh fails, goes on later, and nothing else ends."""
    hosts = [""]

    async def answer(_request: web.Request) -> web.Response:
        if hosts[0]:
            raise web.HTTPFound(f"http://{hosts[0]}/keys")
        return web.json_response({"keys": [jwk("RS256", kid="one")]})

    app = web.Application()
    app.router.add_get("/keys", answer)
    async with TestServer(app) as server:
        url = str(server.make_url("/keys"))
        source = JwksKeySource(published(url), refresh_seconds=0.01)
        running = asyncio.create_task(source.run())
        while not await source.keys_for(token_of("RS256", "one")):
            await asyncio.sleep(0.01)
        hosts[0] = host
        await asyncio.sleep(0.3)
        assert not running.done()
        assert await source.keys_for(token_of("RS256", "one"))
        running.cancel()
