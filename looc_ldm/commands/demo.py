"""`looc-ldm demo`: serve the demo page, or write it as a Space."""

from __future__ import annotations

import shutil
import socket
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

import looc_ldm
from looc_ldm.commands.options import Demo
from looc_ldm.models.loading import is_bundled
from looc_ldm.models.starter import bundled_models
from looc_ldm.pipelines.loading import load_pipeline
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import check_folder, folder_when_complete

NOT_COPIED = shutil.ignore_patterns("__pycache__")

APP = '''"""The demo page of looc-ldm, whose package is in this folder."""

from looc_ldm.demo.page import launch

launch({models!r}).block_thread()
'''

README = """---
title: Latent diffusion on LooC codes
emoji: 🌼
colorFrom: green
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
license: mit
---

# Latent diffusion on LooC codes

Draw images, vary and inpaint them, and see an image as codes.
Written by `looc-ldm demo --space`. To run it here: `pip install -r requirements.txt gradio && python app.py`.
"""


def demo(options: Demo) -> None:
    """Serve the page until Ctrl-C, or write the folder of a Space."""
    if find_spec("gradio") is None:
        raise UserError('the demo needs the package gradio: pip install "looc-ldm[demo]"')
    models = [options.model] if options.model else bundled_models()
    if options.space:
        write_space(options.space, models)
        print(f"{options.space}: the folder of a Space. To push it:")
        print("  hf repos create USER/NAME --repo-type space --space-sdk gradio")
        print(f"  hf upload USER/NAME {options.space} . --repo-type space")
    else:
        from looc_ldm.demo.page import launch

        check_address(options.host, options.port)
        page = launch(models, options.device, server_name=options.host, server_port=options.port)
        print(f"{page.local_url} shows the page until Ctrl-C", flush=True)
        page.block_thread()


def check_address(host: str, port: int | None) -> None:
    """Refuse an address that cannot be served on; gradio would only say so after trying 100 ports for minutes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        raise UserError(f"cannot serve on --host {host}, --port {port or 'any'}: {error.strerror}.") from None


def write_space(folder: Path, models: list[str]) -> None:
    """Write the files of a Space: the page, this package, and the model if it is a folder."""
    check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--space must name a new or empty folder, {str(folder)!r} holds files.")
    for model in models:
        load_pipeline(model)  # refuses what the Space could not load
    with folder_when_complete(folder) as partial:
        shutil.copytree(Path(looc_ldm.__file__).parent, partial / "looc_ldm", ignore=NOT_COPIED)
        if Path(models[0]).is_dir() and not is_bundled(models[0]):
            name = Path(models[0]).resolve().name
            shutil.copytree(models[0], partial / name, ignore=NOT_COPIED)
            models = [name]
        needed = [line for line in requires("looc-ldm") if "extra ==" not in line]
        (partial / "app.py").write_text(APP.format(models=models), encoding="utf-8")
        (partial / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
        readme = README.format(gradio=version("gradio"))
        (partial / "README.md").write_text(readme, encoding="utf-8")
