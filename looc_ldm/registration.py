"""Makes diffusers save and load our components as `["looc_ldm", class name]`.

diffusers resolves a component's class from its table of loadable libraries, and treats every other library as code
that came with the repository. The table is not part of its public interface: tests load saved and pushed pipelines with
the oldest and the newest supported diffusers.
"""

from diffusers.pipelines import pipeline_loading_utils

from looc_ldm import _HOME_OF

_METHODS = ["save_pretrained", "from_pretrained"]
AUTOENCODERS = ("LooCVQModel", "LooCSmallVQModel")
COMPONENTS = (*AUTOENCODERS, "ClassEmbedding", "FixedHeadsUNet2DModel")

_loadable = pipeline_loading_utils.LOADABLE_CLASSES
_loadable["looc_ldm"] = dict.fromkeys(COMPONENTS, _METHODS)
for _name in COMPONENTS:
    _loadable.setdefault(_HOME_OF[_name], {})[_name] = _METHODS
pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(_loadable["looc_ldm"])


def with_modules(index: dict) -> dict:
    """A `model_index.json` with our components under the modules that define them, instead of the package.

    A repository for remote code holds a file `looc_ldm.py` beside each of our components (`looc_ldm.hub`). diffusers
    takes that file for the library named `looc_ldm`, and asks for trust in it: by the name of its module the class is
    found in what is installed.
    """
    return {
        key: [_HOME_OF[value[1]], value[1]]
        if isinstance(value, list) and value[:1] == ["looc_ldm"] and value[1] in COMPONENTS
        else value
        for key, value in index.items()
    }
