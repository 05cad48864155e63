"""Converts PostGIS' text form of a geometry or geography, EWKB in hex, to GeoJSON.

Used by ``records.values``. The result equals that of ``ST_AsGeoJSON`` and ``to_json``: nine
decimals, no measure (M), a ``crs`` member unless the SRID is 4326 or unset. Where they raise an
error: curves and polyhedral surfaces, which GeoJSON lacks, stay text; a coordinate that isn't
finite is null. Without ``spatial_ref_sys`` an SRID is EPSG's, from 37000 on ESRI's.

Written out, and not left to a library, for byte equality with PostGIS (digits, crs, order).
Source: PostGIS, "doc/ZMSgeoms.txt" and "liblwgeom/lwout_geojson.c"; RFC 7946.
"""

import struct
from collections.abc import Callable
from math import isfinite
from typing import Final

from pgrealtime.records.numbers import format_double

_HAS_Z: Final = 0x80000000
_HAS_M: Final = 0x40000000
_HAS_SRID: Final = 0x20000000
_DECIMALS: Final = 9
_WGS84: Final = 4326
_FIRST_ESRI_SRID: Final = 37000

_POINT, _LINE, _POLYGON, _COLLECTION, _TIN, _TRIANGLE = 1, 2, 3, 7, 16, 17
_MULTI_TYPES: Final = {4: "MultiPoint", 5: "MultiLineString", 6: "MultiPolygon"}
_SINGLE_TYPES: Final = {
    _POINT: "Point",
    _LINE: "LineString",
    _POLYGON: "Polygon",
    _TRIANGLE: "Polygon",
}


def to_geojson(text: str) -> str | None:
    """Return the GeoJSON of a geometry's text form; None if GeoJSON has no such shape."""
    try:
        return _EwkbReader(bytes.fromhex(text)).read_geometry()
    except (_NoShapeError, RecursionError):
        return None


def point_coordinates(text: str) -> tuple[float, float] | None:
    """Return X and Y of a point's text form; None for any other geometry."""
    return _EwkbReader(bytes.fromhex(text)).read_point_coordinates()


class _NoShapeError(Exception):
    """The geometry has a shape that GeoJSON lacks."""


class _EwkbReader:
    """Reads the bytes once, front to back. Each nested geometry has its own header."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0
        self._byte_order = "<"

    def read_geometry(self) -> str:
        shape, dimensions, crs = self._read_header()
        if shape in {_COLLECTION, _TIN}:
            members = self._read_list(self.read_geometry)
            return f'{{"type":"GeometryCollection",{crs}"geometries":{members}}}'
        name = _MULTI_TYPES.get(shape) or _SINGLE_TYPES.get(shape)
        if name is None:
            raise _NoShapeError
        coordinates = self._read_coordinates(shape, dimensions)
        return f'{{"type":"{name}",{crs}"coordinates":{coordinates}}}'

    def read_point_coordinates(self) -> tuple[float, float] | None:
        shape, _, _ = self._read_header()
        if shape != _POINT:
            return None
        x, y = struct.unpack_from(f"{self._byte_order}2d", self._data, self._offset)
        return x, y

    def _read_coordinates(self, shape: int, dimensions: tuple[int, int]) -> str:
        if shape == _POINT:
            return self._read_points(1, dimensions)[0]
        if shape == _LINE:
            return self._read_line(dimensions)
        if shape in {_POLYGON, _TRIANGLE}:
            return self._read_list(lambda: self._read_line(dimensions))
        return self._read_list(lambda: self._read_coordinates(*self._read_header()[:2]))

    def _read_header(self) -> tuple[int, tuple[int, int], str]:
        """Return shape, the number of dimensions shown and stored, and the crs member."""
        self._byte_order = "<" if self._data[self._offset] else ">"
        self._offset += 1
        kind = self._read_integer()
        dimensions = 3 if kind & _HAS_Z else 2
        stored = dimensions + bool(kind & _HAS_M)
        srid = self._read_integer() if kind & _HAS_SRID else _WGS84
        return kind & 0xFFFF, (dimensions, stored), _crs_member(srid)

    def _read_integer(self) -> int:
        (value,) = struct.unpack_from(f"{self._byte_order}I", self._data, self._offset)
        self._offset += 4
        return int(value)

    def _read_list(self, read: Callable[[], str]) -> str:
        return f"[{','.join([read() for _ in range(self._read_integer())])}]"

    def _read_line(self, dimensions: tuple[int, int]) -> str:
        return f"[{','.join(self._read_points(self._read_integer(), dimensions))}]"

    def _read_points(self, count: int, dimensions: tuple[int, int]) -> list[str]:
        shown, stored = dimensions
        form = f"{self._byte_order}{count * stored}d"
        numbers = struct.unpack_from(form, self._data, self._offset)
        self._offset += struct.calcsize(form)
        starts = range(0, len(numbers), stored)
        return [_format_point(numbers[start : start + shown]) for start in starts]


def _crs_member(srid: int) -> str:
    if srid in {0, _WGS84}:
        return ""
    authority = "EPSG" if srid < _FIRST_ESRI_SRID else "ESRI"
    return f'"crs":{{"type":"name","properties":{{"name":"{authority}:{srid}"}}}},'


def _format_point(numbers: tuple[float, ...]) -> str:
    if all(number != number for number in numbers):  # noqa: PLR0124 (an empty point is NaN only)
        return "[]"
    return f"[{','.join(map(_format_coordinate, numbers))}]"


def _format_coordinate(number: float) -> str:
    if not isfinite(number):
        return "null"
    return format_double(round(number, _DECIMALS) + 0.0)  # + 0.0: no -0
