"""What every field of a spec takes, whatever its name."""

from typing import Any

import pytest
from pydantic import ValidationError

from workers.protocol.job import RestartConfig


@pytest.mark.parametrize("value", [0, 1, 1.0])
def test_a_number_is_no_switch(value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        RestartConfig(standby=value)
    assert caught.value.errors()[0]["type"] == "bool_type"
    assert RestartConfig(standby=False).standby is False
