from __future__ import annotations

import dataclasses
import json

import pytest

from geco_fast.experiments import TrainConfig, TrainError
from geco_fast.experiments.config import BY_MODEL, KAPPAS


def test_json_round_trip(tmp_path):
    config = TrainConfig(constraint=("re", "pncc"), kappa=(0.2, 0.8), steps=7, data_root="there")
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert TrainConfig.from_file(path) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "vae"}, "model must be one of"),
        ({"data": "digit"}, "data must be one of"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"steps": 1.5}, "steps must be of type int"),
        ({"steps": True}, "steps must be of type int"),
        ({"download": 1}, "download must be of type bool"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be > 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be > 0 and finite"),
        ({"alpha": 1.0}, "alpha must be < 1"),
        ({"step_size": -1.0}, "step_size must be > 0"),
        ({"constraint": ()}, "constraint must name each constraint once"),
        ({"constraint": ("re", "re")}, "constraint must name each constraint once"),
        ({"constraint": ("mse",)}, "constraint must be one of"),
        ({"constraint": ("re", "pncc"), "kappa": (0.1,)}, "kappa must be given once for each"),
        ({"kappa": (0.0,)}, "kappa of re must be > 0"),
        ({"constraint": ("pncc",), "kappa": (1.0,)}, "kappa of pncc must be < 1"),
    ],
)
def test_what_is_out_of_range_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stepz": 3}', "unknown configuration key 'stepz'"),
        ("[]", "must hold an object"),
        ("{", "config.json"),
        ('{"seed": null}', "seed must be of type int"),
        ('{"kappa": 3}', "config.json"),
    ],
)
def test_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(TrainError, match=message):
        TrainConfig.from_file(path)


def test_missing_file_says_that_there_is_no_run(tmp_path):
    with pytest.raises(TrainError, match="holds no run"):
        TrainConfig.from_file(tmp_path / "config.json")


def test_every_field_is_explained_and_kept_in_json():
    kept = json.loads(TrainConfig().to_json())
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"]
        assert field.name in kept


@pytest.mark.parametrize("name", KAPPAS)
def test_step_size_follows_the_constraint(name):
    assert TrainConfig(constraint=("cla", "re")).geco_step_size == 0.05 / 0.1**2
    most = KAPPAS[name] ** 2 if "re" in name else 1 - KAPPAS[name]
    assert TrainConfig(constraint=(name,)).geco_step_size == 0.05 / most
    assert TrainConfig(constraint=(name,), step_size=0.5).geco_step_size == 0.5


@pytest.mark.parametrize("model", BY_MODEL)
def test_defaults_follow_the_model(model):
    config = TrainConfig(model=model)
    assert {name: getattr(config, name) for name in BY_MODEL[model]} == BY_MODEL[model]
    assert TrainConfig(model=model, steps=3).steps == 3


def test_only_free_fields_may_change_on_resume():
    earlier = TrainConfig()
    dataclasses.replace(earlier, steps=9, threads=1, checkpoint_every=3).check_resumes(earlier)
    with pytest.raises(TrainError, match=r"cannot resume with seed 1: .* started with 0"):
        dataclasses.replace(earlier, seed=1).check_resumes(earlier)
