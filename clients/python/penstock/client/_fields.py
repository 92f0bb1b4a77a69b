"""Values into messages: one that a field can not hold is refused by the field's public path, before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from penstock.client.errors import InvalidRequest

__all__ = ["filled", "put"]

M = TypeVar("M", bound=Message)

_TYPES = {
    FieldDescriptor.TYPE_UINT32: "a whole number from 0 to 4294967295",
    FieldDescriptor.TYPE_UINT64: "a whole number from 0 to 18446744073709551615",
    FieldDescriptor.TYPE_SINT32: "a whole number from -2147483648 to 2147483647",
    FieldDescriptor.TYPE_FLOAT: "a number",
    FieldDescriptor.TYPE_BOOL: "true or false",
    FieldDescriptor.TYPE_STRING: "text that UTF-8 can hold",
}
_LONGEST_VALUE = 60


def filled(kind: type[M], values: Mapping[str, Any], path: str = "") -> M:
    """A message of these values, by field; None leaves a field unset. `path` stands before the fields' names in an error.

    Raises:
        InvalidRequest: a field can not hold its value; names the field and what would be right.
    """
    message = kind()
    for name, value in values.items():
        put(message, name, value, f"{path}{name}")
    return message


def put(message: Message, name: str, value: object, path: str) -> None:
    """Set one field, which an error calls `path`; raises as `filled`."""
    try:
        message.MergeFrom(type(message)(**{name: dict(value) if isinstance(value, Mapping) else value}))
    except (TypeError, ValueError) as error:
        right = _right(cast("FieldDescriptor", message.DESCRIPTOR.fields_by_name[name]))  # the two kinds of it have one face
        raise InvalidRequest.field(path, f"must be {right}, and is {_shown(value)}") from error


def _right(field: FieldDescriptor) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return f"a mapping from {_TYPES[key.type]} to {_TYPES[value.type]}"
    if field.message_type is Struct.DESCRIPTOR:
        return "a mapping from names to texts, numbers, true, false and None"
    one = _TYPES.get(field.type, field.name)
    return f"a sequence, of which each is {one}" if field.is_repeated else one


def _shown(value: object) -> str:
    """A value in a few letters: of a long sequence, those that are wrong are not to be seen in any case."""
    text = ascii(value)
    if len(text) <= _LONGEST_VALUE:
        return text
    many = f" of {len(value)}" if isinstance(value, Sequence) else ""
    return f"{text[:_LONGEST_VALUE]}… (a {type(value).__name__}{many})"
