"""What is remembered of a token is its signature by one key, and nothing else."""

from __future__ import annotations

import jwt
import pytest

from pgrealtime.auth import verified_tokens
from pgrealtime.auth.token import VerificationKey
from pgrealtime.auth.verified_tokens import VerifiedTokens
from pgrealtime.errors import AuthError

KEY = VerificationKey("HS256", "a-secret-of-thirty-two-characters")
OTHER = VerificationKey("HS256", "another-secret-of-enough-characters")


def signed(user: str) -> str:
    return jwt.encode({"sub": user}, str(KEY.material))


def test_a_token_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request with the same header neither parses nor verifies it."""
    verified, header = VerifiedTokens(), f"Bearer {signed('ann')}"
    verified.check_signature(header, verified.parse(header), KEY)
    monkeypatch.setattr(verified_tokens, "parse_token", None)
    monkeypatch.setattr(verified_tokens, "check_signature", None)

    token = verified.parse(header)
    verified.check_signature(header, token, KEY)

    assert token.claims == {"sub": "ann"}


def test_another_key_is_not_that_which_signed() -> None:
    """After a change of the secret a remembered token is as wrong as any other."""
    verified, header = VerifiedTokens(), signed("ann")
    verified.check_signature(header, verified.parse(header), KEY)

    with pytest.raises(AuthError):
        verified.check_signature(header, verified.parse(header), OTHER)


def test_forged_tokens_are_not_remembered() -> None:
    """Nobody can fill the memory, or make a token valid, without a key."""
    verified = VerifiedTokens()
    good = signed("ann")
    head, _, signature = good.split(".")
    forged = f"{head}.{signed('root').split('.')[1]}.{signature}"
    verified.check_signature(good, verified.parse(good), KEY)

    for _ in range(2):
        with pytest.raises(AuthError):
            verified.check_signature(forged, verified.parse(forged), KEY)

    assert len(verified) == 1


def test_the_token_unused_for_longest_is_forgotten() -> None:
    verified = VerifiedTokens(max_tokens=2)
    for user in ("ann", "bob", "ann", "eve"):
        verified.check_signature(signed(user), verified.parse(signed(user)), KEY)
    long_header = jwt.encode({"sub": "x" * 5000}, str(KEY.material))
    verified.check_signature(long_header, verified.parse(long_header), KEY)

    assert list(verified._known) == [signed("ann"), signed("eve")]
