"""What can go wrong in the lab itself, as opposed to in what is tested there."""

from __future__ import annotations


class LabError(Exception):
    """The lab cannot do what was asked of it; the text says why."""


class Unfit(LabError):
    """This machine cannot carry a lab at all: the tests are skipped with this text as the reason."""


class HostDown(LabError):
    """The host has no power at the moment."""


class TookTooLong(LabError):
    """Something did not come true before its deadline."""


class CommandFailed(LabError):
    """A command ended with another code than 0.

    Attributes:
        code: the exit code.
        output: what the command printed, both streams together.
    """

    def __init__(self, what: str, code: int, output: str) -> None:
        super().__init__(f"{what} ended with {code}:\n{output.rstrip()}")
        self.code = code
        self.output = output
