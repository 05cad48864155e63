"""Page parameters are read as PocketBase reads them (records, section 4)."""

from __future__ import annotations

import pytest

from pgrealtime.errors import ReadError
from pgrealtime.reads.list_parameters import ListParameters, parse_list_parameters


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ({}, ListParameters()),
        ({"page": "", "perPage": "", "skipTotal": ""}, ListParameters()),
        ({"page": "0", "perPage": "0"}, ListParameters()),
        ({"page": "-7", "perPage": "-1"}, ListParameters()),
        ({"page": "+2", "perPage": "007"}, ListParameters(page=2, per_page=7)),
        ({"perPage": "1001"}, ListParameters(per_page=1000)),
        ({"page": "9223372036854775807"}, ListParameters(page=(1 << 63) - 1)),
        ({"page": "0" * 5000 + "3"}, ListParameters(page=3)),
        ({"skipTotal": "t"}, ListParameters(skips_total=True)),
        ({"skipTotal": "FALSE"}, ListParameters()),
    ],
)
def test_what_is_readable_is_brought_within_its_limits(
    query: dict[str, str], wanted: ListParameters
) -> None:
    assert parse_list_parameters(query) == wanted


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(
            ("page", text)
            for text in ("abc", "1.5", "1e3", "0x10", "1_0", " 2", "٢", "+", "1" * 5000)
        ),
        ("page", "9223372036854775808"),
        ("page", "-9223372036854775809"),
        ("perPage", "x"),
        *(("skipTotal", text) for text in ("yes", "on", "2", "tRUE")),
    ],
)
def test_what_is_no_number_or_flag_is_refused(name: str, text: str) -> None:
    with pytest.raises(ReadError) as error:
        parse_list_parameters({name: text})

    assert error.value.error_code == "read_invalid"


def test_a_page_beyond_64_bits_of_rows_has_no_offset() -> None:
    assert ListParameters(page=3, per_page=30).offset == 60
    assert ListParameters(page=(1 << 63) - 1, per_page=4).offset is None
