"""The configuration: what it accepts, and what it says when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssd.config.load import config_path, load_config, resolve_model_path, shipped_configs
from ssd.config.sections import Config
from ssd.errors import ConfigError, ModelError

PAIR = {"target": {"model": "big"}, "draft": {"model": "small"}}


def complaint(source: object, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_shipped_configuration_loads_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    by_path = load_config("configs/embedded.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    assert load_config("embedded") == by_path
    assert by_path.target.cores == [0]
    assert by_path.draft is not None
    assert by_path.draft.cores == [1]
    assert (by_path.speculation.method, by_path.speculation.lookahead) == ("ssd", 4)


def test_every_shipped_configuration_is_valid() -> None:
    assert "embedded" in shipped_configs()
    for name in shipped_configs():
        load_config(name)


def test_defaults() -> None:
    config = load_config(PAIR)
    assert config.numerics == "strict"
    assert config.target.dtype == "float32"
    assert config.speculation.forecast.budget == 12
    assert config.engine.max_model_len == 1024


@pytest.mark.parametrize(
    ("override", "attribute", "value"),
    [
        ("speculation.lookahead=6", "speculation.lookahead", 6),
        ("speculation.method=none", "speculation.method", "none"),
        ("speculation.forecast.shape=uniform", "speculation.forecast.shape", "uniform"),
        ("target.cores=[2, 3]", "target.cores", [2, 3]),
        ("target.cores=null", "target.cores", None),
        ("draft.compile=off", "draft.compile", False),
        ("draft.compile=auto", "draft.compile", "auto"),
        ("engine.link_timeout_s=5", "engine.link_timeout_s", 5.0),
        ("engine.link_timeout_s=1e-1", "engine.link_timeout_s", 0.1),
        ("draft={model: other, device: cuda:1}", "draft.device", "cuda:1"),
    ],
)
def test_overrides_are_yaml(override: str, attribute: str, value: object) -> None:
    found: object = load_config(PAIR, [override])
    for part in attribute.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_overrides_apply_in_order_and_leave_the_source_alone() -> None:
    source = {"target": {"model": "a"}}
    config = load_config(source, ["draft.model=b", "speculation.lookahead=2", "speculation.lookahead=3"])
    assert config.draft is not None
    assert config.draft.model == "b"
    assert config.speculation.lookahead == 3
    assert source == {"target": {"model": "a"}}


def test_a_config_passes_through_and_takes_overrides() -> None:
    config = load_config(PAIR)
    assert load_config(config) == config
    assert load_config(config, ["numerics=fast"]).numerics == "fast"
    assert load_config(config.model_dump()) == config
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_plain_decoding_needs_no_draft() -> None:
    alone = {"target": {"model": "a"}}
    assert load_config(alone, ["speculation.method=none"]).draft is None
    assert "draft is missing" in complaint(alone)


@pytest.mark.parametrize("method", ["none", "sd", "self", "ssd"])
def test_lookahead_0_is_plain_decoding(method: str) -> None:
    config = load_config(PAIR, [f"speculation.method={method}", "speculation.lookahead=0"])
    assert config == load_config(PAIR, ["speculation.method=none"])
    assert load_config({"target": {"model": "a"}}, ["speculation.lookahead=0"]).draft is None


@pytest.mark.parametrize("given", ["false", "0.0", "'0'", "null"])
def test_only_the_integer_0_is_plain_decoding(given: str) -> None:
    assert "speculation.lookahead must be an integer from 0 to 16 or auto" in complaint(
        PAIR, (f"speculation.lookahead={given}",)
    )


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("speculation.lookahed=6", "speculation.lookahead"),
        ("lookahead=6", "speculation.lookahead"),
        ("speculation.budget=6", "speculation.forecast.budget"),
        ("draft.modl=x", "draft.model"),
        ("targets.model=x", "target.model"),
        ("engine.max_len=20", "engine.max_model_len"),
        ("draft={modl: x}", "draft.model"),
    ],
)
def test_unknown_override_names_the_nearest_key(override: str, nearest: str) -> None:
    text = complaint(PAIR, (override,))
    assert "unknown key" in text
    assert f"nearest: {nearest})" in text


def test_unknown_key_in_a_file_names_file_key_and_nearest(tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text("target: {model: a}\ndraft: {model: b}\nspeculation: {forecast: {budjet: 3}}\n")
    text = complaint(path)
    assert str(path) in text
    assert "unknown key speculation.forecast.budjet (nearest: speculation.forecast.budget)" in text


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("speculation.lookahead=99", ("speculation.lookahead", "99", "from 0 to 16")),
        ("speculation.lookahead=-1", ("speculation.lookahead", "-1", "from 0 to 16")),
        ("speculation.lookahead=true", ("speculation.lookahead", "True", "an integer")),
        ("speculation.lookahead=2.5", ("speculation.lookahead", "2.5", "an integer")),
        ("speculation.siblings=-1", ("speculation.siblings", "-1", "from 0 to 8")),
        ("speculation.method=fast", ("speculation.method", "'fast'", "none, sd, self, ssd")),
        ("speculation.verify=typical", ("speculation.verify", "'typical'", "coupled, rejection, block")),
        ("speculation.forecast=3", ("speculation.forecast", "3", "budget, shape")),
        ("speculation.forecast.acceptance=1.0", ("speculation.forecast.acceptance", "1.0", "below 1")),
        ("speculation.forecast.acceptance=.nan", ("speculation.forecast.acceptance", "nan", "number")),
        ("target.dtype=float8", ("target.dtype", "'float8'", "float32, bfloat16, float16")),
        ("target.dtype={a: 1}", ("target.dtype", "{'a': 1}", "float32")),
        ("target.cores=[0, x]", ("target.cores", "[0, 'x']", "list of integers")),
        ("target.compile=maybe", ("target.compile", "'maybe'", "auto or true or false")),
        ("target.model=", ("target.model", "None", "non-empty text")),
        ("engine.max_model_len=8", ("engine.max_model_len", "8", "at least 16")),
        ("engine.start_timeout_s=0", ("engine.start_timeout_s", "0", "above 0")),
        ("target=5", ("target", "5", "model, dtype")),
    ],
)
def test_wrong_value_says_key_value_and_what_is_allowed(override: str, parts: tuple[str, ...]) -> None:
    text = complaint(PAIR, (override,))
    for part in parts:
        assert part in text
    assert "unknown key" not in text


def test_all_wrong_values_are_reported_at_once() -> None:
    text = complaint(PAIR, ("speculation.lookahead=-1", "numerics=exact"))
    assert "speculation.lookahead" in text
    assert "numerics" in text


@pytest.mark.parametrize("override", ["lookahead", "=3", "target.dtype=["])
def test_malformed_override(override: str) -> None:
    assert override in complaint(PAIR, (override,))


@pytest.mark.parametrize("source", ["nope", "nope.yaml", "", "configs"])
def test_missing_file_names_the_shipped_configurations(source: str) -> None:
    text = complaint(source)
    assert repr(source) in text
    assert "embedded" in text


@pytest.mark.parametrize("text", ["- 1\n", "target: [\n", "", "just text"])
def test_file_that_is_not_a_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text(text)
    assert str(path) in complaint(path)


def test_missing_keys_are_named() -> None:
    assert "target is missing" in complaint({})
    assert "target.model is missing" in complaint({"target": {}})


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(PAIR).numerics = "fast"  # type: ignore[misc]


def test_config_path_of_a_shipped_name() -> None:
    assert config_path("embedded").name == "embedded.yaml"


def test_model_paths(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_path(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match="hub ids are not downloaded"):
        resolve_model_path("someone/some-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model_path(str(tmp_path / "empty"))


def test_shipped_models_lie_in_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ssd.config.model_paths.MODEL_FOLDER", tmp_path)
    with pytest.raises(ModelError, match="train_pair"):
        resolve_model_path("embedded/target")
    folder = tmp_path / "embedded" / "target"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve_model_path("embedded/target") == folder
