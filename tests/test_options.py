"""A wrong option of any command beside `python -m gradflow` is one line, and exit code 1."""

import pytest

from analysis import classics, compare, facets
from experiments import __main__ as experiments
from experiments import demo
from gradflow import report


@pytest.mark.parametrize("command", [classics, compare, facets, experiments, demo, report])
def test_a_wrong_option_is_one_line(command, capsys):
    given = ["a", "b"] if command is compare else []
    assert command.main([*given, "--nonsense"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    name, _, said = line.partition(": ")
    assert name in ("gradflow", "classics", "experiments", "demo")
    assert said == "unrecognized arguments: --nonsense; --help lists what there is"
