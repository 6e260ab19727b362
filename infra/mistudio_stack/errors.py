"""The one error of this package. It knows nothing of the backends that raise it."""


class StackError(Exception):
    """No Kafka and no S3 store, or not in a state to be used. `str(error)` says what; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}. {hint}")
        self.hint = hint
