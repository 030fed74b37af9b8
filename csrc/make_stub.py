"""Writes comoe/_C.pyi, the types of the native module, from the signatures that pybind11 gives it.

python csrc/make_stub.py          # after a change in csrc/bindings; tests/test_build.py compares
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

STUB = Path(__file__).resolve().parent.parent / "comoe" / "_C.pyi"
HEADER = '''"""Native half of comoe (csrc). Written by csrc/make_stub.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import Buffer
'''
SIMPLER = (
    (r"typing\.SupportsInt \| typing\.SupportsIndex", "int"),
    (r"typing\.SupportsFloat \| typing\.SupportsIndex", "float"),
    (r"typing\.Annotated\[numpy\.typing\.ArrayLike, numpy\.\w+\]", "np.ndarray"),
    (r"numpy\.typing\.NDArray\[numpy\.\w+\]", "np.ndarray"),
    (r'typing\.Annotated\[(collections\.abc\.Sequence\[\w+\]), "FixedSize\(\d+\)"\]', r"\1"),
    (r"typing_extensions\.Buffer", "Buffer"),
    (r"collections\.abc\.", ""),
    (r"comoe\._C\.", ""),
    (r": object", ": Any"),
    (r"-> object", "-> Any"),
    (r"\(self: \w+", "(self"),
)


def signature(text: str) -> str:
    for pattern, plain in SIMPLER:
        text = re.sub(pattern, plain, text)
    return text


def first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0]


def class_stub(cls: type) -> list[str]:
    bases = (
        [] if cls.__base__.__name__ in ("object", "pybind11_object") else [cls.__base__.__name__]
    )
    lines = [f"class {cls.__name__}{'(' + bases[0] + ')' if bases else ''}:"]
    for name, member in vars(cls).items():
        if isinstance(member, property):
            kind = re.search(r"-> (.+)$", first_line(member.fget.__doc__))
            lines += [
                "    @property",
                f"    def {name}(self) -> {signature(kind[1]) if kind else 'Any'}: ...",
            ]
        elif (
            callable(member)
            and "->" in first_line(member.__doc__)
            and name in ("__init__", name.lstrip("_"))
        ):
            lines.append(f"    def {signature(first_line(member.__doc__))}: ...")
    return lines if len(lines) > 1 else [lines[0] + " ..."]


def stub(module: ModuleType) -> str:
    lines = []
    for name in sorted(n for n in dir(module) if not n.startswith("_")):
        thing = getattr(module, name)
        if isinstance(thing, type):
            lines += class_stub(thing)
        elif callable(thing):
            lines.append(f"def {signature(first_line(thing.__doc__))}: ...")
        else:
            lines.append(f"{name}: {type(thing).__name__}")
    return HEADER + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(STUB.parent.parent))
    from comoe import _C

    STUB.write_text(stub(_C))
