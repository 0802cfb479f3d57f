"""The examples in docstrings run, and say what they print."""

import doctest
import inspect
import re

import pytest

import looc_ldm


def examples() -> list[tuple[str, str]]:
    """Name and code of the ```py blocks of the public names and of their own methods."""
    found = []
    for name in looc_ldm.__all__:
        public = getattr(looc_ldm, name)
        documented = {name: public}
        if inspect.isclass(public):
            own = {key: value for key, value in vars(public).items() if not key.startswith("_")}
            documented |= {f"{name}.{key}": value for key, value in own.items()}
        for where, thing in documented.items():
            text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
            found += [(where, block) for block in re.findall(r"```py\n(.*?)```", text, re.DOTALL)]
    return found


@pytest.mark.parametrize(("name", "code"), examples(), ids=[name for name, _ in examples()])
def test_example(name, code, quickstart_folder, capsys):
    example = doctest.DocTestParser().get_doctest(code, {}, name, None, None)
    assert example.examples
    report = []
    doctest.DocTestRunner().run(example, out=report.append)
    assert report == []


def test_what_users_start_from_has_an_example():
    assert {"LooCQuantizer", "LooCVQModel", "LooCLDMPipeline", "LooCLDMImg2ImgPipeline"} <= {n for n, _ in examples()}
