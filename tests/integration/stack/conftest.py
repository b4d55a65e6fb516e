"""The stack that all tests of this folder share; tests/conftest.py keeps them in one process."""

from tests.support.running_stack import road

__all__ = ["road"]
