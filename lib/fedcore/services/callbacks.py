"""What people who embed a server may follow."""

from __future__ import annotations

from fedcore.services.reporting import IterationEnd


class Callback:
    """Override what you need; every method runs in the reactor's thread, so none may take long.

    An exception of a callback is logged and changes nothing else.
    """

    def after_started(self) -> None:
        """Act once the server listens."""

    def before_stopped(self) -> None:
        """Act before the server closes its listeners."""

    def on_iteration_end(self, end: IterationEnd) -> None:
        """Act after each iteration, valid or not."""
