"""Templates of pages. What they are given is text, and is escaped: names and texts come from anywhere."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("paredown.evaluation.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **context: Any) -> str:
    """A page of one of the `templates`."""
    return _environment().get_template(template).render(**context) + "\n"
