"""What both programs share: errors for users, flags, durable files, processes, the machine, models on the hub."""


class UserError(Exception):
    """The user's input or machine is at fault: the message says what, where and the cure; exit code 2."""
