"""What hostile programs have started ends with their test, as in the system tests."""

from tests.system.conftest import _end_what_was_started

__all__ = ["_end_what_was_started"]
