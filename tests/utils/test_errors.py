"""Bad input and interruptions of the command lines."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from looc_ldm.utils.errors import DataError, Terminated, UserError, one_line, one_line_errors


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (UserError("colour must be red, got 'blue'."), 2, "error: colour must be red, got 'blue'."),
        (ValueError("several\n  lines"), 2, "error: several lines"),
        (TimeoutError(), 2, "error: TimeoutError"),
        (OSError(28, "No space left on device", "a.png"), 2, "error: [Errno 28] No space left on device: 'a.png'"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 2, "error: 'utf-8' codec can't decode byte 0xff"),
        (yaml.YAMLError("mapping values are not allowed"), 2, "error: mapping values are not allowed"),
        (
            DataError(
                "Caught DataError in DataLoader worker process 0.\nTraceback\nlooc_ldm.errors.DataError: cut off"
            ),
            2,
            "error: cut off",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("interrupted: it goes on"), 130, "interrupted: it goes on"),
        (Terminated("saved"), 143, "saved"),
    ],
)
def test_one_line_and_a_status(raised, status, line, capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise raised
    assert stopped.value.code == status
    assert capsys.readouterr().err.strip().startswith(line)


def test_an_error_of_wandb_such_as_a_missing_login_is_one_line(monkeypatch, capsys):
    wandb = ModuleType("wandb")
    wandb.Error = type("Error", (Exception,), {})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(SystemExit), one_line_errors():
        raise wandb.Error("No API key configured.\nUse `wandb login` to log in.")
    assert capsys.readouterr().err == "error: No API key configured. Use `wandb login` to log in.\n"


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("vqvae")


def test_the_message_of_a_system_error_names_its_file_once():
    error = OSError(2, "No such file or directory", "a.png")
    assert one_line(error) == "No such file or directory: 'a.png'"
    assert one_line(error, Path("a.png")) == "No such file or directory"
    assert one_line(OSError("several\n  lines")) == "several lines"
