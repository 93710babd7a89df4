"""Settings: every mistake at once, with its line, its value and what is allowed."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from vattn_sgl.cli import app
from vattn_sgl.config import (
    ALLOWED,
    RUNTIME_FIELDS,
    ConfigError,
    PatchError,
    Settings,
    check_file,
    load_settings,
    load_with_sources,
    validate_patch,
)

SIX_MISTAKES = """\
epsilon: 3
delta: half
samplr: uniform
window: 0
top_k: 1.5
layers:
  0-4: {epsilon: 0.1}
  7: {epsilon: 0}
"""
VALID = {
    "epsilon": st.floats(1e-6, 1),
    "delta": st.floats(1e-9, 0.49),
    "sampler": st.sampled_from(["proportional", "uniform"]),
    "target": st.sampled_from(["output", "denominator", "numerator", "sdpa"]),
    "bound": st.sampled_from(["f8", "student", "clt", "bernstein", None]),
    "sink": st.integers(0, 4096),
    "window": st.integers(1, 4096),
    "top_k": st.one_of(st.integers(0, 4096), st.floats(0, 1)),
    "pilot": st.floats(1e-4, 1),
    "pilot_min": st.integers(4, 512),
    "cap": st.floats(1e-3, 1),
    "dense_below": st.integers(0, 1 << 20),
    "selector": st.sampled_from(["sketch", "oracle", "quest", "sign", "hash"]),
    "sketch_bits": st.sampled_from([32, 64, 128]),
    "hash_weights": st.just("weights.pt"),
    "group_score": st.sampled_from(["max", "mean"]),
    "floor": st.floats(1e-3, 1),
    "seed": st.integers(0, 2**32 - 1),
    "audit_rate": st.floats(0, 1),
    "calibration_tokens": st.integers(512, 1 << 20),
    "prefill_backend": st.sampled_from([None, "torch_native"]),
    "dense_backend": st.sampled_from([None, "flashinfer"]),
    "layers": st.dictionaries(
        st.sampled_from(["0", "3", "4-9"]), st.fixed_dictionaries({"epsilon": st.floats(1e-6, 1)})
    ),
}
WRONG = {
    "epsilon": [0, -0.1, 1.5, "x", None, [0.1], True, "0.1"],
    "delta": [0, 5e-324, 1e-300, 9e-10, 0.5, 1, "x", "0.05"],
    "sampler": ["random", 1],
    "target": ["sum", None],
    "bound": ["t", 1],
    "sink": [-1, 1.5, 2**31, 10**23, "x"],
    "window": [0, -1, 2.5, 2**31, 10**23],
    "top_k": [-1, 1.5, True, 2**31, 10**23, "x"],
    "pilot": [0, 1.1, True],
    "pilot_min": [3, 4.5, 2**31, 10**23],
    "cap": [0, 2],
    "dense_below": [-1, 0.5, 2**31, 10**23],
    "selector": ["pqcache", "hash"],
    "sketch_bits": [96, "64"],
    "hash_weights": [3, ""],
    "group_score": ["sum", 1],
    "floor": [0, 2],
    "seed": [-1, 2**32],
    "audit_rate": [-0.1, 1.1, False],
    "calibration_tokens": [511, 2**31, 10**23],
    "prefill_backend": [1, ""],
    "dense_backend": [1, ""],
    "layers": [{"a": {}}, {"4-2": {}}, {"10000": {}}, {"0-99999999999": {}}, 3, {"3": {"sink": 4}}],
}
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)


def bound_is_supported(values):
    if values.get("bound") == "bernstein" and values.get("selector") in ("sign", "hash"):
        return False
    return values.get("bound") != "f8" or values.get("target", "output") == "output"


def write(tmp_path, text):
    file = tmp_path / "vattn.yaml"
    file.write_text(text)
    return file


def test_every_field_is_covered_here_and_says_what_is_allowed():
    assert set(VALID) == set(WRONG) == set(ALLOWED) == set(Settings.model_fields)
    assert set(RUNTIME_FIELDS) < set(ALLOWED)


def test_six_mistakes_give_six_messages_and_exit_status_2(tmp_path):
    file = write(tmp_path, SIX_MISTAKES)
    result = CliRunner().invoke(app, ["config", "check", str(file)])
    lines = result.stdout.splitlines()
    assert result.exit_code == 2
    assert len(lines) == 6
    keys = ("epsilon", "delta", "samplr", "window", "top_k", "layers.7.epsilon")
    for line, number, key, value in zip(
        lines, (1, 2, 3, 4, 5, 8), keys, (3, "half", "uniform", 0, 1.5, 0), strict=True
    ):
        assert line.startswith(f"{file}: line {number}: {key}: got {value!r}; expected ")
    assert "did you mean 'sampler'?" in lines[2]


@quick
@given(values=st.fixed_dictionaries({}, optional=VALID).filter(bound_is_supported))
def test_a_right_file_is_read_as_written(tmp_path, values):
    if values.get("selector") == "hash":
        values.setdefault("hash_weights", "weights.pt")
    file = write(tmp_path, yaml.safe_dump(values))
    assert check_file(file) == []
    assert load_settings(file, {}) == Settings(**values)


@quick
@given(field=st.sampled_from(sorted(WRONG)), data=st.data(), before=st.integers(0, 5))
def test_a_wrong_value_is_named_once_with_its_line(tmp_path, field, data, before):
    value = data.draw(st.sampled_from(WRONG[field]))
    file = write(
        tmp_path, "# comment\n" * before + yaml.safe_dump({field: value}, default_flow_style=True, width=1000)[1:-2]
    )
    mistakes = check_file(file)
    assert len(mistakes) == 1
    assert mistakes[0].key.split(".")[0] == field
    assert mistakes[0].line == before + 1
    assert mistakes[0].allowed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epsilon: 0.1\nepsilon: 0.2\n", "line 2: epsilon: got 'a second entry'; expected one entry; the first is on"),
        ("- 1\n", "line 1: file: got 'list'; expected a mapping of settings"),
        ("epsilon: [\n", "expected valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path, text, expected):
    mistakes = check_file(write(tmp_path, text))
    assert len(mistakes) == 1
    assert expected in str(mistakes[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sink: 8\nepsilon: 2020-13-45\n", ["line 2: epsilon: got '2020-13-45'; expected a number"]),
        ("seed: 0b_\n", ["line 1: seed: got '0b_'; expected a whole number"]),
        ("seed: !!int ''\n", ["line 1: seed: got ''; expected a whole number"]),
        (f"seed: {'1' * 5000}\nsink: -1\n", ["line 1: seed: got '111", "line 2: sink: got -1"]),
        (f"seed: 0x{'f' * 5000}\n", ["line 1: seed: got '0xfff"]),
        (f"seed: !!int 0x{'f' * 5000}\n", ["line 1: seed: got an integer too large to show"]),
        (f"epsilon: !!int 0x{'f' * 5000}\n", ["line 1: epsilon: got an integer too large to show"]),
        ("[" * 3000, ["line 1: file: got 'it is nested too deeply'; expected valid YAML"]),
        ("layers: &a {3: *a}\n", ["line 1: layers.3."]),
        ("? 0x" + "f" * 5000 + "\n: 1\n", ["line 1: '0xfff"]),
        ("? !!int 0x" + "f" * 5000 + "\n: 1\n", ["line 1: '0xfff"]),
        ("layers:\n  ? 0x" + "f" * 5000 + "\n  : {}\n", ["line 2: 'layers.0xfff"]),
        ("sink: &s 8\n<<: {epsilon: 7}\n", ["epsilon: got 7"]),
        ("layers: {<<: {3: {epsilon: 9}}}\n", ["line 1: layers.3.epsilon: got 9"]),
        ('"epsilon\\uD800": 1\n', ["file: got"]),
        ("layers:\n  3: &x {epsilon: 0.1}\n  4:\n    <<: *x\n    delta: 9\n", ["line 5: layers.4.delta: got 9"]),
        ("sink: 1\nno: 1\n", ["line 2: no: got 1; expected one of"]),
        (
            "layers:\n  3: {epsilon: 0.1}\n  '3': {delta: 0.1}\n",
            ["line 3: layers.3: got 'a second entry'; expected one"],
        ),
        (
            "layers:\n  true: {epsilon: 0.1}\n  ~: {}\n  0x10: {}\n  1_0: {}\n  1:30: {}\n  2020-01-01: {}\n",
            [
                "line 2: layers.true: got 'true'; expected a layer such as 3",
                "line 3: layers.~: got '~'; expected a layer such as 3",
                "line 4: layers.0x10: got '0x10'; expected a layer such as 3",
                "line 5: layers.1_0: got '1_0'; expected a layer such as 3",
                "line 6: layers.1:30: got '1:30'; expected a layer such as 3",
                "line 7: layers.2020-01-01: got '2020-01-01'; expected a layer such as 3",
            ],
        ),
        *[
            (
                f"layers: {{3: {value}}}\n",
                [f"line 1: layers.3: got {shown}; expected a mapping of epsilon, delta or both,"],
            )
            for value, shown in (("null", "None"), ("0.1", "0.1"), ("[1]", "[1]"))
        ],
        ("layers: {epsilon: 0.1}\n", ["line 1: layers.epsilon: got 'epsilon'; expected a layer such as 3"]),
        ("layers:\n", ["line 1: layers: got None; expected a mapping from a layer such as 3"]),
        ("layers: {3: {true: 1}}\n", ["line 1: layers.3.true: got 1; expected one of epsilon, delta"]),
        ("epsilon: &a [*a]\n", ["line 1: epsilon: got [["]),
        (
            "layers:\n  a: {}\n  3: {epsilon: 2}\n  4-2: {delta: 0.1}\n  5: 7\n",
            [
                "line 2: layers.a: got 'a'; expected a layer such as 3",
                "line 3: layers.3.epsilon: got 2",
                "line 4: layers.4-2: got '4-2'; expected a layer such as 3",
                "line 5: layers.5: got 7; expected a mapping",
            ],
        ),
    ],
)
def test_what_yaml_or_a_layer_cannot_be_is_told_beside_the_rest(tmp_path, text, expected):
    result = CliRunner().invoke(app, ["config", "check", str(write(tmp_path, text))])
    lines = result.stdout.splitlines()
    assert result.exit_code == 2
    assert [any(part in line for line in lines) for part in expected] == [True] * len(expected)
    assert len(lines) == len(expected)
    assert max(map(len, lines)) < 500


@pytest.mark.parametrize(
    ("name", "value"),
    [("EPSILON", "2020-13-45"), ("SEED", "0b_"), ("EPSILON", "yes"), ("EPSILON", "'0.1'"), ("SINK", "[" * 3000)],
)
def test_a_variable_that_is_no_number(name, value):
    with pytest.raises(ConfigError, match=rf"VATTN_{name}: got ") as caught:
        load_settings(env={f"VATTN_{name}": value})
    assert len(str(caught.value)) < 400


def test_numbers_may_be_written_as_json_and_helm_do(tmp_path):
    assert load_settings(write(tmp_path, "epsilon: 1e-3\ndelta: 1E-06\n"), {}).delta == 1e-6
    assert load_settings(env={"VATTN_EPSILON": "1e-3"}).epsilon == 1e-3


@pytest.mark.parametrize("text", ["010", "1:30", "0x10", "1_000", "0b11", "0o17", "-010", "08"])
def test_a_number_that_yaml_versions_read_differently_is_refused(tmp_path, text):
    mistakes = check_file(write(tmp_path, f"sink: {text}\n"))
    assert [(m.key, m.value, m.line) for m in mistakes] == [("sink", text, 1)]
    with pytest.raises(ConfigError, match=f"VATTN_SINK: got '{text}'; expected a whole number"):
        load_settings(env={"VATTN_SINK": text})


@pytest.mark.parametrize("text", ["0:0.5", "0.1_0", "1e", ".", "1e5_0"])
def test_a_fraction_that_is_none_in_json_is_refused(tmp_path, text):
    assert [m.value for m in check_file(write(tmp_path, f"epsilon: {text}\n"))] == [text]


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("+0.5", 0.5), (".5", 0.5), ("1.", 1), ("5.0e-1", 0.5), ("5E-01", 0.5), ("1e0", 1)]
)
def test_a_fraction_of_yaml_is_read(tmp_path, text, value):
    assert load_settings(write(tmp_path, f"epsilon: {text}\n"), {}).epsilon == value


def test_not_a_number_and_infinity_are_told_as_numbers(tmp_path):
    told = check_file(write(tmp_path, "epsilon: .nan\ndelta: -.inf\ncap: .INF\n"))
    assert [str(m.value) for m in told] == ["nan", "-inf", "inf"]


def test_a_layer_is_decimal_whatever_its_zeros(tmp_path):
    file = write(tmp_path, "layers:\n  010: {epsilon: 0.1}\n  10: {delta: 0.1}\n  '08-9': {epsilon: 0.2}\n")
    only = {"epsilon": 0.2}
    assert load_settings(file, {}).layer_overrides() == {8: only, 9: only, 10: {"epsilon": 0.1, "delta": 0.1}}


def test_a_missing_or_binary_file(tmp_path):
    assert "readable" in check_file(tmp_path / "none.yaml")[0].allowed
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "readable" in check_file(tmp_path / "binary")[0].allowed


def test_the_environment_overrides_the_file_and_says_so(tmp_path):
    file = write(tmp_path, "epsilon: 0.2\nsink: 8\n")
    found, sources = load_with_sources(None, {"VATTN_CONFIG": str(file), "VATTN_EPSILON": "0.3"})
    assert (found.epsilon, found.sink, found.window) == (0.3, 8, Settings().window)
    assert (sources["epsilon"], sources["sink"], sources["window"]) == ("VATTN_EPSILON", str(file), "default")


@pytest.mark.parametrize("field", ["hash_weights", "prefill_backend", "dense_backend"])
def test_an_empty_variable_is_null_and_an_empty_text_is_no_name(field):
    name = f"VATTN_{field.upper()}"
    assert getattr(load_settings(env={name: ""}), field) is None
    with pytest.raises(ConfigError, match=f"{name}: got ''; expected the .*, or null"):
        load_settings(env={name: "''"})


def test_every_mistake_of_the_environment_is_told_at_once():
    env = {
        "VATTN_EPSILON": "7",
        "VATTN_WINDOWS": "3",
        "VATTN_LAYERS": "{3: {delta: 2}}",
        "OTHER": "1",
        "VATTN_CACHE": "x",
    }
    with pytest.raises(ConfigError) as caught:
        load_settings(env=env)
    assert len(caught.value.mistakes) == 3
    assert "did you mean 'VATTN_WINDOW'?" in str(caught.value)


def test_a_value_of_the_file_that_a_variable_makes_wrong_names_its_field(tmp_path):
    file = write(tmp_path, "bound: f8\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(file, {"VATTN_TARGET": "denominator"})
    assert [(m.key, m.value, m.line) for m in caught.value.mistakes] == [("bound", "f8", 1)]
    assert f"1 mistake(s) in {file} and the environment:" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "env"),
    [
        ("selector: hash\n", {"VATTN_HASH_WEIGHTS": "w.pt"}),
        ("target: denominator\nbound: f8\n", {"VATTN_BOUND": "student"}),
        ("target: denominator\nbound: f8\n", {"VATTN_TARGET": "output"}),
        ("epsilon: 7\n", {"VATTN_EPSILON": "0.1"}),
    ],
)
def test_a_file_that_the_environment_makes_right(tmp_path, text, env):
    file = write(tmp_path, text)
    assert check_file(file)
    load_settings(file, env)


def test_mistakes_of_the_file_and_the_environment_are_told_together(tmp_path):
    file = write(tmp_path, "sink: 8\nwindow: 0\nwindo: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(file, {"VATTN_EPSILON": "", "VATTN_BOUND": "", "VATTN_NO": "1"})
    found = {(m.key, m.value, m.line) for m in caught.value.mistakes}
    assert found == {("window", 0, 2), ("windo", 1, 3), ("VATTN_EPSILON", "", None), ("VATTN_NO", "1", None)}
    with pytest.raises(ConfigError, match=r"  file: got .*none\.yaml.*readable"):
        load_settings(tmp_path / "none.yaml", {})


def test_a_variable_of_layers_names_the_layer_and_the_field():
    env = {"VATTN_LAYERS": "{3: {epsilon: 9, sink: 1}, 99999: {}}"}
    with pytest.raises(ConfigError) as caught:
        load_settings(env=env)
    keys = ["VATTN_LAYERS.3.epsilon", "VATTN_LAYERS.3.sink", "VATTN_LAYERS.99999"]
    assert [mistake.key for mistake in caught.value.mistakes] == keys


@pytest.mark.parametrize("key", ["vattention.epsilon", ".x", "epsilon.value"])
def test_a_key_with_a_dot_is_named_with_its_line(tmp_path, key):
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, f"sink: 8\n{key}: 0.1\n"), {})
    assert [(m.key, m.value, m.line) for m in caught.value.mistakes] == [(key, 0.1, 2)]


def test_a_layer_that_a_variable_names_twice_has_no_line():
    with pytest.raises(ConfigError) as caught:
        load_settings(env={"VATTN_LAYERS": "{3: {epsilon: 0.1}, 3: {epsilon: 0.2}}"})
    assert [str(m) for m in caught.value.mistakes] == ["VATTN_LAYERS.3: got 'a second entry'; expected one entry"]


def test_a_key_that_stands_twice_is_told_where_a_variable_overrides_it_too(tmp_path):
    file = write(tmp_path, "epsilon: 7\nlayers:\n  3: {delta: 7}\n  3: {}\nepsilon: 8\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(file, {"VATTN_EPSILON": "0.1", "VATTN_LAYERS": "{}"})
    assert [(m.key, m.value, m.line) for m in caught.value.mistakes] == [
        ("layers.3", "a second entry", 4),
        ("epsilon", "a second entry", 5),
    ]


def test_show_prints_settings_that_can_be_read_again(monkeypatch):
    monkeypatch.setenv("VATTN_EPSILON", "0.25")
    result = CliRunner().invoke(app, ["config", "show"])
    assert result.exit_code == 0
    assert Settings(**yaml.safe_load(result.stdout)) == Settings(epsilon=0.25)
    assert "# VATTN_EPSILON" in result.stdout


def test_the_floor_follows_the_selector_unless_it_is_given():
    assert [Settings(selector=s).floor for s in ("sketch", "sign", "quest")] == [0.01, 0.05, 0.05]
    assert [Settings.default_floor(s) for s in ("sketch", "sign", "quest")] == [0.01, 0.05, 0.05]
    assert Settings(selector="quest", floor=0.1).floor == 0.1
    assert load_settings(env={"VATTN_SELECTOR": "quest"}).floor == 0.05


def test_hash_without_weights_is_told_where_it_is_asked_for():
    with pytest.raises(ConfigError, match=r"VATTN_SELECTOR: got 'hash'; expected .* the setting hash_weights"):
        load_settings(env={"VATTN_SELECTOR": "hash"})
    assert load_settings(env={"VATTN_SELECTOR": "hash", "VATTN_HASH_WEIGHTS": "w.pt"}).hash_weights == "w.pt"


def test_layer_ranges_are_merged_and_the_narrower_wins():
    found = Settings(layers={"1-1": {"epsilon": 0.2}, "0-2": {"epsilon": 0.1}, "2": {"delta": 0.01}})
    only = {"epsilon": 0.1}
    assert found.layer_overrides() == {0: only, 1: {"epsilon": 0.2}, 2: only | {"delta": 0.01}}


def overrides(layers):
    """Overrides by layer, or None where they are refused."""
    try:
        return Settings(layers=layers).layer_overrides()
    except ValidationError:
        return None


@quick
@given(
    layers=st.dictionaries(
        st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda ends: f"{min(ends)}-{max(ends)}")
        | st.sampled_from(["0", "3", "03"]),
        st.fixed_dictionaries({}, optional=dict.fromkeys(RUNTIME_FIELDS, st.sampled_from([0.1, 0.2]))),
        max_size=4,
    ),
    data=st.data(),
)
def test_the_order_of_layers_means_nothing(layers, data):
    shuffled = dict(data.draw(st.permutations(list(layers.items()))))
    assert overrides(shuffled) == overrides(layers)


@pytest.mark.parametrize(
    ("first", "second"),
    [("0-4", "3-6"), ("0-4", "4-5"), ("3", "03"), ("3", "3-3"), ("03-04", "3-4"), ("0-3", "2-9")],
)
def test_overlapping_ranges_of_which_none_is_narrower_must_not_differ(tmp_path, first, second):
    text = "layers:\n  '{}': {{epsilon: 0.1, delta: 0.1}}\n  '{}': {{{}}}\n"
    for keys in ((first, second), (second, first)):
        told = [str(mistake) for mistake in check_file(write(tmp_path, text.format(*keys, "epsilon: 0.2, delta: 0.3")))]
        assert len(told) == 2
        assert told[0].startswith(f"line 3: layers.{keys[1]}.epsilon: got 0.2; expected 0.1 as in {keys[0]!r}")
        assert told[1].startswith(f"line 3: layers.{keys[1]}.delta: got 0.3; expected 0.1 as in {keys[0]!r}")
        assert check_file(write(tmp_path, text.format(*keys, "epsilon: 0.1"))) == []
    assert overrides({first: {"epsilon": 0.1}, second: {"delta": 0.2}})[3 if "3" in first else 4] == {
        "epsilon": 0.1,
        "delta": 0.2,
    }


@pytest.mark.parametrize(("wide", "narrow"), [("0-4", "4"), ("0-4", "0-3"), ("2-9", "3-04"), ("0-9999", "0")])
def test_a_range_inside_another_may_differ(wide, narrow):
    found = overrides({narrow: {"epsilon": 0.2}, wide: {"epsilon": 0.1, "delta": 0.1}})
    assert {0.1, 0.2} == {values["epsilon"] for values in found.values()}
    assert found[int(narrow.partition("-")[0])] == {"epsilon": 0.2, "delta": 0.1}


def test_a_variable_of_overlapping_layers_names_both_keys():
    with pytest.raises(ConfigError, match=r"VATTN_LAYERS\.1-2\.delta: got 0\.2; expected 0\.1 as in '0-1'"):
        load_settings(env={"VATTN_LAYERS": "{0-1: {delta: 0.1}, 1-2: {delta: 0.2}}"})


@pytest.mark.parametrize(
    ("sampler", "target", "bound"),
    [
        ("proportional", "output", "f8"),
        ("proportional", "denominator", "student"),
        ("uniform", "output", "student"),
        ("uniform", "denominator", "student"),
        ("proportional", "numerator", "student"),
        ("proportional", "sdpa", "student"),
        ("uniform", "sdpa", "student"),
    ],
)
def test_default_bound(sampler, target, bound):
    assert Settings(sampler=sampler, target=target).effective_bound == bound
    assert Settings(sampler=sampler, target=target, bound="clt").effective_bound == "clt"


@pytest.mark.parametrize("target", ["denominator", "numerator", "sdpa"])
def test_f8_is_refused_for_an_error_that_may_have_one_dimension(tmp_path, target):
    mistakes = check_file(write(tmp_path, f"target: {target}\nbound: f8\n"))
    assert [(m.key, m.line, m.value) for m in mistakes] == [("bound", 2, "f8")]
    assert f"'student', 'clt', 'bernstein' or null with target {target!r}: " in mistakes[0].allowed
    assert check_file(write(tmp_path, f"target: {target}\nbound: bernstein\n")) == []
    assert check_file(write(tmp_path, "bound: f8\n")) == []


@pytest.mark.parametrize("selector", ["sign", "hash"])
def test_bernstein_is_refused_where_nothing_bounds_a_logit(tmp_path, selector):
    text = f"hash_weights: w.pt\nselector: {selector}\nbound: bernstein\n"
    mistakes = check_file(write(tmp_path, text))
    assert [(m.key, m.line, m.value) for m in mistakes] == [("selector", 2, selector)]
    assert "'sketch', 'oracle', 'quest' with bound 'bernstein': " in mistakes[0].allowed
    for right in (text.replace("bernstein", "student"), text.replace(f": {selector}", ": quest")):
        assert check_file(write(tmp_path, right)) == []


@pytest.mark.parametrize(
    ("patch", "fields"),
    [
        ({}, ["body"]),
        ([1], ["body"]),
        (None, ["body"]),
        ({"epsilon": 0}, ["epsilon"]),
        ({"epsilon": float("nan")}, ["epsilon"]),
        ({"epsilon": True}, ["epsilon"]),
        ({"epsilon": "0.1"}, ["epsilon"]),
        ({"epsilon": None}, ["epsilon"]),
        ({"delta": 1e-300}, ["delta"]),
        ({"delta": 0.5, "epsilon": 2}, ["delta", "epsilon"]),
        ({"sink": 3, "nonsense": 1, "epsilon": 0.1}, ["nonsense", "sink"]),
    ],
)
def test_a_wrong_patch_names_every_field(patch, fields):
    with pytest.raises(PatchError) as caught:
        validate_patch(patch)
    detail = caught.value.detail()
    assert sorted(entry["field"] for entry in detail) == fields
    assert all(entry["allowed"] for entry in detail)


@given(st.fixed_dictionaries({}, optional={f: VALID[f] for f in RUNTIME_FIELDS}).filter(bool))
def test_a_right_patch_comes_back_as_floats(patch):
    assert validate_patch(json.loads(json.dumps(patch))) == patch
