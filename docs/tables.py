"""Tables of the documentation that are derived from the code.

``python docs/tables.py`` writes each into its page, between ``<!-- name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import kvcompress
from kvcompress.evaluation.rates import CALIBRATIONS
from kvcompress.methods import known_cache_methods, known_methods
from kvcompress.ops.registry import OPERATIONS, Nearest, Rounded, SameBits, SameValues

DOCS = Path(__file__).parent

PACKAGES = {
    "errors": "all errors; each is also a builtin exception",
    "arrays": "namespaces, dtypes, devices, transfer, pytrees, and primitives that libraries lack",
    "ops": "the operations: pure functions over an array namespace",
    "rope": "rotary embeddings, applied and undone; their parameters from a model's configuration",
    "files": "safetensors files with JSON metadata; the one reader that checks them",
    "backend": "the `Backend` protocol, the table of backends, the `Dispatcher`",
    "entropy": "range asymmetric numeral systems (rANS), streams, the model of coefficients",
    "calibration": "statistics of a model per layer; bases and codebooks trained on them",
    "methods": "`Method`, `CacheMethod`, their registry, the methods for tensors, one file each",
    "cross_layer": "`CrossLayerTransform`, its calibration, training and parameters",
    "compressed": "`CompressedKV`, `CompressedCache` and their sizes in bytes",
    "compressor": "`KVCacheCompressor`: validation, single tensors, single layers, whole caches",
    "caches": "`PagedKVCache`, `MlaCompressedKVCache` on one block manager; projections of latents",
    "plan": "a trained compressor for every layer, under a budget of bits or bytes",
    "integrations": "models of transformers: their caches, attention and gradients",
    "evaluation": "error measures in float64, continuation from a changed cache, rates of methods",
    "testing": "Hypothesis strategies, checks of methods and backends",
    "cli": "the command `kvcompress`",
}
"""Subjects of the packages of kvcompress; each imports only from those before it."""


AGREEMENTS = {
    SameBits: "bit for bit",
    SameValues: "equal",
    Rounded: "within rounding",
    Nearest: "as near, within rounding",
}


def methods_table() -> str:
    """All registered methods of this distribution: what they do, their settings, calibrations."""
    rows = [("method", "what it does", "settings", "calibration"), ("---",) * 4]
    known = known_methods()
    for name, cls in {**known, **known_cache_methods()}.items():
        if not cls.__module__.startswith("kvcompress."):
            continue
        need = ("optional" if name in known else "required") if name in CALIBRATIONS else "none"
        rows.append((f"`{name}`", summary(cls), settings(cls), need))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def operations_table() -> str:
    """All operations, and how closely the results of a backend must agree with the generic form."""
    rows = ["| operation | what it does | results agree |\n|---|---|---|\n"]
    for op in sorted(OPERATIONS.values(), key=lambda op: op.name):
        names = ", ".join(f"`{method}`" for method in op.methods)
        agreement = AGREEMENTS[type(op.agreement)]
        rows.append(f"| {names} | {op.summary.removesuffix('.')} | {agreement} |\n")
    return "".join(rows)


def packages_table() -> str:
    """Modules and packages of kvcompress in their order, and what each imports directly.

    Raises
    ------
    ValueError
        If one is missing, or imports from one that comes after it.
    """
    rows, order = ["| package | subject | imports |\n| --- | --- | --- |\n"], list(PACKAGES)
    root = Path(kvcompress.__file__).parent
    folders = (path.parent for path in root.glob("*/__init__.py"))
    there = {path.stem for path in (*root.glob("*.py"), *folders)}
    if strays := there - {*order, "__init__", "__main__"}:
        raise ValueError(f"docs/tables.py says nothing of {', '.join(sorted(strays))}")
    for name, subject in PACKAGES.items():
        found = sorted(imports(root, name), key=order.index)
        if late := [other for other in found if order.index(other) > order.index(name)]:
            raise ValueError(f"{name} imports {', '.join(late)}, which docs/tables.py has after it")
        rows.append(f"| `{name}` | {subject} | {', '.join(f'`{other}`' for other in found)} |\n")
    return "".join(rows)


def imports(root: Path, name: str) -> set[str]:
    """Other modules and packages of kvcompress that one of them imports."""
    files = [*root.glob(f"{name}.py"), *root.glob(f"{name}/**/*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return {part for p in parts if p[0] == "kvcompress" for part in p[1:2]} & set(PACKAGES) - {name}


def summary(cls: type) -> str:
    """First sentence of the docstring, on one line."""
    paragraph = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".")


def settings(cls: type) -> str:
    """Parameters of the constructor with their defaults."""
    parameters = inspect.signature(cls).parameters.values()
    shown = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    return ", ".join(f"`{text}`" for text in shown)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "add-a-backend.md": {"operations": operations_table},
    "architecture.md": {"packages": packages_table},
    "concepts.md": {"methods": methods_table},
}
"""Functions that make tables, by page and by the name between the marks."""


def pages() -> Iterator[tuple[Path, str]]:
    """Every page with tables, and what it should hold."""
    for name, tables in TABLES.items():
        content = (DOCS / name).read_text(encoding="utf-8")
        for mark, table in tables.items():
            before, start, rest = content.partition(f"<!-- {mark} -->\n")
            _, end, after = rest.partition("<!-- end -->")
            if not start or not end:
                raise ValueError(
                    f"{name} has no place for a table: <!-- {mark} --> ... <!-- end -->"
                )
            content = before + start + table() + end + after
        yield DOCS / name, content


def main() -> None:
    """Write all tables."""
    for page, content in pages():
        page.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
