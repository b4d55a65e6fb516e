"""Reads the version of the installed code.

An attempt records it, and a driver of another version restarts the ranks it adopts.
"""

from importlib.metadata import PackageNotFoundError, version


def code_version() -> str:
    """Returns the distribution's version, or `unknown` if it is not installed."""
    try:
        return version("megatron-ray")
    except PackageNotFoundError:
        return "unknown"
