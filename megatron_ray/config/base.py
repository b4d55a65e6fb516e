"""Defines the base class of every part of a spec that a user may write.

Owns: strictness of parsing. Must not know: any field.
"""

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megatron_ray.config.parsing.numbers import whole_number


class Config(BaseModel):
    """Base of all config classes: frozen, and strict about unknown keys.

    The string under a field is its documentation: it becomes the field's description in
    the JSON schema, in /openapi.json and in the reference of job specs.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_default=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads `1e3` as a whole number, true as none, and 1 not as true."""
        # Most values are right as they are.
        if value is None or isinstance(value, dict) or info.field_name is None:
            return value
        kinds = _scalar_kinds(cls.model_fields[info.field_name].annotation)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and bool in kinds and not kinds & {int, float, str}:
            raise PydanticCustomError("bool_type", "Input should be true or false")
        if not kinds & {int, float} or kinds & {str, bool}:
            return value
        return read_number(value, is_whole=int in kinds)


def read_number(value: Any, *, is_whole: bool) -> Any:
    """Returns the number that a value stands for, or else the value itself."""
    if isinstance(value, list):
        return [read_number(item, is_whole=is_whole) for item in value]
    if isinstance(value, str) and is_whole:
        number = whole_number(value)
        # Other texts are left to the field, which may allow some.
        if number is not None:
            return number
    # Python counts True as 1.
    if isinstance(value, bool):
        if is_whole:
            raise PydanticCustomError("int_type", "Input should be a whole number")
        raise PydanticCustomError("float_type", "Input should be a number")
    return value


def _scalar_kinds(annotation: Any) -> set[Any]:
    """Returns the types in an annotation such as `Annotated[int, ...] | None`."""
    # The texts of a Literal are no number, so it does not matter which they are.
    if get_origin(annotation) is Literal:
        return set()
    kinds = {annotation}
    for argument in get_args(annotation):
        kinds |= _scalar_kinds(argument)
    return kinds
