"""What the command lines make of bad input and of interruptions."""

import pytest

from looc_ldm.errors import Terminated, UserError, one_line_errors


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (UserError("colour must be red, got 'blue'."), 2, "error: colour must be red, got 'blue'."),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("interrupted: it goes on"), 130, "interrupted: it goes on"),
        (Terminated("saved"), 143, "saved"),
    ],
)
def test_one_line_and_a_status(raised, status, line, capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise raised
    assert stopped.value.code == status
    assert capsys.readouterr().err.strip() == line
