"""What both programs share: errors for users, flags, durable files, processes, the machine, models on the hub."""


class UserError(Exception):
    """The user's input or machine is at fault: the message says what, where and the cure, on one line whatever a
    file's names and texts have in them; exit code 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())
