"""Make diffusers save and load our components as `["looc_ldm", class name]`.

diffusers resolves a component's class from its table of loadable libraries, and treats every other library as code
that came with the repository. The table is not part of its public interface: tests load saved and pushed pipelines with
the oldest and the newest supported diffusers.
"""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import AutoModel, VQModel
from diffusers.pipelines import pipeline_loading_utils

import looc_ldm
from looc_ldm import _HOME_OF

_METHODS = ["save_pretrained", "from_pretrained"]
AUTOENCODERS = ("LooCVQModel", "LooCSmallVQModel")
COMPONENTS = (*AUTOENCODERS, "ClassEmbedding", "FixedHeadsUNet2DModel")

# Not looc_ldm.py: diffusers' own pipelines would take that for the library of the component, and ask for trust.
CODE_FILE = "model.py"
CODE = f'''"""For `trust_remote_code=True`: the classes of components of the installed looc_ldm."""

from looc_ldm import {", ".join(sorted(COMPONENTS))}

__all__ = [{", ".join(f'"{name}"' for name in sorted(COMPONENTS))}]
'''

_loadable = pipeline_loading_utils.LOADABLE_CLASSES
_loadable["looc_ldm"] = dict.fromkeys(COMPONENTS, _METHODS)
for _name in COMPONENTS:
    _loadable.setdefault(_HOME_OF[_name], {})[_name] = _METHODS
pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(_loadable["looc_ldm"])


class RemoteCode:
    """Base of our components: a folder that they are saved to also loads with diffusers' own `AutoModel`.

    With `trust_remote_code=True` it needs no import of looc_ldm. Stands first among the bases of a class.
    """

    def to_json_file(self, json_file_path) -> None:
        """Write `config.json`, with the name of the class in the file of code that is written beside it."""
        config = json.loads(self.to_json_string())
        if type(self).__name__ in COMPONENTS:
            config["auto_map"] = {"AutoModel": f"{Path(CODE_FILE).stem}.{type(self).__name__}"}
            (Path(json_file_path).parent / CODE_FILE).write_text(CODE)
        Path(json_file_path).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As `ConfigMixin.extract_init_dict`, without the place of a repository's code."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)


_load_auto_model = AutoModel.from_pretrained.__func__


def _from_pretrained(cls, pretrained_model_or_path=None, **kwargs):
    """Extend `AutoModel.from_pretrained`, which loads diffusers' classes and trusted remote code, to our classes."""
    try:
        return _load_auto_model(cls, pretrained_model_or_path, **kwargs)
    except (ValueError, AttributeError):
        places = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
        place = {name: kwargs[name] for name in places if name in kwargs}
        name = VQModel.load_config(pretrained_model_or_path, **place).get("_class_name")
        if name not in COMPONENTS:
            raise
        kwargs.pop("trust_remote_code", None)
        return getattr(looc_ldm, name).from_pretrained(pretrained_model_or_path, **kwargs)


AutoModel.from_pretrained = classmethod(_from_pretrained)


def with_modules(index: dict) -> dict:
    """Return a `model_index.json` with our components under the modules that define them, not the package.

    A repository for remote code holds a file `looc_ldm.py` beside each of our components (`hub.upload`). diffusers
    takes that file for the library named `looc_ldm`, and asks for trust in it. The name of its module leads to the
    installed class.
    """
    return {
        key: [_HOME_OF[value[1]], value[1]]
        if isinstance(value, list) and value[:1] == ["looc_ldm"] and value[1] in COMPONENTS
        else value
        for key, value in index.items()
    }
