"""`looc-ldm train photos`: plan, train, evaluate and report, from one folder of images."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch

from looc_ldm import __version__
from looc_ldm.metrics import InceptionFeatures
from looc_ldm.metrics.lpips import load_lpips
from looc_ldm.training.checks import check_config
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import parse_config
from looc_ldm.training.diffusion import PREVIEW_IMAGES
from looc_ldm.training.photos import plan as planning
from looc_ldm.training.photos.chain import (
    GUIDANCE_SCALE,
    MOST_CLASSES,
    SAMPLES_PER_CLASS,
    SAMPLING_STEPS,
    Log,
    Results,
    TimeSpent,
    run_chain,
)
from looc_ldm.training.photos.plan import Plan
from looc_ldm.training.photos.report import grids_section, results_sections, write_pictures_and_figures
from looc_ldm.utils.arguments import TrainPhotos
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import make_folder, replace_text
from looc_ldm.utils.report import Report

PROG = "looc-ldm train photos"
PLAN_FILE, TIME_FILE = "plan.json", "time.json"
# Settings that follow from the options of this command.
OWN_SETTINGS = ("config", "output_dir", "autoencoder", "latents", "data.path", "data.resolution")


def train_photos(options: TrainPhotos, features: InceptionFeatures | None = None, log: Log = print) -> Path:
    """Train both stages on a folder of photographs and write `report.html`; return its path.

    The same call resumes an interrupted one. With more hours, a finished one trains stage 2 further.

    Raises:
        UserError: The options do not fit the folder, or the plan that the output has.
    """
    for stage in ("autoencoder", "diffusion"):
        for flag in getattr(options, stage):
            if (name := flag.partition("=")[0].removeprefix("--").replace("-", "_")) in OWN_SETTINGS:
                raise UserError(f"--{stage}.{name}: FOLDER, --output and --resolution say this.")
    file = options.output / PLAN_FILE
    plan = go_on(options, Plan.read(file), log) if file.is_file() else make_plan(options, log)
    first, stage_2_runs = configs_of(plan, options)
    for config in (first, *stage_2_runs):  # with their final intervals
        check_config(config)
    plan.write(file)
    lpips_file = options.lpips_weights or plan.lpips_weights
    lpips = load_lpips("vgg", Path(lpips_file)) if lpips_file else None
    results = run_chain(first, stage_2_runs, TimeSpent(options.output / TIME_FILE), log, features, lpips)
    return write_report(plan, options, results, log)


def make_plan(options: TrainPhotos, log: Log) -> Plan:
    """Look at the folder, choose the preset, measure both stages and divide the hours."""
    log(f"looking at the images of {options.folder}")
    photos = planning.look_at(options.folder, options.classes == "auto")
    resolution = options.resolution or planning.choose_resolution(planning.accelerator_gib(), photos.side)
    weights = options.lpips_weights or cached_vgg()
    plan = Plan(
        resolution=resolution,
        channels=photos.channels,
        classes=options.classes,
        conditional=bool(photos.source.classes),
        validation_split=photos.validation_split,
        held_out=photos.held_out,
        training_images=photos.training_images,
        lpips_weights=None if weights is None else str(weights.resolve()),
        found=photos.lines(),
        hours=options.hours,
        version=__version__,
    )
    for line in plan.found:
        log(line)
    first, (second,) = configs_of(plan, options)
    for config in (first, second):
        check_config(config)
    if not first.loss.lpips_weight:
        log(
            "LPIPS is not in the loss: reconstructions will be smoother than they could be. --lpips-weights FILE gives "
            "torchvision's VGG16, for instance vgg16-397923af.pth from https://download.pytorch.org/models"
        )
    elif weights:
        load_lpips("vgg", weights)  # refuses a wrong file before anything is written
    log(f"preset: {resolution}x{resolution} pixels; measuring the speed of both stages, about a minute")
    make_folder(options.output)
    seconds = min(planning.MOST_MEASURING_SECONDS, 0.02 * options.hours * 3600)
    plan.images_per_second = planning.measure_speeds(
        first, second, photos.source, options.output / "measuring", seconds
    )
    drawn = SAMPLES_PER_CLASS * min(len(photos.source.classes) or 4, MOST_CLASSES)
    drawn += PREVIEW_IMAGES + (photos.held_out if options.inception_weights else 0)
    evaluations = drawn * SAMPLING_STEPS * (2 if second.class_conditional else 1)
    planning.split_hours(plan, (first.batch_size, second.batch_size), evaluations)
    log(plan.line())
    for warning in plan.warnings():
        log(f"warning: {warning}")
    return plan


def go_on(options: TrainPhotos, plan: Plan, log: Log) -> Plan:
    """Return the stored plan for the same options, or with a further run of stage 2 for more hours.

    Raises:
        UserError: Fewer hours, or different images.
    """
    refused = {
        "resolution": options.resolution not in (None, plan.resolution),
        "classes": options.classes != plan.classes,
        "hours": options.hours < plan.hours,
    }
    for name in (name for name, is_refused in refused.items() if is_refused):
        planned = f"{str(options.output)!r} is planned with --{name} {getattr(plan, name)}"
        more = " or more" if name == "hours" else ""
        raise UserError(f"--{name} {getattr(options, name)}: {planned}; give that{more}, or another --output.")
    if options.hours > plan.hours:
        newest = options.output / run_name(len(plan.diffusion_images) - 1)
        known = (newest / "metrics.jsonl").is_file()
        speed = planning.last_speed(newest) if known else plan.images_per_second["diffusion"]
        seconds = (1 - planning.REST) * (options.hours - plan.hours) * 3600
        batch_size = configs_of(plan, options)[1][0].batch_size
        plan.images_per_second["diffusion"] = speed
        plan.diffusion_images.append(planning.whole_batches(seconds * speed, batch_size))
        plan.hours = options.hours
        log(f"more hours: stage 2 goes on with {plan.diffusion_images[-1]:,} images and a new warm-up")
    log(plan.line())
    return plan


def run_name(number: int) -> str:
    """Return the folder of a run of stage 2, counted from 0."""
    return f"diffusion_{number + 1}" if number else "diffusion"


def configs_of(plan: Plan, options: TrainPhotos) -> tuple[AutoencoderConfig, list[DiffusionConfig]]:
    """Return the configs of stage 1 and of each run of stage 2, made from preset, plan and the user's settings."""
    output = options.output
    data = {
        "data.path": options.folder,
        "data.validation_split": plan.validation_split or "null",
        "data.validation_images": plan.held_out,
        "data.num_workers": planning.loader_processes(),
    }

    def parse(config_class, stage: str, settings: dict, own: Sequence[str], images: int = 0):
        def parsed(lengths: dict):
            flags = [f"--{name}={value}" for name, value in {**data, **settings, **lengths}.items()]
            return parse_config(config_class, ["--config", f"photos/{stage}_{plan.resolution}", *flags, *own], PROG)

        config = parsed({})
        return parsed(planning.stretched(config, images, plan.images_per_second[stage])) if images else config

    settings = {"output_dir": output / "autoencoder"}
    settings |= {f"model.{end}_channels": plan.channels for end in ("in", "out")}
    loss = parse(AutoencoderConfig, "autoencoder", settings, options.autoencoder).loss
    if plan.lpips_weights is None and loss.lpips_weights is None:
        settings["loss.lpips_weight"] = 0
    elif loss.lpips_weights is None:
        settings["loss.lpips_weights"] = options.lpips_weights or plan.lpips_weights
    first = parse(AutoencoderConfig, "autoencoder", settings, options.autoencoder, plan.autoencoder_images)

    stage_2_runs = []
    for number, images in enumerate(plan.diffusion_images or [0]):
        settings = {
            "output_dir": output / run_name(number),
            "autoencoder": output / "autoencoder" / "model",
            "latents": output / "latents",
            "class_conditional": str(plan.conditional).lower(),
        }
        further = [f"--init_from={output / run_name(number - 1)}"] if number else []
        stage_2_runs.append(parse(DiffusionConfig, "diffusion", settings, [*options.diffusion, *further], images))
    return first, stage_2_runs


def cached_vgg() -> Path | None:
    """Return torchvision's file of VGG16 if it was downloaded before."""
    from torchvision.models import VGG16_Weights

    file = Path(torch.hub.get_dir(), "checkpoints", VGG16_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    return file if file.is_file() else None


def write_report(plan: Plan, options: TrainPhotos, results: Results, log: Log) -> Path:
    """Write `report.html`, the pictures and `figures.json`; print what comes next. Return the report."""
    left_out = {}
    if not options.inception_weights:
        left_out["FID"] = "<code>--inception-weights FILE</code> (and <code>--feature-layer</code>) measures it."
    if "lpips_vgg" not in results.reconstruction:
        left_out["LPIPS"] = "<code>--lpips-weights FILE</code>, torchvision's VGG16, measures it."
    for name, how in left_out.items():
        log(f"{name} was left out: {how.replace('<code>', '').replace('</code>', '')}")

    minutes = {part: seconds / 60 for part, seconds in results.seconds_spent.items()}
    commands = next_commands(plan, options, results)
    report = Report(f"Photographs in {Path(options.folder).resolve().name}")
    report.text("<br>".join(map(escape, plan.found)))
    report.text(f"{plan.resolution}x{plan.resolution} pixels; {escape(plan.line())}.")
    for warning in plan.warnings():
        report.text(f"<b>Warning:</b> {escape(warning)}")
    results_sections(report, results, left_out)
    grids_section(report, results)
    report.heading("Time spent")
    rows = [(part, f"{spent:.1f} min", "summed over interruptions") for part, spent in minutes.items()]
    report.table([*rows, ("all", f"{sum(minutes.values()):.1f} min", f"of {60 * plan.hours:.4g} min planned")])
    report.heading("Next")
    for what, command in commands.items():
        report.text(f"{what}:<br><code>{escape(command)}</code>")
    write_pictures_and_figures(options.output, results, plan=vars(plan), seconds=results.seconds_spent)
    replace_text(options.output / "report.html", report.html())
    log("next:")
    for what, command in commands.items():
        log(f"  {what}: {command}")
    return options.output / "report.html"


def next_commands(plan: Plan, options: TrainPhotos, results: Results) -> dict[str, str]:
    """Return what a user may want to do next, and the command of each."""

    def command(*words) -> str:
        return shlex.join(["looc-ldm", *map(str, words)])

    own = ["--resolution", options.resolution] if options.resolution else []
    own += ["--classes", "none"] if plan.classes == "none" else []
    own += [f"--{stage}.{flag[2:]}" for stage in ("autoencoder", "diffusion") for flag in getattr(options, stage)]
    hours = f"{math.ceil(2 * plan.hours) if plan.hours >= 0.5 else 2 * plan.hours:g}"
    model = options.output / "autoencoder" / "model"
    output, folder, pipeline = options.output, options.folder, results.pipeline
    guided = ["--guidance-scale", f"{GUIDANCE_SCALE:g}"] if plan.conditional else []
    held_out = plan.validation_split or "validation"
    return {
        "more hours for stage 2": command("train", "photos", folder, "--output", output, *own, "--hours", hours),
        "draw images": command("sample", pipeline, *guided, "--output", output / "drawn"),
        "measure reconstructions": command("evaluate", "reconstruction", model, "--data", folder, "--split", held_out),
        "measure samples": command("evaluate", "generation", pipeline, "--data", folder, "--images", 1000),
        "publish": command("push", pipeline, "USER/NAME"),
    }
