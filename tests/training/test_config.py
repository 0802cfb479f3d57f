"""A config is typed, complete and refused in one line where it is wrong."""

import dataclasses
import re

import pytest
import yaml

from looc_ldm import LooCVQModel
from looc_ldm.images.config import DataConfig
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig, OptimizerConfig
from looc_ldm.training.config_parsing import (
    config_text,
    construct,
    load_config,
    parse_config,
    to_dict,
)
from looc_ldm.training.run_folder import differences
from looc_ldm.utils.errors import ConfigError


def parse(*arguments: str, config_class=AutoencoderConfig):
    return parse_config(config_class, list(arguments), "looc-ldm")


def error_of(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write_config(tmp_path):
    def write(text: str) -> str:
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return str(file)

    return write


def test_a_file_fills_the_settings_and_flags_override_it(write_config):
    file = write_config("batch_size: 32\ndata:\n  resolution: 64\nmodel:\n  in_channels: 1\n  out_channels: 1\n")
    config = parse("--config", file, "--data.resolution", "128", "--model.in_channels", "3")
    assert (config.batch_size, config.data.resolution) == (32, 128)
    assert config.model == {"in_channels": 3, "out_channels": 1}
    assert config.data.path == "fashion_mnist"  # the default


def test_flags_and_files_apply_in_their_order(write_config):
    file = write_config("batch_size: 32\n")
    assert parse("--batch_size", "8", "--config", file).batch_size == 32


def test_numbers_with_an_exponent_are_numbers_also_inside_model_arguments(write_config):
    config = parse("--config", write_config("optimizer:\n  learning_rate: 1e-3\nmodel:\n  commitment_weight: 3e-1\n"))
    assert config.optimizer.learning_rate == 1e-3
    assert config.model["commitment_weight"] == 0.3


@pytest.mark.parametrize(
    ("text", "written", "meant"),
    [("batch_sise: 3\n", "batch_sise", "batch_size"), ("data:\n  flop: true\n", "data.flop", "data.flip")],
)
def test_an_unknown_key_in_a_file_is_answered_with_the_nearest_setting(write_config, text, written, meant):
    assert error_of("--config", write_config(text)) == f"unknown setting {written!r}; did you mean {meant!r}?"


@pytest.mark.parametrize(("written", "meant"), [("batchsize", "batch_size"), ("data.pth", "data.path")])
def test_an_unknown_flag_is_answered_with_the_nearest_setting(written, meant):
    assert error_of(f"--{written}", "3") == f"unknown setting {written!r}; did you mean {meant!r}?"


def test_an_unknown_model_argument_is_answered_with_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"^model has no argument 'codevector_dims'; did you mean 'codevector_dim'\?$"
    ):
        construct(LooCVQModel, {"codevector_dims": 4}, "model")


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("batch_size", "many", "int"),
        ("optimizer.learning_rate", "fast", "float"),
        ("data.fit", "stretch", "crop"),
        ("mixed_precision", "fp8", "bf16"),
        ("seed", "-1", "v>=0 and v<4294967296"),
        ("batch_size", "0", "v>0"),
        ("data.validation_images", "0", "v>0"),
        ("evaluation.every_images", "0", "PositiveInt"),
        ("data.num_classes", "1", "v>=2"),
        ("data.max_unreadable_share", "1.5", "v>=0 and v<=1"),
        ("optimizer.betas", "[0.9, 1.0]", "v>=0 and v<1"),
        ("optimizer.learning_rate", "1e30", "v>0 and v<=1"),
        ("loss.adversarial_weight", "-1", "v>=0"),
        ("loss.discriminator_layers", "-1", "v>0"),
        ("push_to_hub", "mine", r"[\w.-]+/[\w.-]+"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(flag, value, allowed):
    message = error_of(f"--{flag}", value)
    assert flag in message
    assert value.split()[-1].strip("]") in message
    assert allowed in message


def test_an_unknown_config_name_is_answered_with_the_bundled_ones():
    message = error_of("--config", "fashion_mnst/autoencoder")
    assert "'fashion_mnst/autoencoder'" in message
    assert "fashion_mnist/autoencoder" in message


WITHDRAWN = "{data: {resolution: 64, validation_labels: null}, loss: {lecam_weight: 0.0, adversarial_ramp_images: 0}}"


def test_a_stored_config_with_withdrawn_settings_at_their_defaults_is_read_without_them(write_config):
    config = parse("--config", write_config(WITHDRAWN))
    assert config == AutoencoderConfig(data=DataConfig(resolution=64))
    stored = write_config("{model: {in_channels: 1, contrastive_weight: 0.0, revive_first_batch_only: false}}")
    assert parse(f"--config={stored}").model == {"in_channels": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WITHDRAWN.replace("0.0", "0.1"), "loss.lecam_weight=0.1 was withdrawn"),
        (WITHDRAWN.replace("null", "x.csv"), "data.validation_labels='x.csv' was withdrawn"),
        ("{model: {contrastive_weight: 1}}", "model.contrastive_weight=1 was withdrawn"),
    ],
)
def test_a_withdrawn_setting_with_another_value_is_refused(write_config, text, message):
    assert message in error_of("--config", write_config(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [\n", "cannot read the config"),
        ("- 1\n", "not a YAML mapping of settings"),
        ("", "not a YAML mapping of settings"),
        ("data: 3\n", "data must be a mapping of settings in '.*', got 3"),
        ("model:\n", "model must be a mapping of settings in '.*', got None"),
        ("total_images:\n", "total_images has no value in '"),
        ("optimizer: {learning_rate: }\n", "optimizer.learning_rate has no value in '"),
    ],
)
def test_a_file_that_is_not_a_config_is_one_line(write_config, text, message):
    assert re.search(message, error_of("--config", write_config(text)))


def test_a_config_is_read_in_utf_8_or_utf_16_and_else_refused_in_one_line(tmp_path):
    file = tmp_path / "config.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_bytes("output_dir: läufe\n".encode(encoding))
        assert parse("--config", str(file)).output_dir == "läufe"
    file.write_bytes("output_dir: läufe\n".encode("cp1252"))
    assert re.search("cannot read the config '.*', YAML in UTF-8: ", error_of("--config", str(file)))


def test_paths_may_begin_with_the_users_folder(write_config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = parse("--config", write_config("output_dir: ~/runs\n"), "--data.path=~/images")
    assert (config.output_dir, config.data.path) == ("/home/me/runs", "/home/me/images")


def test_lists_become_tuples():
    assert parse("--optimizer.betas", "[0.5, 0.9]").optimizer.betas == (0.5, 0.9)
    model = construct(LooCVQModel, {"block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"]}, "model")
    assert model.config.block_out_channels == (32,)


@pytest.mark.parametrize("config_class", [AutoencoderConfig, DiffusionConfig])
def test_every_setting_has_a_help_text(config_class, capsys):
    with pytest.raises(SystemExit):
        parse("--help", config_class=config_class)
    printed = capsys.readouterr().out
    expected = {
        f"{field.name}.{inner.name}" if dataclasses.is_dataclass(field.default_factory) else field.name
        for field in dataclasses.fields(config_class)
        for inner in (
            dataclasses.fields(field.default_factory) if dataclasses.is_dataclass(field.default_factory) else (field,)
        )
    }
    helped = dict(re.findall(r"^  --([\w.]+)[ +][^\n]*?\n?\s+([A-Z`][^\n]*)", printed, flags=re.MULTILINE))
    assert expected <= set(helped)


@pytest.mark.parametrize(
    ("config_class", "name"),
    [(AutoencoderConfig, "fashion_mnist/autoencoder"), (DiffusionConfig, "fashion_mnist/diffusion")],
)
def test_a_saved_config_loads_equal(config_class, name, tmp_path):
    config = load_config(config_class, name, output_dir="elsewhere", optimizer__learning_rate=3e-5)
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert load_config(config_class, str(tmp_path / "config.yaml")) == config
    assert config.output_dir == "elsewhere"


def test_a_config_made_in_python_with_tuples_is_the_one_that_is_saved():
    config = AutoencoderConfig(model={"block_out_channels": (8, 16)})
    assert differences(yaml.safe_load(config_text(config)), to_dict(config)) == []


def test_differences_name_what_changed():
    old = AutoencoderConfig(model={"vq_embed_dim": 4, "block_out_channels": [8, 16]})
    new = AutoencoderConfig(
        seed=1, model={"vq_embed_dim": 8, "block_out_channels": [8, 16]}, optimizer=OptimizerConfig(weight_decay=0.1)
    )
    assert differences(to_dict(old), to_dict(new)) == [
        "seed: 0 -> 1",
        "model.vq_embed_dim: 4 -> 8",
        "optimizer.weight_decay: 0.0 -> 0.1",
    ]


def test_differences_leave_out_length_reporting_and_place_of_a_run():
    old = AutoencoderConfig()
    new = AutoencoderConfig(
        output_dir="x",
        total_images=5,
        log_every_images=1,
        preview_every_images=1,
        checkpoint_every_images=1,
        keep_last=9,
        tracker="none",
        data=DataConfig(num_workers=0),
    )
    assert differences(to_dict(old), to_dict(new)) == []
