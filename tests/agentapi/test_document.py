"""The status document as JSON: what another version of us makes of it, and its schema."""

import json
from pathlib import Path

import pytest

from migplugin.agentapi.document import decode, encode, schema, text
from migplugin.core.status import SCHEMA
from migplugin.errors import AgentError
from tests.agentapi.test_socket import document


def test_what_is_encoded_is_decoded_and_printed_the_same() -> None:
    assert decode(encode(document())) == document() == decode(text(document()).encode())


def test_a_field_that_is_new_is_left_out_and_one_that_is_missing_is_another_version() -> None:
    known = json.loads(encode(document()))
    assert decode(json.dumps(known | {"new": 1}).encode()) == document()
    del known["gpus"]
    others: list[object] = [known, [], {"schema": 1}]
    for other in others:
        with pytest.raises(AgentError, match="of another version"):
            decode(json.dumps(other).encode())
    with pytest.raises(AgentError, match="of another version"):
        decode(b"\xff")
    with pytest.raises(AgentError, match="of another version: migplugin/status/v9, not"):
        decode(encode(document()).replace(SCHEMA.encode(), b"migplugin/status/v9"))


def test_the_schema_names_every_field_of_the_document_and_is_the_published_one() -> None:
    published = (Path(__file__).parents[2] / "docs/status.schema.json").read_text()
    assert published == schema() + "\n", "make derived"
    found = json.loads(schema())
    assert found["$defs"]["Status"]["required"] == list(json.loads(encode(document())))
    assert "None" not in published
