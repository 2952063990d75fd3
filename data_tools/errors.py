"""The one exception for what a user can mend."""


class UserError(Exception):
    """Bad input that its owner can mend, told in one sentence.

    The sentence names the file or key, what was found, what was expected and what to do. The command
    lines print it without a traceback and exit with status 2. Anything else that is raised is a bug.
    """
