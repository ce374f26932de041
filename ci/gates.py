"""Gates that no linter has: `python ci/gates.py [root]` prints what is wrong and exits 1, or exits 0.

`python ci/gates.py --bare` instead checks that this interpreter has neither torch nor jax nor transformers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

MAX_LINES = 500
SOURCES = {".py", ".h", ".c", ".cpp", ".sh", ".md", ".toml", ".yml", ".cfg"}
VENDORS = re.compile(
    r"(?<![a-z])(cuda|rocm|hip|nvidia|amd|intel|npu|ascend|tpu|xla|torch|jax|triton|mlx|mps|xpu|oneapi|avx\d*|amx"
    r"|is_(?:gpu|cpu))(?![a-z])",
    re.IGNORECASE,
)
ALLOWED = re.compile(r"torch_dtype")  # a field of Hugging Face configs
FRAMEWORKS = ("torch", "jax", "transformers")


def sources(root: Path, suffixes: set[str] = SOURCES) -> Iterator[Path]:
    """Text files under root that are ours: no hidden or built folders."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        built = any(p.startswith(".") or p in ("build", "dist") or p.endswith(".egg-info") for p in parts)
        if not built and path.suffix in suffixes and path.is_file():
            yield path


def vendor_names(root: Path) -> list[str]:
    """Every line of core that names a vendor, a framework or a device, comments included."""
    out = []
    for path in sources(root / "core" / "polyradix", SOURCES | {".txt"}):  # templates too
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = VENDORS.search(ALLOWED.sub("", line))
            if found:
                out.append(f"{path.relative_to(root)}:{number}: core names {found[0]!r}")
    return out


def long_files(root: Path) -> list[str]:
    """Every file of more than MAX_LINES lines."""
    counts = ((path, len(path.read_text().splitlines())) for path in sources(root))
    return [f"{p.relative_to(root)}: {n} lines; expected at most {MAX_LINES}" for p, n in counts if n > MAX_LINES]


def empty(root: Path) -> list[str]:
    """A gate that looked at nothing has not passed."""
    return [] if any(sources(root / "core" / "polyradix")) else [f"{root / 'core' / 'polyradix'}: no files found"]


def frameworks() -> list[str]:
    return [f"{name} is installed; core is to be tested without it" for name in FRAMEWORKS if find_spec(name)]


def main(args: list[str]) -> int:
    if args == ["--bare"]:
        problems = frameworks()
    else:
        root = Path(args[0] if args else ".").resolve()
        problems = [*empty(root), *vendor_names(root), *long_files(root)]
    print("\n".join(problems) or "gates: passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
