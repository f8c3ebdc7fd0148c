"""The errors that the server tells its client about: bad input, what is not there, what cannot be written."""


class InputError(ValueError):
    """Input that cannot be used, told so that its sender can mend it.

    The text names the argument, the value and the remedy. The server answers it with ``status``
    (a 4xx), never with a 500.

    Args:
        argument: Name of the offending argument as the client sent it.
        value: What was received; its repr is cut to 200 characters.
        remedy: What to send instead.
        status: HTTP status, 400 to 499.
    """

    def __init__(self, argument: str, value: object, remedy: str, *, status: int = 400) -> None:
        if not 400 <= status <= 499:
            raise ValueError(f"status must lie in 400..499, got {status}")
        shown = repr(value)
        shown = shown if len(shown) <= 200 else shown[:197] + "..."
        super().__init__(f"{argument} = {shown}: {remedy}")
        self.argument = argument
        self.status = status


class UnavailableError(RuntimeError):
    """Something outside that is needed does not answer now; the server answers 503 with this text.

    Args:
        what: What is needed, as in "the DICOMweb server http://pacs/dicom-web".
        reason: Why it cannot be had.
        remedy: What the client, or whoever looks after the server, can do.
    """

    def __init__(self, what: str, reason: str, remedy: str) -> None:
        super().__init__(f"{what}: {reason}; {remedy}")
        self.reason = reason


class StorageError(OSError):
    """What was sent cannot be written, and nothing was changed; the server answers 507 with this text.

    Args:
        what: What was to be written, as in "label final of case_7".
        error: Why it was not.
    """

    def __init__(self, what: str, error: OSError) -> None:
        reason = error.strerror or str(error)
        super().__init__(
            f"{what} was not saved ({reason}), and what was there before is unchanged; make room on the "
            "server's disk, or let the server write there, and send it again"
        )
        self.errno = error.errno
