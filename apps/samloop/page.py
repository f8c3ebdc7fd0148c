"""The page at `/`: what is served, and every route, readable without internet."""

from __future__ import annotations

from html import escape
from typing import Any

#: Of every page.
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "td{padding:.1em 1em .1em 0;vertical-align:top}code{background:#eee}"
)


def render(
    info: dict[str, Any], routes: dict[str, Any], *, ohif: bool, user: str | None, address: str | None = None
) -> str:
    """HTML of the page.

    Args:
        info: What `/info/` answers.
        routes: ``paths`` of the OpenAPI schema.
        ohif: Whether the OHIF viewer has a DICOMweb server to show.
        user: Who logged in; None where nobody has to.
        address: The address for 3D Slicer on another computer, where people log in.
    """
    models = _table([(name, model.get("description", "")) for name, model in info["models"].items()])
    stats = info["datastore"]
    calls = _table(
        [
            (f"{method.upper()} {path}", call.get("summary", ""))
            for path, methods in sorted(routes.items())
            for method, call in methods.items()
        ]
    )
    viewer = '<li><a href="/ohif/">OHIF viewer</a></li>' if ohif else ""
    leave = (
        f'<form method="post" action="/logout">{escape(user)} <button>Log out</button></form>' if user else ""
    )
    keyed = (
        f"<p>3D Slicer on another computer, and its module for reviewers, need this address. It lets in as "
        f"{escape(user or '')}, and is good for 12 hours from the login: <code>{escape(address)}</code></p>"
        if address
        else ""
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["name"])}</title>'
        f"<style>{STYLE}</style>{leave}<h1>{escape(info['name'])}</h1>"
        f"<p>{stats.get('completed', 0)} of {stats.get('total', 0)} images accepted. In 3D Slicer, open the "
        f"module <em>MONAI Label</em> and enter this page's address.</p>{keyed}<ul>{viewer}"
        '<li><a href="/info/">info</a></li><li><a href="/datastore/?output=all">datastore</a></li>'
        '<li><a href="/openapi.json">the routes, for programs</a></li></ul>'
        f"<h2>Models</h2>{models}<h2>Routes</h2>{calls}</html>"
    )


def _table(rows: list[tuple[str, str]]) -> str:
    cells = (f"<tr><td><code>{escape(name)}</code></td><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{''.join(cells)}</table>"
