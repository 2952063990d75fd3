"""The commands as a user runs them, without the rest of pmc-data."""

import argparse
import sys

from data_tools.errors import UserError
from data_tools.fetch.command import add_arguments


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers(required=True))
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
