"""Tables of the documentation say what the code does now."""

from __future__ import annotations


def test_the_tables_are_those_of_the_code(tables):
    stale = [page.name for page, content in tables.pages() if page.read_text("utf-8") != content]
    assert not stale, f"{', '.join(stale)}: run `python docs/tables.py`"


def test_the_table_of_methods_lists_what_is_registered(tables):
    table = tables.methods_table()
    for name in ("CrossLayerTransform", "GroupQuantization", "TransformCoding"):
        assert f"| `{name}` |" in table
    assert "`outliers=0.001`" in table
    assert "| Keep the `rank` principal components of every head" in table
