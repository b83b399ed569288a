"""What both programs share: errors for users, flags, files that survive a kill, questions about the machine."""


class UserError(Exception):
    """The user's input or machine is at fault: the message says what, where and the cure; exit code 2."""
