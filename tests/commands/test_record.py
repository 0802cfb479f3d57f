"""The record of an evaluation can be repeated, read and pasted."""

import json

import pytest

from looc_ldm.commands.options import EvaluateGeneration
from looc_ldm.commands.record import bias_note, make_record, markdown_table, write_and_print
from looc_ldm.utils.errors import UserError

FIGURES = {"protocol": "clean", "images_first": 40, "images_second": 1000, "fid@2048": 12.25, "kid@2048": 0.000331}
FIGURES |= {"class_fid@2048": 20.5, "class_fid": {"per_class": {"cat": 20.5}, "skipped": {}, "biased": {"cat": 3}}}
FIGURES |= {"bits_per_pixel": 1.5, "data": "ada/animals"}


@pytest.fixture
def options() -> EvaluateGeneration:
    return EvaluateGeneration(
        samples="ada/pets", data="ada/animals", command_line="looc-ldm evaluate generation ada/pets"
    )


def test_the_table_has_the_figures_beside_the_rate(options):
    head, rule, row = markdown_table(FIGURES, "ada/pets").splitlines()
    assert head == "| model | data | images | protocol | fid@2048 | kid@2048 | class_fid@2048 | bits_per_pixel |"
    assert row == "| `ada/pets` | `ada/animals` | 40 | clean | 12.25 | 0.000331 | 20.5 | 1.5 |"
    assert rule.count("---") == 8


def test_the_table_names_no_folder_of_this_machine(tmp_path):
    (tmp_path / "animals").mkdir()
    row = markdown_table({**FIGURES, "data": str(tmp_path / "animals")}, str(tmp_path)).splitlines()[-1]
    assert row.startswith(f"| `{tmp_path.name}` | `animals` |")


def test_small_figures_keep_their_digits_where_they_are_printed(options, capsys):
    write_and_print(make_record(FIGURES, options, options.samples, notes=["warning: few"]), None)
    printed = capsys.readouterr().out
    assert f"{'fid@2048':24} 12.2500\n" in printed
    assert f"{'kid@2048':24} 0.000331\n" in printed
    assert "per_class" not in printed
    assert "warning: few\n\n| model |" in printed


def test_a_figure_that_is_no_number_is_not_written(options, tmp_path):
    record = make_record(FIGURES, options, options.samples, notes=[])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_and_print({**record, "fid@2048": float("nan")}, tmp_path / "figures.json")
    assert list(tmp_path.iterdir()) == []
    write_and_print(record, tmp_path / "new" / "figures.json")
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == record
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        write_and_print(record, tmp_path / "file" / "figures.json")


def test_fewer_images_than_features_are_warned_of():
    assert bias_note(2048, 2048, "fid@2048") == []
    assert "fid@2048 is measured on 2,047 images, fewer than its 2,048 features" in bias_note(2047, 2048, "fid@2048")[0]
