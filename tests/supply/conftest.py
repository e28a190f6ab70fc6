"""The command line called in this process, as the tests of the commands have it."""

from tests.hedged.conftest import call, no_settings

__all__ = ["call", "no_settings"]
