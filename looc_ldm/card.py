"""The model card of a trained model: what was measured, on what and how, and what it was trained with.

Everything in it is read from files: the configs and `training.json` beside the weights, `config.yaml` and the newest
preview of the run they came from, and the figures that `looc-ldm evaluate ... --output FILE` wrote. What is not in any
of them is left out (`looc_ldm.model_facts`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from looc_ldm.errors import UserError
from looc_ldm.files import copy_file, replace_text
from looc_ldm.model_facts import CIRCUMSTANCES, Facts, Measurement, gather, shareable

MARK = "<!-- Written by looc-ldm. Delete this line to keep a card of your own: it is then pushed as it is. -->"

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
    "precision": "precision",
    "recall": "recall",
    "class_fid": "FID within each class, mean over classes",
    "fd": "Fréchet distance",
    "kd": "kernel distance",
    "kd_std": "kernel distance, standard deviation over subsets",
    "cmmd": "CMMD",
    "codebook_use": "share of the codevectors in use",
    "dead_codes": "codevectors that are never used",
    "perplexity": "perplexity of the codes",
    "code_entropy": "entropy of the codes (bits per code)",
    "bits_per_image": "bits per image",
    "bits_per_pixel": "bits per pixel",
    "bits_per_pixel_entropy": "bits per pixel at the entropy of the codes",
}


def write_card(
    folder: Path | str,
    repo_id: str | None = None,
    metrics: Sequence[Path | str] = (),
    samples: Path | str | None = None,
    license: str | None = None,
) -> Path:
    """Write README.md, and beside it the picture it shows, into a model folder. Returns the file.

    Args:
        folder (`Path`): A saved `LooCLDMPipeline` or `LooCVQModel`, as a rule `pipeline/` or `model/` of a run.
        repo_id (`str`, *optional*): "user/name", what the example of the card loads; the folder if not given.
        metrics (list of `Path`): Figures to state, files that `looc-ldm evaluate ... --output FILE` wrote.
        samples (`Path`, *optional*): A picture to show; the newest preview of the run if not given.
        license (`str`, *optional*): Licence of the weights, as the hub writes it ("mit", "cc-by-4.0"); "not stated" if
            not given.

    Raises:
        ModelError: No model in the folder.
        UserError: A file that is not what it should be, figures of another model, or a README.md that was written by
            somebody else.
    """
    folder = Path(folder)
    text, picture = model_card(folder, repo_id, metrics, samples, license)
    if not is_ours(folder / "README.md"):
        raise UserError(f"{str(folder / 'README.md')!r} was not written by looc-ldm: delete it to have one written.")
    if picture is not None:
        copy_file(picture, folder / picture_name(picture))
    replace_text(folder / "README.md", text)
    return folder / "README.md"


def is_ours(card: Path) -> bool:
    """Whether a card may be written anew: it is not there, or bears our mark."""
    return not card.is_file() or MARK in card.read_text(encoding="utf-8")


def model_card(
    folder: Path,
    repo_id: str | None = None,
    metrics: Sequence[Path | str] = (),
    samples: Path | str | None = None,
    license: str | None = None,
) -> tuple[str, Path | None]:
    """The text of a card, and the picture that it shows as `picture_name` of it; see `write_card`."""
    facts = gather(folder, metrics, samples)
    name = repo_id.split("/")[-1] if repo_id else (facts.run_folder or folder.resolve()).name
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation" if _task(facts) == "unconditional-image-generation" else None,
        tags=["looc-ldm", "vector-quantization", *(["latent-diffusion"] if facts.is_pipeline else ["image-tokenizer"])],
        model_name=name,
        eval_results=list(_eval_results(facts)) or None,
    )
    parts = [MARK, f"# {name}", _introduction(facts)]
    if facts.samples is not None:
        parts += [f"![samples]({picture_name(facts.samples)})", *filter(None, [facts.samples_caption])]
    parts += ["## Use", _example(facts, repo_id or folder.as_posix())]
    if facts.measurements:
        parts += ["## Measured", *(_measured(measurement, facts.is_pipeline) for measurement in facts.measurements)]
    training = _training(facts)
    parts += ["## Model", _table(("", ""), _architecture(facts))]
    if training:
        parts += ["## Training", _table(("", ""), training)]
        if facts.run:
            parts.append("All settings are in `config.yaml`.")
    parts += ["## Licence", f"Of the weights: {license or 'not stated'}."]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")), facts.samples


def picture_name(picture: Path) -> str:
    """What the card calls its picture."""
    return f"samples{picture.suffix.lower()}"


# What the card says --------------------------------------------------------------------------------------------------


def _task(facts: Facts) -> str:
    if not facts.is_pipeline:
        return "image-reconstruction"
    conditional = facts.index.get("id2label") or facts.index.get("null_class_label") is not None
    return "class-conditional-image-generation" if conditional else "unconditional-image-generation"


def _segments(vqvae: dict) -> tuple[int | None, int | None]:
    """n_q and d of an autoencoder's config: channels of a feature vector, and of a codevector."""
    channels = vqvae.get("vq_embed_dim") or vqvae.get("hidden_channels") or vqvae.get("latent_channels")
    return channels, vqvae.get("codevector_dim") or channels


def _introduction(facts: Facts) -> str:
    vqvae = facts.configs.get("vqvae", {})
    channels, codevector_dim = _segments(vqvae)
    # One code a position is vector quantization as it always was.
    shared = (channels, vqvae.get("interpolation_factor")) != (codevector_dim, 1)
    if facts.is_pipeline:
        classes = len(facts.index.get("id2label") or {})
        kind = f"of {classes} classes" if classes else "without conditions"
        return (
            f"A latent diffusion model of images {kind}, on a first stage "
            + ("whose codebook all segments of a feature vector share (LooC)" if shared else "with discrete codes")
            + ". A pipeline of diffusers."
        )
    codes = (
        "whose one codebook all segments of a feature vector share (LooC)"
        if shared
        else "one codevector for each feature vector (VQ)"
    )
    network = {
        "LooCVQModel": "A `VQModel` of diffusers",
        "LooCSmallVQModel": "A small convolutional network, with the methods of diffusers' `VQModel`",
    }[vqvae["_class_name"]]
    return f"An image autoencoder with discrete codes, {codes}. {network}."


def _example(facts: Facts, name: str) -> str:
    if facts.is_pipeline:
        names = [names.split(",")[0].strip() for names in (facts.index.get("id2label") or {}).values()]
        label = next((name for name in names if names.count(name) == 1), 0)
        conditional = _task(facts) != "unconditional-image-generation"
        arguments = f"class_labels=[{json.dumps(label, ensure_ascii=False)}]" if conditional else "batch_size=1"
        code = [
            "from looc_ldm import LooCLDMPipeline",
            f'pipe = LooCLDMPipeline.from_pretrained("{name}")',
            f'pipe({arguments}).images[0].save("sample.png")',
        ]
        after = (
            "or, where the calling code must not know of `looc_ldm` (it must be installed all the same), with "
            f'`DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)`.'
        )
    else:
        config = facts.configs["vqvae"]
        side = config.get("sample_size") or 64
        code = [
            "import torch",
            f"from looc_ldm import {config['_class_name']}",
            f'model = {config["_class_name"]}.from_pretrained("{name}")',
            f"codes = model.encode_indices(torch.zeros(1, {config.get('in_channels', 3)}, {side}, {side}))",
        ]
        after = "for images in [-1, 1]; `model.decode_indices(codes)` gives them back."
    return "```py\n" + "\n".join(code) + "\n```\n\n" + after


def _measured(measurement: Measurement, is_pipeline: bool) -> str:
    of = " by the first stage" if is_pipeline else ""
    what = f"Reconstruction{of}" if measurement.is_reconstruction else "Generation"
    rows = [(title(name), f"{value:.4g}") for name, value in measurement.figures.items()]
    return f"{what}: {'; '.join(measurement.circumstances())}.\n\n" + _table(("metric", "value"), rows)


def title(name: str) -> str:
    """A figure's name for readers: "rfid@2048" is "rFID (2048 features)", "cmmd@clip-x" "CMMD (clip-x features)"."""
    base, _, features = name.partition("@")
    known = "FD-DINOv2" if base == "fd" and "dinov2" in features else TITLES.get(base, base)
    return known + (f" ({features} features)" if features else "")


def _architecture(facts: Facts) -> list[tuple[str, str]]:
    vqvae = facts.configs.get("vqvae", {})
    rows = []
    if "sample_size" in vqvae:
        channels = vqvae.get("in_channels")
        plural = "" if channels == 1 else "s"
        rows.append(("images", f"{vqvae['sample_size']}x{vqvae['sample_size']}, {channels} channel{plural}"))
    codevector_dim = _segments(vqvae)[1]
    if "num_vq_embeddings" in vqvae and codevector_dim:
        numbers = vqvae["num_vq_embeddings"] * codevector_dim
        rows.append(("codebook", f"{vqvae['num_vq_embeddings']} codevectors of {codevector_dim}, {numbers:,} numbers"))
    for name in ("distance", "codebook_update", "gradient"):
        if name in vqvae:
            rows.append((name.replace("_", " "), f"`{vqvae[name]}`"))
    for name, config in facts.configs.items():
        rows.append((name, f"`{config.get('_class_name')}`"))
        if name == "scheduler" and "prediction_type" in config:
            rows.append(("prediction type", f"`{config['prediction_type']}`"))
    return rows


def _training(facts: Facts) -> list[tuple[str, str]]:
    data, run = shareable(facts.training.get("data", {})), facts.run
    rows = []
    if data:
        rows.append(("data set", f"`{data.get('path')}`, split `{data.get('split')}`"))
        if "transform" in facts.training:
            rows.append(("transform", facts.training["transform"]))  # FID depends on it
        elif "resolution" in data:
            rows.append(("resolution", f"{data['resolution']}x{data['resolution']}, {data.get('fit')}"))
    if "images_seen" in facts.training:
        rows.append(("images seen", f"{facts.training['images_seen']:,}"))
    optimizer = run.get("optimizer") or {}
    settings = {
        "batch size": run.get("batch_size"),
        "learning rate": optimizer.get("learning_rate"),
        "learning rate schedule": optimizer.get("schedule"),
        "mixed precision": facts.training.get("mixed_precision", run.get("mixed_precision")),  # not `auto`, but which
        "half-life of the averaged weights (images)": run.get("ema_halflife_images"),
        "seed": run.get("seed"),
    }
    return rows + [(name, str(value)) for name, value in settings.items() if value is not None]


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {first} | {second} |" for first, second in lines)


def _eval_results(facts: Facts) -> Iterable[EvalResult]:
    for measurement in facts.measurements:
        record = measurement.record
        if measurement.data is None:
            continue  # a model-index names the data set of every figure
        arguments = {key: record[key] for key in (*CIRCUMSTANCES, "protocol", "dtype") if key in record}
        if "bits_per_pixel" in record:
            arguments["bits_per_pixel"] = record["bits_per_pixel"]
        for name, value in measurement.figures.items():
            yield EvalResult(
                task_type="image-reconstruction" if measurement.is_reconstruction else _task(facts),
                dataset_type=measurement.data,
                dataset_name=measurement.data,
                dataset_split=measurement.split,
                metric_type=name,
                metric_value=value,
                metric_name=title(name) + (f", protocol {record['protocol']}" if "protocol" in record else ""),
                metric_args=arguments,
            )
