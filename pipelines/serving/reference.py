"""The page /docs: the routes with their parameters, examples and answers, from the application's OpenAPI description.

It needs no network, as the usual pages for OpenAPI do.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; border-top: 1px solid #8884; padding-top: 1rem; }
code, pre { font: .9rem ui-monospace, monospace; }
pre { background: #8881; padding: .7rem; overflow: auto; }
td, th { text-align: left; padding: .1rem 1rem .1rem 0; vertical-align: top; font-weight: normal; }
:root { color-scheme: light dark; }
"""


def reference_page(description: Mapping[str, Any]) -> str:
    """Return the page as HTML.

    Args:
        description: The application's OpenAPI description (`FastAPI.openapi`).
    """
    parts = "".join(_routes(description))
    title = html.escape(f"{description['info']['title']} {description['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style><h1>{title}</h1>'
        f'<p>The same as data: <a href="openapi.json">openapi.json</a>. A form to try the model: <a href=".">/</a>. '
        f"Send the key, if the server has keys, as <code>Authorization: Bearer KEY</code>.</p>{parts}</html>"
    )


def _routes(description: Mapping[str, Any]) -> Iterator[str]:
    schemas = description.get("components", {}).get("schemas", {})
    for path, methods in description["paths"].items():
        for method, route in methods.items():
            yield f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(_text(route))}</p>"
            schema = _body(route, schemas)
            if schema is not None:
                yield f"<table>{''.join(_fields(schema))}</table>"
                for example in schema.get("examples", []):
                    yield f"<pre>{html.escape(json.dumps(example))}</pre>"
            answers = ((status, answer.get("description", "")) for status, answer in route["responses"].items())
            rows = (f"<tr><th>{status}<td>{html.escape(text)}" for status, text in answers)
            yield f"<details><summary>Answers</summary><table>{''.join(rows)}</table></details>"


def _text(route: Mapping[str, Any]) -> str:
    return str(route.get("description") or route.get("summary", ""))


def _body(route: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any] | None:
    content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] | None = schemas.get(name)
    return found


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        note = "required" if name in schema.get("required", ()) else f"default {json.dumps(field.get('default'))}"
        yield f"<tr><th><code>{html.escape(name)}</code><td>{html.escape(_kind(field))}<td>{html.escape(note)}"


def _kind(field: Mapping[str, Any]) -> str:
    """Return the type of a field in words."""
    if "anyOf" in field:
        return " or ".join(_kind(one) for one in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    return str(field.get("type", "any"))
