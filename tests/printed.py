"""Numbers in a cell of a printed table, and whether they are the ones they should be."""

import re


def numbers(cell):
    """The numbers of a table cell and the decimals that each is printed with."""
    found = re.findall(r"[−-]?\d[\d,]*(?:\.\d+)?", cell)
    return [(float(n.replace("−", "-").replace(",", "")), len(n.partition(".")[2])) for n in found]


def assert_printed(cell, *values):
    """The cell holds `values` in this order, rounded."""
    found = numbers(cell)
    assert len(found) == len(values), (cell, values)
    for (printed, places), value in zip(found, values, strict=True):
        assert abs(printed - value) <= 0.5000001 * 10.0**-places, (cell, values)
