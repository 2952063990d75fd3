"""Command lines whose errors are for people."""

import argparse
from typing import NoReturn

from data_tools.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        """End with a sentence instead of a usage text."""
        raise UserError(f"{message}; see {self.prog} --help")
