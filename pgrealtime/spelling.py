"""Suggests the nearest known name for an unknown one. Used by errors of configuration and rules."""

import difflib
from collections.abc import Iterable


def nearest_name(name: str, candidates: Iterable[str]) -> str | None:
    """Return the most similar name, ignoring case; None if none is similar."""
    folded = {candidate.casefold(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return a hint with the most similar name; empty if none is similar."""
    suggestion = nearest_name(name, candidates)
    return f'perhaps you meant "{suggestion}"' if suggestion is not None else ""
