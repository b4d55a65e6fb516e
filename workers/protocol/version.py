"""Version of the installed code.

Owns: that one string; an attempt records it, and drivers of another version do not
adopt.
"""

from importlib.metadata import PackageNotFoundError, version


def code_version() -> str:
    """Version of the distribution; `unknown` when running from a tree that was never
    installed.
    """
    try:
        return version("megatron-ray")
    except PackageNotFoundError:
        return "unknown"
