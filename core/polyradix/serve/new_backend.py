"""`polyradix new-backend NAME`: a package outside this tree, with every method of the contract to fill.

The methods are read from the contract's own source, so that they cannot drift from it.
"""

from __future__ import annotations

import ast
import inspect
import re
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from polyradix import __version__
from polyradix.backend import protocol
from polyradix.backend.alone import Alone
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expansions
from polyradix.backend.registry import GROUP

FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "init.py": "polyradix_@name@/__init__.py",
    "backend.py": "polyradix_@name@/backend.py",
    "ops.py": "polyradix_@name@/ops.py",
    "test_conformance.py": "tests/test_conformance.py",
    "conformance.yml": ".github/workflows/conformance.yml",
}
EXTRA = {c.__name__: c.__module__ for c in (Alone, Expansions, Unsupported)}  # besides what the contract imports
SOURCE = inspect.getsource(protocol)
TREE = ast.parse(SOURCE)


class NewBackendError(ValueError):
    """The package cannot be written; the message says why."""


def new_backend(name: str, path: Path | None = None) -> list[Path]:
    """Writes the package into `path`, by default ./polyradix-NAME, which must not exist; returns the files.

    Raises NewBackendError for a name or a path that cannot be used.
    """
    _check_name(name)
    path = path or Path(f"polyradix-{name.replace('_', '-')}")
    if path.exists():
        raise NewBackendError(f"path is '{path}', which exists; expected a new folder")
    out = {path / file: text for file, text in render(name).items()}
    for file, text in out.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return list(out)


def render(name: str) -> dict[str, str]:
    """The package's files by their path in it."""
    inherited = [f"`{n}`" for n in vars(protocol.Ops) if hasattr(Expansions, n) and not n.startswith("_")]
    words = {
        "name": name,
        "dist": name.replace("_", "-"),
        "Class": "".join(part.capitalize() for part in name.split("_")),
        "version": __version__,
        "protocol": str(protocol.PROTOCOL_VERSION),
        "inherited": f"{', '.join(inherited[:-1])} and {inherited[-1]}",
    }
    out = {}
    for template, target in FILES.items():
        text = _filled((files("polyradix.serve") / "templates" / f"{template}.txt").read_text(), words)
        methods = _methods("Ops" if template == "ops.py" else "Backend")
        text = text.replace("@stubs@", "\n\n".join(map(_stub, methods)))
        out[_filled(target, words)] = text.replace("@imports@", _imports(text)) if "@imports@" in text else text
    return out


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise NewBackendError(
            f"name is {name!r}; expected lower-case letters, digits and _, as in a Python module's name"
        )
    if name == "auto" or name in entry_points(group=GROUP).names:
        raise NewBackendError(f"name is {name!r}, which is taken; expected one that `--device` does not know yet")
    if find_spec(f"polyradix_{name}"):
        raise NewBackendError(f"name is {name!r}, but a package polyradix_{name} is installed; expected another name")


def _methods(title: str) -> list[ast.FunctionDef]:
    """The methods of a protocol that a backend has to write itself."""
    body = next(node.body for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == title)
    return [n for n in body if isinstance(n, ast.FunctionDef) and not hasattr(Expansions, n.name)]


def _stub(node: ast.FunctionDef) -> str:
    """Its signature, the comment beside it as docstring, and Unsupported."""
    signature = str(ast.get_source_segment(SOURCE, node)).removesuffix(" ...")
    _, _, comment = SOURCE.splitlines()[(node.end_lineno or 0) - 1].partition("  # ")
    if re.match("[a-z]+[ ,;]", comment):
        comment = comment[0].upper() + comment[1:]
    lines = [signature, *([f'    """{comment}."""'] if comment else []), f'    raise Unsupported("{node.name}")']
    return "\n".join(f"    {line}" for line in lines)


def _imports(text: str) -> str:
    """Import lines for the names that the module `text` takes from the contract."""
    imports = [node for node in TREE.body if isinstance(node, ast.ImportFrom)]
    origin = EXTRA | {alias.name: str(node.module) for node in imports for alias in node.names}
    code = ast.walk(ast.parse(text.replace("@imports@", "")))
    modules: dict[str, set[str]] = {}
    for name in {node.id for node in code if isinstance(node, ast.Name)}:
        if name in origin or hasattr(protocol, name):
            modules.setdefault(origin.get(name, protocol.__name__), set()).add(name)
    lines = {module: _import(module, modules[module]) for module in sorted(modules)}
    ours = [line for module, line in lines.items() if module.startswith("polyradix")]
    others = [line for module, line in lines.items() if not module.startswith("polyradix")]
    groups = [["from __future__ import annotations"], others, ours]
    return "\n\n".join("\n".join(group) for group in groups if group)


def _import(module: str, names: set[str]) -> str:
    ordered = sorted(names, key=lambda n: (not n.isupper(), n.lower()))
    line = f"from {module} import {', '.join(ordered)}"
    return line if len(line) <= 120 else f"from {module} import (\n    " + ",\n    ".join(ordered) + ",\n)"


def _filled(text: str, words: dict[str, str]) -> str:
    return re.sub("@(" + "|".join(words) + ")@", lambda m: words[m[1]], text)
