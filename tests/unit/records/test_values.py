"""Values whose text doesn't match the current definition of their type."""

from __future__ import annotations

import pytest

from pgrealtime.catalog.model import Type, TypeKind
from pgrealtime.records.values import Json, _composite_converter
from tests.column_types import TEXT

SPOT = Type(
    oid=900,
    schema="public",
    name="spot",
    kind=TypeKind.COMPOSITE,
    category="C",
    attributes=(("north", TEXT), ("east", TEXT)),
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("(1,2)", {"north": "1", "east": "2"}, id="as it is"),
        pytest.param("(1)", {"north": "1"}, id="from before an attribute was added"),
        pytest.param("(0,1,2)", "(0,1,2)", id="from before one was dropped"),
    ],
)
def test_no_attribute_has_the_value_of_another(text: str, shown: Json) -> None:
    """It is unknown which one was dropped, so the text is shown unchanged."""
    convert = _composite_converter(SPOT)

    assert convert is not None
    assert convert(text) == shown
