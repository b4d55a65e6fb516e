"""The one base class of everything a user may write.

Owns: strictness. Must not know: any field.
"""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen, refuses unknown keys; the string under a field is its documentation and
    its schema description.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_default=True,
    )
