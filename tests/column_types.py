"""Types and columns as read from a catalogue."""

from pgrealtime.catalog.model import Column, Type, TypeKind


def base_type(name: str, *, oid: int = 0, category: str = "S", schema: str = "pg_catalog") -> Type:
    """Return a base type."""
    return Type(oid=oid, schema=schema, name=name, kind=TypeKind.BASE, category=category)


def array_of(element: Type, *, oid: int = 0) -> Type:
    """Return the type of arrays."""
    name = f"_{element.name}"
    kind, schema = TypeKind.ARRAY, element.schema
    return Type(oid=oid, schema=schema, name=name, kind=kind, category="A", element=element)


TEXT = base_type("text", oid=25)
TEXTS = array_of(TEXT, oid=1009)


def text_columns(*names: str) -> tuple[Column, ...]:
    """Return columns of type text, numbered from 1."""
    return tuple(Column(name=n, attribute_number=i, type=TEXT) for i, n in enumerate(names, 1))
