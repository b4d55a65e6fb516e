"""Writes transformer_engine.json anew from the library's own source, without importing it:
`python -m tests.golden.transformer_engine FOLDER VERSION`, where FOLDER has the package
`transformer_engine` as in its wheel. A change of the file is a change of the library's
interface: look at the calls.
"""

import ast
import json
import sys
from pathlib import Path

GOLDEN = Path(__file__).with_suffix(".json")
CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "pytorch": {
        "Linear": ("__init__", "forward"),
        "LayerNormLinear": ("__init__", "forward"),
        "GroupedLinear": ("__init__", "forward"),
        "DotProductAttention": ("__init__", "forward"),
        "Fp8Padding": ("__init__", "forward"),
        "Fp8Unpadding": ("__init__", "forward"),
        "autocast": ("__init__",),
    },
    "common.recipe": {
        "Float8CurrentScaling": (),
        "Float8BlockScaling": (),
        "MXFP8BlockScaling": (),
        "Format": (),
    },
}
"""What the project uses: package -> class -> methods; of those without, their fields."""


def class_of(source: Path, package: str, name: str) -> ast.ClassDef:
    """The class that a package exports by this name, wherever it is defined."""
    folder = source / "transformer_engine" / package.replace(".", "/")
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in {
            alias.asname or alias.name for alias in node.names
        }:
            # Relative to this package, or to that of this file.
            base = package.split(".") if folder.is_dir() else package.split(".")[:-1]
            base = base[: len(base) - node.level + 1] if node.level else []
            module = (node.module or "").removeprefix("transformer_engine.")
            return class_of(source, ".".join([*base, module]), name)
    raise SystemExit(f"{package} exports no class {name}")


def parameters(function: ast.FunctionDef) -> list[str]:
    """The parameters without self: `name`, `name=default`, `*name`, `**name`."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args][1:]
    missing = len(positional) - len(arguments.defaults)
    defaults: list[ast.expr | None] = [*[None] * missing, *arguments.defaults]
    rows = [
        _row(each.arg, default) for each, default in zip(positional, defaults, strict=True)
    ]
    if arguments.vararg is not None:
        rows.append(f"*{arguments.vararg.arg}")
    for each, keyword_default in zip(
        arguments.kwonlyargs, arguments.kw_defaults, strict=True
    ):
        rows.append(f"keyword {_row(each.arg, keyword_default)}")
    if arguments.kwarg is not None:
        rows.append(f"**{arguments.kwarg.arg}")
    return rows


def _row(name: str, default: ast.expr | None) -> str:
    return name if default is None else f"{name}={ast.unparse(default)}"


def fields(definition: ast.ClassDef) -> list[str]:
    """The annotated fields of a dataclass, or the members of an enumeration."""
    names = []
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
        elif isinstance(node, ast.Assign) and definition.name == "Format":
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names


def interface(source: Path) -> dict[str, dict[str, dict[str, list[str]]]]:
    packages: dict[str, dict[str, dict[str, list[str]]]] = {}
    for package, classes in CLASSES.items():
        packages[package] = {}
        for name, methods in classes.items():
            definition = class_of(source, package, name)
            functions = {
                node.name: node
                for node in definition.body
                if isinstance(node, ast.FunctionDef)
            }
            packages[package][name] = {
                method: parameters(functions[method]) for method in methods
            } or {"fields": fields(definition)}
    return packages


def main(folder: str, version: str) -> None:
    recorded = {"version": version, **interface(Path(folder))}
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
