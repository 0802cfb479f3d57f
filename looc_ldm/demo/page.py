"""The demo page: sample, vary, inpaint and tokenize with a pipeline. Needs gradio."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageChops

from looc_ldm.codes.looc_file import HEADER_BYTES, ImageCodes
from looc_ldm.demo.codecs import Stored, code_map, compare, enlarge
from looc_ldm.images.pixels import MODES, read_image, to_pixels, to_square
from looc_ldm.metrics.quality import psnr
from looc_ldm.pipelines.img2img import LooCLDMImg2ImgPipeline
from looc_ldm.pipelines.inpaint import LooCLDMInpaintPipeline
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.loading import load_pipeline
from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import UserError

TITLE = "Latent diffusion on LooC codes"
EVERY_CLASS, NO_CLASS = "every class in turn", "no class"
STEPS = 25
GRIDS = {f"{n} × {n}": n for n in range(1, 5)}
FIRST_SEED = 1000  # for images to start from: with the seed of a result, inpainting would draw the same image again
LONGEST_SIDE = 512  # pixels; larger images are reduced before they are encoded
MOST_BYTES = "20mb"  # in an upload
PROGRESS = gr.Progress()  # as a default value it stands for that of the call
# Small images are shown with visible pixels rather than as stamps; labels stand above pictures, not on them.
CSS = """
.upload img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.upload .image-frame, .picture .image-frame { box-sizing: border-box; padding-top: 2.2rem; }
.sizes th { overflow-wrap: normal; word-break: normal; }
"""


def launch(models: Sequence[str], device: str | None = None, **server) -> gr.Blocks:
    """Load pipelines by bundled name, folder or hub id, start to serve the page, and return it.

    `server` are arguments of gradio's `launch`. The returned page has its address as `local_url`. Its method
    `block_thread()` waits until Ctrl-C.
    """
    page = make_page({name: load_pipeline(name).to(choose_device(device)) for name in models})
    page.launch(
        css=CSS, max_file_size=MOST_BYTES, show_error=True, share=False, quiet=True, prevent_thread_lock=True, **server
    )
    return page


def make_page(pipelines: dict[str, LooCLDMPipeline]) -> gr.Blocks:
    """Return the page: four tabs, inside one tab per pipeline if there are several."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.Markdown(f"# {TITLE}")
        for name, pipe in pipelines.items():
            if len(pipelines) == 1:
                _Tabs(name, pipe)
            else:
                with gr.Tab(name):
                    _Tabs(name, pipe)
    return page


class _Tabs:
    """The tabs of one pipeline."""

    def __init__(self, name: str, pipe: LooCLDMPipeline):
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.mode = MODES[pipe.vqvae.config.in_channels]
        self.side = pipe.latent_shape[1] * pipe.downsampling_factor
        self.classes: dict[str, int | None] = {}
        for label in pipe.class_ids:
            known = (pipe.config.id2label or {}).get(label, str(label))
            self.classes[f"{known} ({label})" if known in self.classes else known] = label
        self.named = list(self.classes)
        if pipe.config.null_class_label is not None:
            self.classes[NO_CLASS] = None
        kind = "grey" if self.mode == "L" else "colour"
        gr.Markdown(f"Model **{name}**: {kind} images of {self.side} × {self.side} pixels.")
        for tab, build in (
            ("Sample", self._sample),
            ("Vary", self._vary),
            ("Inpaint", self._inpaint),
            ("Tokenize", self._tokenize),
        ):
            with gr.Tab(tab), gr.Row():
                build()

    # Tabs -------------------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        with gr.Column():
            arguments = self._arguments([EVERY_CLASS, *self.classes])
            grid = gr.Radio(list(GRIDS), value="3 × 3", label="Grid", info="Rows and columns of images.")
            button = gr.Button("Draw images", variant="primary")
        result = _picture("Images")

        def sample(name, scale, steps, seed, grid, progress=PROGRESS):
            rows = GRIDS[grid]
            call = self._call(name, scale, steps, seed, rows**2, progress)
            return enlarge(make_image_grid(self.pipe(batch_size=rows**2, **call).images, rows, rows))

        _on_click(button, sample, [*arguments, grid], result)

    def _vary(self) -> None:
        with gr.Column():
            upload, fill = _upload()
            strength = gr.Slider(
                0.05, 1, 0.6, step=0.05, label="Strength", info="How far the results may be from the image."
            )
            arguments = self._arguments(list(self.classes))
            button = gr.Button("Draw variations", variant="primary")
        result = _picture("Variations")

        def vary(file, strength, name, scale, steps, seed, progress=PROGRESS):
            image = self._square(file)
            pipe = LooCLDMImg2ImgPipeline.from_pipe(self.pipe)
            images = pipe([image] * 4, strength, **self._call(name, scale, steps, seed, 4, progress)).images
            return enlarge(make_image_grid(images, 2, 2))

        self._on_fill(fill, [upload, arguments[0]])
        _on_click(button, vary, [upload, strength, *arguments], result)

    def _inpaint(self) -> None:
        with gr.Column():
            upload, fill = _upload()
            editor = gr.ImageEditor(
                label="Paint a mask",
                type="pil",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=64, colors=["#d55e00"], color_mode="fixed"),
                canvas_size=(512, 512),
            )
            arguments = self._arguments(list(self.classes))
            button = gr.Button("Draw the painted part", variant="primary")
        result = _picture("Result")

        def show(file):
            return None if file is None else enlarge(self._square(file))

        def inpaint(file, painted, name, scale, steps, seed, progress=PROGRESS):
            image = self._square(file)
            alphas = [layer.getchannel("A").resize(image.size, Image.Resampling.BOX) for layer in painted["layers"]]
            mask = functools.reduce(ImageChops.lighter, alphas, Image.new("L", image.size))
            if mask.getbbox() is None:
                raise UserError("Nothing is painted: paint over the part to redraw.")
            mask = mask.point(lambda share: 255 if share else 0)
            pipe = LooCLDMInpaintPipeline.from_pipe(self.pipe)
            return enlarge(pipe(image, mask, **self._call(name, scale, steps, seed, 1, progress)).images[0])

        upload.change(_in_a_sentence(show), upload, editor, api_name=False, show_progress="hidden")
        self._on_fill(fill, [upload, arguments[0]])
        _on_click(button, inpaint, [upload, editor, *arguments], result)

    def _tokenize(self) -> None:
        with gr.Column():
            upload, fill = _upload()
            button = gr.Button("Tokenize", variant="primary")
            text = gr.Markdown(elem_classes="sizes")
            download = gr.File(label=".looc file")
        with gr.Column():
            with gr.Row():
                pictures = [_picture(label, min_width=120) for label in ("Original", "LooC")]
            with gr.Row():
                pictures += [_picture(label, min_width=120) for label in ("JPEG", "WebP")]
            pictures.append(_picture("Map of codes"))
        folder = tempfile.TemporaryDirectory()

        def tokenize(file):
            image = self._read(file)
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
            stored = compare(self.pipe.vqvae, image)
            codes = ImageCodes.from_bytes(stored[0].content)
            written = Path(folder.name, f"{Path(file).stem}.looc")  # gradio copies it
            written.write_bytes(stored[0].content)
            shown = [enlarge(picture) for picture in (image, *(one.image for one in stored))]
            return [f"{_description(codes)}\n\n{_table(image, stored)}", str(written), *shown, code_map(codes)]

        self._on_fill(fill, [upload])
        _on_click(button, tokenize, [upload], [text, download, *pictures])

    # Parts of tabs ----------------------------------------------------------------------------------------------------

    def _arguments(self, classes: list[str]) -> list[gr.Component]:
        """Return the inputs that all drawing has: class, guidance scale, steps and seed."""
        guided = NO_CLASS in self.classes
        return [
            gr.Dropdown(classes, label="Class", visible=bool(self.classes)),
            gr.Slider(
                1, 8, 1.5 if guided else 1, step=0.1, label="Guidance scale", info="1 is no guidance.", visible=guided
            ),
            gr.Slider(1, 100, STEPS, step=1, label="Steps", info="Number of denoising steps."),
            gr.Number(0, label="Seed", info="The same seed draws the same images.", precision=0, minimum=0),
        ]

    def _call(self, name: str, scale: float, steps: int, seed: int, count: int, progress: gr.Progress) -> dict:
        """Return the pipeline's arguments for `count` images, from the inputs of `_arguments`."""

        def report(pipe, step, timestep, tensors):
            progress((step + 1, pipe.num_timesteps), unit="steps")

        names = itertools.islice(itertools.cycle(self.named if name == EVERY_CLASS else [name]), count)
        return {
            "class_labels": [self.classes[name] for name in names] if self.classes else None,
            "guidance_scale": scale,
            "num_inference_steps": steps,
            "generator": [torch.Generator().manual_seed(seed + i) for i in range(count)],
            "callback_on_step_end": report,
        }

    def _on_fill(self, button: gr.Button, outputs: list[gr.Component]) -> None:
        """Have a button draw an image into an upload, and select its class, if there is an input for it."""
        seeds = itertools.count(FIRST_SEED)

        def draw(progress=PROGRESS):
            seed = next(seeds)
            name = self.named[seed % len(self.named)] if self.named else None
            (image,) = self.pipe(**self._call(name, 1, STEPS, seed, 1, progress)).images
            return [image, name] if len(outputs) > 1 else image

        _on_click(button, draw, [], outputs, in_api=False)

    def _read(self, file: str | None) -> Image.Image:
        """Return an upload as a viewer shows it, in the model's mode."""
        if file is None:
            raise UserError("There is no image yet: upload one, or use one drawn by the model.")
        return read_image(file, self.mode, "the upload")

    def _square(self, file: str | None) -> Image.Image:
        """Return the centre of an upload at the model's size."""
        return to_square(self._read(file), "crop", self.side)


def _upload() -> tuple[gr.Image, gr.Button]:
    """Return an upload field, and the button that fills it with a drawn image."""
    upload = gr.Image(
        label="Image",
        type="filepath",
        format="png",
        image_mode=None,
        height=260,
        sources=["upload", "clipboard"],
        elem_classes="upload",
    )
    # gradio itself would open the file, and answer a bad one with the name of a temporary file.
    upload.preprocess = lambda payload: payload and payload.path
    return upload, gr.Button("Use an image drawn by the model", size="sm")


def _picture(label: str, **layout) -> gr.Image:
    buttons = ["download", "fullscreen"]
    return gr.Image(
        label=label, alt_text=label, format="png", interactive=False, buttons=buttons, elem_classes="picture", **layout
    )


def _description(codes: ImageCodes) -> str:
    height, width, count = codes.indices.shape
    bits = codes.indices.size * math.log2(codes.num_codevectors) / (codes.height * codes.width)
    return (
        f"{codes.width} × {codes.height} pixels become {width} × {height} positions with {count} "
        f"code{'s' * (count > 1)} each, of {codes.num_codevectors:,} codevectors: **{bits:.3f} bits per pixel**. "
        f"A .looc file adds a header of {HEADER_BYTES} bytes. The map has one picture per segment and one colour per "
        "codevector. The less an image resembles the training images, the worse it is reconstructed."
    )


def _table(image: Image.Image, stored: list[Stored]) -> str:
    lines = ["| File | Bytes | Bits per pixel | PSNR (dB) |", "|:--|--:|--:|--:|"]
    for name, decoded, content in stored:
        quality = psnr(to_pixels(image)[None] / 255, to_pixels(decoded)[None] / 255).item()
        bits = 8 * len(content) / (image.width * image.height)
        lines.append(f"| {name} | {len(content):,} | {bits:.3f} | {quality:.1f} |")
    return "\n".join(lines)


def _on_click(button: gr.Button, run: Callable, inputs: list, outputs, in_api: bool = True) -> None:
    """Have a button run a function, one of the whole page at a time."""
    name = run.__name__ if in_api else False
    button.click(_in_a_sentence(run), inputs, outputs, api_name=name, concurrency_limit=1, concurrency_id="model")


def _in_a_sentence(run: Callable) -> Callable:
    """Answer bad input with a message on the page."""

    @functools.wraps(run)
    def answer(*arguments):
        try:
            return run(*arguments)
        except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
            message = str(error) or "There is not enough memory for this."
            raise gr.Error(message, duration=None, print_exception=False) from None

    return answer
