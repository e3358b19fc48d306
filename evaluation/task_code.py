"""Tasks of a user's folder without running code that comes with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from paredown.compress.errors import PareError


def refuse_code(folder: Path) -> None:
    """Raise `PareError` if a task's YAML in a folder, or one that it includes, names a Python function.

    A metric of the library `evaluate` (`hf_evaluate`) is a script too.
    """
    seen: set[Path] = set()
    waiting = [path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml") and path.is_file()]
    while waiting:
        path = waiting.pop().resolve()
        if path in seen:
            continue
        seen.add(path)
        try:
            nodes = list(_nodes(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
            raise PareError(f"the task file {path} cannot be read: {' '.join(str(fault).split())}") from fault
        for node in nodes:
            if node.tag == "!function" or node.value == "hf_evaluate":
                said = f"!function {node.value}" if node.tag == "!function" else "hf_evaluate"
                raise PareError(
                    f"{path} names code that would be run: {said}, line {node.start_mark.line + 1}. "
                    "If you trust this folder, add --allow-task-code"
                )
        waiting += [path.parent / name for node in nodes for name in _included(node)]


def _nodes(root: Any) -> Iterator[Any]:
    """All nodes of a YAML document; of an alias, what it stands for, once."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _included(node: Any) -> Iterator[str]:
    """The files that a mapping of the YAML includes."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for value in (value for key, value in pairs if key.value == "include"):
        yield from (part.value for part in (value.value if isinstance(value, yaml.SequenceNode) else [value]))


@contextmanager
def templates_in_a_sandbox(wanted: bool) -> Iterator[None]:
    """While the `with` block runs, a task's Jinja templates reach nothing but the document, if that is `wanted`.

    lm-eval by itself renders them where they can call any Python.
    """
    import lm_eval.utils as lm
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    own = lm.env
    box = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    box.filters.update(own.filters)
    lm.env = box if wanted else own
    try:
        yield
    finally:
        lm.env = own
