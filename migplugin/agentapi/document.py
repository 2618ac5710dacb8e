"""The status document as JSON: one form, and one published schema (docs/status.schema.json), everywhere."""

import inspect
import json

import msgspec

from migplugin.core.status import SCHEMA, Status
from migplugin.errors import AgentError


def encode(status: Status) -> bytes:
    return msgspec.json.encode(status)


def decode(document: bytes) -> Status:
    """Raises AgentError where it is a document of another version. Fields that are new are left out."""
    try:
        status = msgspec.json.decode(document, type=Status)
    except (msgspec.MsgspecError, ValueError) as exc:
        raise AgentError(f"the agent's status is of another version: {exc}") from exc
    if status.schema != SCHEMA:
        raise AgentError(f"the agent's status is of another version: {status.schema[:100]}, not {SCHEMA}")
    return status


def text(status: Status) -> str:
    """For people and programs that read what a command prints."""
    return msgspec.json.format(encode(status), indent=2).decode()


def schema() -> str:
    """The JSON Schema of the document. What it describes is described in the words of the code."""
    found = msgspec.json.schema(Status)
    for definition in found["$defs"].values():
        # Python before 3.13 keeps the margin of docstrings.
        definition["description"] = inspect.cleandoc(definition["description"]).replace("None", "null")
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA}
    return json.dumps(dialect | found, indent=2)
