"""What can end the local stack, as one sentence for the person at the terminal."""


class LocalError(Exception):
    """The stack cannot start, go on or finish; the text says what, and what to do."""


class Refused(LocalError):
    """The service does not take the order. The order is at fault and the stack is sound."""


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP asked the launcher to end."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number
