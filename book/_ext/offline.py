"""Keep the site readable offline, and its pages free of console errors.

Jupyter Book always loads ``sphinx_thebe``: every page would name a remote
host and declare one constant twice.
"""

from sphinx.application import Sphinx
from sphinx.config import Config


def disconnect_thebe(app: Sphinx, config: Config) -> None:
    """Undo what ``sphinx_thebe`` registered, before any of it runs."""
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if listener.handler.__module__.startswith("sphinx_thebe"):
                app.disconnect(listener.id)


def clean_assets(
    app: Sphinx, page: str, template: str, context: dict, doctree: object
) -> None:
    """Drop thebe's style sheet, and inline scripts that stand twice.

    A second ``let`` of the same name is an error.
    """
    context["css_files"] = [
        file
        for file in context["css_files"]
        if "thebe" not in str(file.filename)
    ]
    seen: set[str] = set()
    kept = []
    for script in context["script_files"]:
        body = script.attributes.get("body")
        if body is None or body not in seen:
            kept.append(script)
        seen |= {body} if body else set()
    context["script_files"] = kept


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("config-inited", disconnect_thebe)
    app.connect("html-page-context", clean_assets, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
