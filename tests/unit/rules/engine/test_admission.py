"""Which rules about logins hold for tokens and open connections, too."""

from __future__ import annotations

import pytest

from pgrealtime.rules.engine.admission import is_about_login


@pytest.mark.parametrize(
    ("rule", "is_about"),
    [
        (None, False),
        ("banned = false", False),
        ("@request.context = 'password'", True),
        ("banned = false && note != '@request.'", False),
        ('banned = false && note != "a \\" @request." // @request.auth', False),
        ("note = 'it' && @request.query.a = 'x'", True),
        ("note = 'it\\'s' && @request.query.a = 'x'", True),
        ("banned = false // it isn't\n&& @request.query.a = 'x'", True),
    ],
)
def test_a_rule_is_about_a_login_if_it_reads_the_request(
    rule: str | None, *, is_about: bool
) -> None:
    """What a text or a comment says is nothing that it reads: the rule would admit everybody."""
    assert is_about_login(rule) is is_about
