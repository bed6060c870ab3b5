"""The built-in corpus `python-docs`: the documentation of the Python standard library that is on the machine.

As documents, of two kinds: the topics of the language reference that `help()` shows (`pydoc_data.topics`), and one document a
module, rendered from its docstrings and signatures. As questions and answers about the functions and classes of the modules.
Modules are parsed; nothing is imported or run.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from nemo_ext.errors import UserError

# Tests, an editor, a refactoring tool with its grammar, demos, installers and tables: code, not documentation.
SKIPPED_PACKAGES = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "__pycache__",
    "__phello__",
}
MINIMUM_LENGTH = 200  # characters; below this a module has nothing to say
QUESTIONS_VERSION = 1  # raise it when `questions` says something else
SHORTEST_ANSWER, LONGEST_ANSWER = 30, 600  # characters

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> Iterator[tuple[str, str]]:
    """Pairs (title, text) in a fixed order: topics by name, then modules by name. Raises UserError without a library on disk."""
    topics = _topics()
    for name in sorted(topics):
        yield f"topic {name}", topics[name].strip() + "\n"
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(_modules(root), key=lambda p: p.relative_to(root).as_posix()):
        text = _module_document(path, _dotted_name(path.relative_to(root)))
        if text is not None:
            found = True
            yield f"module {_dotted_name(path.relative_to(root))}", text
    if not found:
        raise UserError(f"data=python-docs: no library sources in {root}: install Python's standard library with its sources")


def questions() -> Iterator[dict]:
    """Conversations {"messages": [...]} in a fixed order: what a function or class is for, then how a function is called.

    Answers are the first paragraph of the docstring and the signature; private names and answers of a word or two are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(_modules(root), key=lambda p: p.relative_to(root).as_posix()):
        name = _dotted_name(path.relative_to(root))
        if (tree := _parsed(path)) is None or any(part.startswith("_") for part in name.split(".")):
            continue
        for node, qualified in _definitions(tree, f"{name}."):
            about = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if not SHORTEST_ANSWER <= len(about) <= LONGEST_ANSWER:
                continue
            if isinstance(node, ast.ClassDef):
                turns = [f"What is the class {qualified} of Python's standard library?", about]
            else:
                call = f"{qualified}({ast.unparse(node.args)})"
                turns = [f"What does {qualified} do in Python's standard library?", about, "How is it called?", call]
            roles = ("user", "assistant") * (len(turns) // 2)
            yield {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]}


def _definitions(node: ast.AST, owner: str) -> Iterator[tuple[Definition, str]]:
    """Public functions and classes with their dotted names, methods among them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.If, ast.Try)):
            yield from _definitions(child, owner)
        elif isinstance(child, Definition) and not child.name.startswith("_"):
            yield child, f"{owner}{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{owner}{child.name}.")


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions put it in a package of its own
        return {}
    return topics


def _modules(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED_PACKAGES and not f.startswith((".", "config-"))]
        yield from (Path(folder, f) for f in files if f.endswith(".py"))


def _dotted_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_document(path: Path, name: str) -> str | None:
    if (tree := _parsed(path)) is None:
        return None
    parts = [f"# {name}", ast.get_docstring(tree) or ""]
    parts += [text for node in tree.body for text in _describe(node, "")]
    text = "\n\n".join(p for p in parts if p) + "\n"
    return text if len(text) >= MINIMUM_LENGTH and len(parts) > 1 else None


def _parsed(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library's own sources
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None  # templates that are not Python


def _describe(node: ast.AST, owner: str) -> Iterator[str]:
    """The heading and docstring of a documented definition, then those inside it. Definitions under `if` and `try` count too."""
    if isinstance(node, (ast.If, ast.Try)):
        for child in ast.iter_child_nodes(node):
            yield from _describe(child, owner)
    if not isinstance(node, Definition):
        return
    doc = ast.get_docstring(node)
    name = f"{owner}{node.name}"
    if isinstance(node, ast.ClassDef):
        inner = [text for child in node.body for text in _describe(child, f"{name}.")]
        if doc or inner:
            yield f"## class {name}{_bases(node)}"
            if doc:
                yield doc
            yield from inner
    elif doc:
        yield f"### {name}({ast.unparse(node.args)}){f' -> {ast.unparse(node.returns)}' if node.returns else ''}"
        yield doc


def _bases(node: ast.ClassDef) -> str:
    return f"({', '.join(ast.unparse(b) for b in node.bases)})" if node.bases else ""
