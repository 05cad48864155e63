"""Prints numbers as ECMAScript does, which is their form in PocketBase's records."""


def format_double(number: float) -> str:
    """Return a finite double as the shortest digits that parse to the same double."""
    text = repr(number).removesuffix(".0")
    return format_exponent_form(text) if "e" in text else text


def format_exponent_form(text: str) -> str:
    """Return a number in exponent form as ECMAScript prints it (Number::toString)."""
    mantissa, _, exponent = text.partition("e")
    sign = "-" if mantissa[0] == "-" else ""
    digits = mantissa.lstrip("-").replace(".", "")
    point = int(exponent) + 1  # the value is 0.DIGITS times ten to this power
    if 0 < point <= 21:  # noqa: PLR2004 (ECMAScript's own bound)
        whole, fraction = digits[:point].ljust(point, "0"), digits[point:]
        return f"{sign}{whole}.{fraction}" if fraction else sign + whole
    if -6 < point <= 0:  # noqa: PLR2004 (likewise)
        return f"{sign}0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{fraction}e{point - 1:+d}"
