"""An error the user can fix."""


class InputError(ValueError):
    """Bad input: the message names the argument or file, what was given and how to fix it.

    The command line prints it as one line and exits with status 2; any other exception is a defect
    of this program and keeps its stack trace.
    """
