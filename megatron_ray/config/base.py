"""Defines the base class of every part of a spec that a user may write.

Owns: strictness of parsing. Must not know: any field.
"""

from pydantic import BaseModel, ConfigDict


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
