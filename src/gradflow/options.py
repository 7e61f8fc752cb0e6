"""The options of the commands beside `python -m gradflow`: one that is wrong is one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from gradflow.errors import GradflowError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose `parse_args` raises GradflowError, in place of ending the process
    after the usage."""

    def error(self, message: str) -> NoReturn:
        raise GradflowError(f"{message}; --help lists what there is")
