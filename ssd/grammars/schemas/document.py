"""A JSON schema as a document: where its references lead."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from .shapes import ShapeCheck
from .terms import ANNOTATIONS, SchemaError, is_object, joined

ROOT = "#"
MAX_FOLLOWED = 32
"""References in a row that are followed before the schema counts as one that never ends."""


class Document:
    """The whole schema that a user gave.

    Args:
        root: The parsed schema.

    Raises:
        SchemaError: A keyword has a wrong value.
    """

    def __init__(self, root: Any):
        self.root = root
        self._shapes = ShapeCheck()
        self._shapes.check(root, ROOT)
        self._own = str(root.get("$id", "")).rstrip("#") if is_object(root) else ""

    @property
    def paths(self) -> frozenset[str]:
        """Where schemas stand, as far as they were looked at."""
        return frozenset(self._shapes.seen)

    def target(self, ref: Any, path: str) -> tuple[str, Any]:
        """Returns the path and the schema that a ``$ref`` at ``path`` names.

        Raises:
            SchemaError: It names another document, or nothing.
        """
        if not isinstance(ref, str):
            raise SchemaError("$ref", path, "must be a text")
        document, _, fragment = ref.partition("#")
        if document and document != self._own:
            raise SchemaError("$ref", path, "refers to another document; the server does not fetch any")
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            found = self._anchored(self.root, ROOT, fragment)
        else:
            found = self.at(ROOT + fragment)
        if found is None:
            raise SchemaError("$ref", path, f"names {ref[:100]!r}, which is not in the schema")
        self._shapes.check(found[1], found[0])
        return found

    def followed(self, schema: Any, path: str) -> Any:
        """Returns what a schema that is only a reference refers to in the end; any other schema as it is.

        Raises:
            SchemaError: As ``target``, or the references lead in a circle.
        """
        for _ in range(MAX_FOLLOWED):
            if not is_object(schema) or "$ref" not in schema or set(schema) - ANNOTATIONS != {"$ref"}:
                return schema
            path, schema = self.target(schema["$ref"], path)
        raise SchemaError("$ref", path, "leads back to itself")

    def at(self, pointer: str) -> tuple[str, Any] | None:
        """Returns what stands at a JSON pointer that begins with ``#``, and its path; None if nothing does."""
        found, path = self.root, ROOT
        for part in pointer.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if is_object(found) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                return None
            path = joined(path, name)
        return path, found

    def _anchored(self, schema: Any, path: str, anchor: str) -> tuple[str, Any] | None:
        if is_object(schema) and schema.get("$anchor") == anchor:
            return path, schema
        parts = schema.items() if is_object(schema) else enumerate(schema) if isinstance(schema, list) else ()
        return next((found for key, part in parts if (found := self._anchored(part, joined(path, key), anchor))), None)
