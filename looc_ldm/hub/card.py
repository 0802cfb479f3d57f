"""The model card of a trained model: its figures, how they were measured, and its training.

All facts come from files: the configs and `training.json` beside the weights, the newest preview of the run, and the
figures that `looc-ldm evaluate ... --output FILE` wrote. Unknown facts are left out. The text is in `model_card.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from looc_ldm.hub.facts import CIRCUMSTANCES, Facts, gather
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import replace_bytes, replace_text

MARK = "<!-- Written by looc-ldm. Delete this line to keep a card of your own: it is then pushed as it is. -->"

# Titles of figures; all others are their name with spaces.
TITLES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "l1": "L1 (mean absolute error, images in [0, 1])",
    "lpips": "LPIPS",
    "lpips_vgg": "LPIPS (VGG)",
    "lpips_alex": "LPIPS (AlexNet)",
    "rfid": "rFID",
    "fid": "FID",
    "kid": "KID",
    "kid_std": "KID, standard deviation over subsets",
    "is": "Inception score",
    "is_std": "Inception score, standard deviation over splits",
    "class_fid": "FID within each class, mean over classes",
    "copies": "share of samples that copy a training image",
    "copies_held_out": "the same share of the held-out images",
    "fd": "Fréchet distance",
    "kd": "kernel distance",
    "kd_std": "kernel distance, standard deviation over subsets",
    "cmmd": "CMMD",
    "codebook_use": "share of the codevectors in use",
    "dead_codes": "codevectors that are never used",
    "code_entropy": "entropy of the codes (bits per code)",
    "bits_per_pixel_entropy": "bits per pixel at the entropy of the codes",
}


def write_card(
    folder: Path | str,
    repo_id: str | None = None,
    metrics: Sequence[Path | str] = (),
    samples: Path | str | None = None,
    license: str | None = None,
) -> Path:
    """Write README.md, and beside it the picture it shows, into a model folder. Return the file.

    Args:
        folder (`Path`): A saved `LooCLDMPipeline` or `LooCVQModel`, as a rule `pipeline/` or `model/` of a run.
        repo_id (`str`, *optional*): "user/name" for the example of the card; the folder if not given.
        metrics (list of `Path`): Files that `looc-ldm evaluate ... --output FILE` wrote.
        samples (`Path`, *optional*): A picture to show; the newest preview of the run if not given.
        license (`str`, *optional*): Licence of the weights, as the hub writes it ("mit", "cc-by-4.0").

    Raises:
        ModelError: No model in the folder.
        UserError: A file is of the wrong kind, figures belong to a different model, or looc-ldm has not written the
            README.md that is there.
    """
    folder = Path(folder)
    text, picture = model_card(folder, repo_id, metrics, samples, license)
    if not is_ours(folder / "README.md"):
        raise UserError(f"{str(folder / 'README.md')!r} was not written by looc-ldm: delete it to have one written.")
    if picture is not None:
        replace_bytes(folder / picture_name(picture), picture.read_bytes())
    replace_text(folder / "README.md", text)
    return folder / "README.md"


def is_ours(card: Path) -> bool:
    """Whether the file is missing, or was written by looc-ldm and may be replaced."""
    return not card.is_file() or MARK in card.read_text(encoding="utf-8")


def model_card(
    folder: Path,
    repo_id: str | None = None,
    metrics: Sequence[Path | str] = (),
    samples: Path | str | None = None,
    license: str | None = None,
) -> tuple[str, Path | None]:
    """Return the text of a card, and the picture that it shows under the name `picture_name`; see `write_card`."""
    facts = gather(folder, metrics, samples)
    is_pipeline, task = facts.index is not None, _task(facts)
    place = folder.resolve()
    run_or_model = place.parent if place.name in ("model", "pipeline") else place
    name = repo_id.split("/")[-1] if repo_id else run_or_model.name
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=task if task == "unconditional-image-generation" else None,  # the only one that the hub has
        tags=["looc-ldm", "vector-quantization", "latent-diffusion" if is_pipeline else "image-tokenizer"],
        model_name=name,
        eval_results=list(_eval_results(facts, task)) or None,
    )
    vqvae = facts.configs.get("vqvae", {})
    channels = vqvae.get("vq_embed_dim") or vqvae.get("hidden_channels") or vqvae.get("latent_channels")
    codevector_dim = vqvae.get("codevector_dim") or channels
    classes = (facts.index or {}).get("id2label") or {}
    words = [names.split(",")[0].strip() for names in classes.values()]
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        mark=MARK,
        name=name,
        license=license,
        source=repo_id or folder.as_posix(),
        is_pipeline=is_pipeline,
        configs=facts.configs,
        vqvae=vqvae,
        codevector_dim=codevector_dim,
        # One codevector per feature vector is plain vector quantization.
        shared=(channels, vqvae.get("interpolation_factor")) != (codevector_dim, 1),
        conditional=task == "class-conditional-image-generation",
        classes=len(classes),
        label=json.dumps(next((word for word in words if words.count(word) == 1), 0), ensure_ascii=False),
        measurements=facts.measurements,
        title=title,
        facts=facts.training.get("facts"),
        picture=facts.picture and picture_name(facts.picture),
        caption=facts.caption,
    )
    return f"{card}\n", facts.picture


def picture_name(picture: Path) -> str:
    """Return the name of the picture beside the card."""
    return f"samples{picture.suffix.lower()}"


def title(name: str) -> str:
    """Return a figure's name for readers: "rFID (2048 features)" for "rfid@2048"."""
    base, _, features = name.partition("@")
    known = "FD-DINOv2" if base == "fd" and "dinov2" in features else TITLES.get(base, base.replace("_", " "))
    return known + (f" ({features} features)" if features else "")


def _task(facts: Facts) -> str:
    if facts.index is None:
        return "image-reconstruction"
    conditional = facts.index.get("id2label") or facts.index.get("null_class_label") is not None
    return "class-conditional-image-generation" if conditional else "unconditional-image-generation"


def _eval_results(facts: Facts, task: str) -> Iterable[EvalResult]:
    for measurement in facts.measurements:
        record = measurement.record
        if record.get("data") is None:
            continue  # a model-index names the data set of every figure
        protocol = f", protocol {record['protocol']}" if "protocol" in record else ""
        for name, value in measurement.figures.items():
            yield EvalResult(
                task_type="image-reconstruction" if measurement.is_reconstruction else task,
                dataset_type=record["data"],
                dataset_name=record["data"],
                dataset_split=record.get("split"),
                metric_type=name,
                metric_value=value,
                metric_name=title(name) + protocol,
                metric_args={
                    k: record[k] for k in (*CIRCUMSTANCES, "protocol", "dtype", "bits_per_pixel") if k in record
                },
            )
