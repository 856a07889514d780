"""The one exception that means: the user can mend this. It needs nothing but Python, so everything may raise it."""


class InputError(ValueError):
    """
    Something given by the user is wrong: a file, a key, a value, a folder.

    The message is one line that names what was given and what would be right. The command line prints it and exits
    with 2; from Python it is a `ValueError` like any other.
    """
