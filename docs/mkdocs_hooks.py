"""Hooks of mkdocs.yml: put the help of every command into the site, and plain types into the reference."""

import os
import re

import griffe

from looc_ldm.commands import options
from looc_ldm.commands.main import COMMANDS
from looc_ldm.utils.arguments import Options, make_parser

MARKER = "<!-- commands -->"


def on_page_markdown(markdown: str, **_) -> str:
    """Return the text of a page with the marker replaced."""
    return markdown.replace(MARKER, commands()) if MARKER in markdown else markdown


def commands() -> str:
    """Return a section for each command; the trainers' settings have their own page."""
    os.environ["COLUMNS"] = "80"  # the width of argparse's help
    sections = []
    for name, (class_name, _, summary) in COMMANDS.items():
        options_class = getattr(options, class_name)
        text = "Every field of the [training settings](settings.md) is a flag: `--optimizer.learning_rate 1e-4`."
        if issubclass(options_class, Options):
            text = f"```text\n{make_parser(options_class, f'looc-ldm {name}').format_help().rstrip()}\n```"
        sections.append(f"## {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n{text}\n")
    return "\n".join(sections)


class PlainTypes(griffe.Extension):
    """Shows `(int, defaults to 2)` of a docstring as the type alone: the signature has the default."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Rewrite the docstring of an object that has been read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^( +[\w*, ]+ \()(.+?)(\): )", _plain_type, obj.docstring.value)


def _plain_type(found: re.Match) -> str:
    kind = re.sub(r", defaults to .*", "", found[2]).replace("`", "").replace("*", "")
    if re.match(r"[\w.]+(, [\w.]+)+ or ", kind):
        kind = kind.replace(", ", " or ")
    return found[1] + kind + found[3]
