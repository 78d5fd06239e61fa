"""What is printed as a table or a page, by the templates of configs/pages/."""

from typing import Any

import jinja2

from bridge.settings import CONFIGS


def page(template: str, **content: Any) -> str:
    """A page by its template, without a line end at the end."""
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(CONFIGS / "pages"), undefined=jinja2.StrictUndefined,
                               trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(template).render(content).strip("\n")
