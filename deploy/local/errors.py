"""Define the errors that end the local stack, with a sentence for the terminal."""


class LocalError(Exception):
    """The stack cannot start, continue or finish; the text says why, and what to do."""


class Refused(LocalError):
    """The service refuses the request. The request is at fault, not the stack."""


class Interrupted(Exception):
    """The launcher was interrupted by Ctrl-C, SIGTERM or SIGHUP."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number
