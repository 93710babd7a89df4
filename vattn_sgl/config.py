"""Settings: the only place of defaults, limits and their messages.

A YAML file named by ``VATTN_CONFIG`` is overridden by ``VATTN_<FIELD>`` variables. Every mistake is reported at once.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from vattn_kernels.quantiles import BOUNDS, BOUNDS_OF_TARGET, COARSE_SELECTORS, PROVABLE_SELECTORS, default_bound

PREFIX = "VATTN_"
NOT_SETTINGS = ("VATTN_CONFIG", "VATTN_CACHE")
RUNTIME_FIELDS = ("epsilon", "delta")
# Coarse scores miss more, so more is spread evenly.
FLOORS = dict.fromkeys(COARSE_SELECTORS, 0.05)

# Strict, because true would count as 1 and "0.05" as a number.
Epsilon = Annotated[float, Field(strict=True, gt=0, le=1)]
# Quantiles of rarer failures pass what float32 variances resolve.
LEAST_DELTA = 1e-9
Delta = Annotated[float, Field(strict=True, ge=LEAST_DELTA, lt=0.5)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
PositiveShare = Annotated[float, Field(strict=True, gt=0, le=1)]
# Positions are int32 in the kernels.
MOST_TOKENS = 2**31 - 1
Count = Annotated[StrictInt, Field(ge=0, le=MOST_TOKENS)]
# An empty text names nothing.
Name = Annotated[str, Field(min_length=1)]
MOST_LAYERS = 10_000
# Characters of a value in a message.
MOST_SHOWN = 100
_LAYERS = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")
_LAYERS_ALLOWED = f"a layer such as 3 or a range such as 0-4, below {MOST_LAYERS}"


_shortening = reprlib.Repr()
_shortening.maxstring = _shortening.maxlong = _shortening.maxother = MOST_SHOWN


def shortened(value: Any) -> str:
    """A value for a message, however large or nested it is."""
    try:
        return _shortening.repr(value)
    except ValueError:  # Python writes no decimals of a huge integer.
        return "an integer too large to show"


def _layer_range(key: str) -> range:
    match = _LAYERS.fullmatch(key)
    layers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not layers:
        raise ValueError(_LAYERS_ALLOWED)
    return layers


def _layer_key(key: Any) -> str:
    _layer_range(str(key))
    return str(key)


def _neither_is_narrower(a: range, b: range) -> bool:
    """Whether two ranges share layers and neither lies inside the other; equal ones do not."""
    shared = range(max(a.start, b.start), min(a.stop, b.stop))
    return bool(shared) and (a == b or shared not in (a, b))


class LayerOverride(BaseModel):
    """What may differ in a layer."""

    model_config = ConfigDict(extra="forbid")

    epsilon: Epsilon | None = None
    delta: Delta | None = None


class Settings(BaseModel):
    """Settings of the backend; names are those of the paper.

    Attributes
    ----------
    epsilon, delta : float
        The relative error exceeds ``epsilon`` with probability at most ``delta``, per head and step.
    sampler : {"proportional", "uniform"}
        Poisson sampling by estimated weight (ours), or the paper's top-k and uniform sample.
    target : {"output", "denominator", "numerator", "sdpa"}
        What the bound is about: the output, one of its two sums, or both (Lemma 4.2 of the paper).
    bound : {"f8", "student", "clt", "bernstein"} or None
        Quantile of the bound; None takes `vattn_kernels.quantiles.default_bound`. ``f8`` serves target ``output``
        only, and with sampler ``uniform`` it fails more often than ``delta`` (``docs/proof.md``); ``bernstein``
        holds at every sample size and reads more; selectors ``sign`` and ``hash`` cannot support it.
    sink, window : int
        Tokens at the start and at the end that are always read.
    top_k : int or float
        Count, or share of the range; sampler ``uniform`` only.
    pilot, pilot_min : float, int
        First sample, as a share of the range, and its least size in tokens.
    cap : float
        Largest share of the range that a sample may read; a budget it cuts is not certified, and on a CPU selectors
        `quest`, `sign` and `hash` serve it shrunk (`vattn_kernels.reference.estimate.shrunk`), `quest` and `hash` after
        reading the best scores first (`vattn_kernels.reference.proportional.ranked`). A GPU does neither, and keeps to
        the share by the scores of the request's last step.
    dense_below : int
        Contexts shorter than this are served densely.
    hash_weights : str or None
        File of HashAttention's learned weights; selector ``hash`` needs it.
    selector : {"sketch", "oracle", "quest", "sign", "hash"}
        Source of estimated weights.
    sketch_bits : {32, 64, 128}
        Size of a token's code per KV head; selectors ``sketch`` and ``sign``.
    group_score : {"max", "mean"}
        How the query heads of a KV head share one sample. ``max``: a token's chance is the largest that any head gives
        it, each head with a scale of its own where the bound allows that; ``mean``: one score and one scale.
    floor : float
        Least score, as a share of the mean score; keeps every inclusion probability above 0. `FLOORS` has the
        defaults of selectors that want another.
    seed : int
        Of the sample; equal seeds and inputs give equal outputs.
    audit_rate : float
        Share of (request, layer, KV head, step) whose exact output is computed too and compared; on a GPU with the
        output as it is served, rounded to the model's dtype.
    calibration_tokens : int
        Prefilled tokens after which an uncalibrated server calibrates itself.
    prefill_backend : str or None
        SGLang backend that computes new tokens; None takes our own on a CPU and ``triton`` on a GPU.
    dense_backend : str or None
        SGLang backend that decodes a batch whose contexts are all read whole, on a GPU; None takes ``flashinfer`` where
        it is installed, else ``triton``. A CPU reads them with our own kernel.
    layers : dict
        Overrides of epsilon and delta by layer, ``"3"`` or ``"0-4"``, in any order. Where a range lies inside another,
        the narrower one wins, field by field; ranges that overlap otherwise, or are equal, must not differ in a field.
    """

    model_config = ConfigDict(extra="forbid")

    epsilon: Epsilon = 0.05
    delta: Delta = 0.05
    sampler: Literal["proportional", "uniform"] = "proportional"
    target: Literal["output", "denominator", "numerator", "sdpa"] = "output"
    bound: Literal["f8", "student", "clt", "bernstein"] | None = None
    sink: Count = 4
    window: Annotated[StrictInt, Field(ge=1, le=MOST_TOKENS)] = 16
    top_k: Count | Share = 0.025
    pilot: PositiveShare = 0.02
    pilot_min: Annotated[StrictInt, Field(ge=4, le=MOST_TOKENS)] = 32
    cap: PositiveShare = 1.0
    dense_below: Count = 2048
    hash_weights: Name | None = None
    selector: Literal["sketch", "oracle", "quest", "sign", "hash"] = "sketch"
    sketch_bits: Literal[32, 64, 128] = 64
    group_score: Literal["max", "mean"] = "max"
    floor: PositiveShare = 0.01
    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] = 0
    audit_rate: Share = 0.0
    calibration_tokens: Annotated[StrictInt, Field(ge=512, le=MOST_TOKENS)] = 2048
    prefill_backend: Name | None = None
    dense_backend: Name | None = None
    layers: dict[Annotated[str, BeforeValidator(_layer_key)], LayerOverride] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _floor_of_the_selector(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "floor" not in values and str(values.get("selector")) in FLOORS:
            return {**values, "floor": FLOORS[str(values["selector"])]}
        return values

    @classmethod
    def default_floor(cls, selector: str) -> float:
        """Floor of a selector unless the settings name one."""
        return FLOORS.get(selector, float(cls.model_fields["floor"].default))

    @field_validator("bound")
    @classmethod
    def _bound_suits_target(cls, value: str | None, info: ValidationInfo) -> str | None:
        target = info.data.get("target")
        if value is not None and target is not None and value not in BOUNDS_OF_TARGET[target]:
            allowed = ", ".join(repr(b) for b in BOUNDS_OF_TARGET[target])
            raise ValueError(f"{allowed} or null with target {target!r}: its error may have a single dimension")
        return value

    @field_validator("selector")
    @classmethod
    def _hash_needs_weights(cls, value: str, info: ValidationInfo) -> str:
        if value == "hash" and info.data.get("hash_weights", "wrong already") is None:
            raise ValueError("beside 'hash' the setting hash_weights, a file of the model's weights")
        return value

    @field_validator("selector")
    @classmethod
    def _bernstein_needs_upper_bounds(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("bound") == "bernstein" and value not in PROVABLE_SELECTORS:
            allowed = ", ".join(repr(s) for s in PROVABLE_SELECTORS)
            raise ValueError(f"{allowed} with bound 'bernstein': {value!r} proves no upper bound of a logit")
        return value

    @field_validator("layers")
    @classmethod
    def _no_layer_has_two_values(cls, value: dict[str, LayerOverride]) -> dict[str, LayerOverride]:
        entries = [(key, _layer_range(key), override.model_dump(exclude_none=True)) for key, override in value.items()]
        errors: list[InitErrorDetails] = []
        for (first, layers, wanted), (key, others, found) in combinations(entries, 2):
            if not _neither_is_narrower(layers, others):
                continue
            for field in wanted:
                if wanted[field] != found.get(field, wanted[field]):
                    same = f"{wanted[field]} as in {first!r}, which overlaps"
                    allowed = f"{same}, or one of the two ranges narrower and inside the other"
                    kind = PydanticCustomError("value_error", "{allowed}", {"allowed": allowed})
                    errors.append({"type": kind, "loc": (key, field), "input": found[field]})
        if errors:
            raise ValidationError.from_exception_data("layers", errors)
        return value

    @property
    def effective_bound(self) -> str:
        """The bound in force."""
        return self.bound or default_bound(self.sampler, self.target)

    @property
    def top_k_arguments(self) -> dict[str, Any]:
        """``top_k`` as the op takes it: a count, or -1 and a share of the range."""
        is_count = isinstance(self.top_k, int)
        return {"top_k_count": self.top_k if is_count else -1, "top_k_share": 0.0 if is_count else self.top_k}

    def layer_ranges(self) -> dict[str, range]:
        """Layer numbers that each key of ``layers`` names."""
        return {key: _layer_range(key) for key in self.layers}

    def layer_overrides(self) -> dict[int, dict[str, float]]:
        """Overrides by layer number; a field of a narrower range wins over a wider one's."""
        merged: dict[int, dict[str, float]] = {}
        for key, layers in sorted(self.layer_ranges().items(), key=lambda item: -len(item[1])):
            for layer in layers:
                merged[layer] = merged.get(layer, {}) | self.layers[key].model_dump(exclude_none=True)
        return merged


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with the settings.

    Attributes
    ----------
    key : str
        Dotted name of the setting.
    value : Any
        What was found.
    allowed : str
        What is allowed.
    line : int or None
        Line of the file, from 1; None for an environment variable or the file as a whole.
    """

    key: str
    value: Any
    allowed: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        key = self.key if len(self.key) <= MOST_SHOWN else shortened(self.key)
        return f"{where}{key}: got {shortened(self.value)}; expected {self.allowed}"


class ConfigError(ValueError):
    """The settings are wrong; `mistakes` lists everything at once."""

    def __init__(self, source: str, mistakes: list[Mistake]) -> None:
        self.source = source
        self.mistakes = mistakes
        lines = "\n".join(f"  {mistake}" for mistake in mistakes)
        super().__init__(f"{len(mistakes)} mistake(s) in {source}:\n{lines}")


def _shown(value: Any) -> Any:
    """The value as JSON in UTF-8 carries it: NaN as text, and what is large, deep or no Unicode shortened to text."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
        if len(text.encode()) <= MOST_SHOWN:
            return json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        pass
    return shortened(value)


class PatchError(ValueError):
    """A runtime change is wrong; nothing was changed."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        self.mistakes = mistakes
        super().__init__("; ".join(str(mistake) for mistake in mistakes))

    def detail(self) -> list[dict[str, Any]]:
        """One ``{"field", "value", "allowed"}`` a mistake, for the answer 422."""
        return [{"field": _shown(m.key), "value": _shown(m.value), "allowed": m.allowed} for m in self.mistakes]


ALLOWED = {
    "epsilon": "a number above 0 and at most 1",
    "delta": f"a number from {LEAST_DELTA} to below 0.5",
    "sampler": "'proportional' or 'uniform'",
    "target": ", ".join(repr(t) for t in BOUNDS_OF_TARGET),
    "bound": ", ".join(repr(b) for b in BOUNDS) + " or null",
    "sink": f"a whole number of tokens from 0 to {MOST_TOKENS}",
    "window": f"a whole number of tokens from 1 to {MOST_TOKENS}",
    "top_k": f"a whole number of tokens up to {MOST_TOKENS}, or a share from 0.0 to 1.0",
    "pilot": "a share above 0 and at most 1 (a pilot of 0 would be top-k alone, without a bound)",
    "pilot_min": f"a whole number of tokens from 4 to {MOST_TOKENS}",
    "cap": "a share above 0 and at most 1",
    "dense_below": f"a whole number of tokens from 0 to {MOST_TOKENS}",
    "selector": "'sketch', 'oracle', 'quest', 'sign' or 'hash'",
    "sketch_bits": "32, 64 or 128",
    "hash_weights": "the path of a file of HashAttention weights, or null",
    "group_score": "'max' or 'mean'",
    "floor": "a share above 0 and at most 1",
    "seed": "a whole number from 0 to 4294967295",
    "audit_rate": "a share from 0 to 1",
    "calibration_tokens": f"a whole number of tokens from 512 to {MOST_TOKENS}",
    "prefill_backend": "the name of an SGLang attention backend, or null",
    "dense_backend": "the name of an SGLang attention backend, or null",
    "layers": f"a mapping from {_LAYERS_ALLOWED}, to epsilon and delta",
}
ALLOWED_OF_A_LAYER = f"a mapping of {', '.join(LayerOverride.model_fields)} or both, such as {{epsilon: 0.1}}"


def _unknown(name: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"one of {', '.join(choices)}{hint}"


def _mistakes(error: ValidationError) -> list[Mistake]:
    found: dict[str, Mistake] = {}
    for item in error.errors():
        # Of a key that is no text Pydantic tells no place.
        path = [str(part) for part in item["loc"] if part != "[key]"] or ["file"]
        if path[0] == "top_k":
            path = path[:1]
        key = ".".join(path)
        leaf = path[-1]
        if item["type"] == "extra_forbidden":
            choices = list(LayerOverride.model_fields if len(path) > 1 else Settings.model_fields)
            allowed = _unknown(leaf, choices)
        elif item["type"] == "value_error":
            allowed = item["msg"].removeprefix("Value error, ")
        else:
            allowed = ALLOWED.get(leaf, ALLOWED_OF_A_LAYER if len(path) > 1 else item["msg"])
        found.setdefault(key, Mistake(key, item["input"], allowed))
    return list(found.values())


# Numbers of YAML 1.2 and JSON alone: 1.1 takes 010 for 8, 1:30 for 90, and 1e-3, which JSON and Helm write, for text.
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9]*)",
    "tag:yaml.org,2002:float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    """YAML as settings mean it.

    Keys are text as it stands, such as ``3``, ``03`` and ``true``. A scalar that Python cannot make, such as
    2020-13-45, stays text and is told as a wrong value.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        is_key = isinstance(parent, yaml.MappingNode) and index is None
        if is_key and isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:merge":
            return yaml.ScalarNode("tag:yaml.org,2002:str", node.value, node.start_mark, node.end_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, ArithmeticError):
            if not isinstance(node, yaml.ScalarNode):
                raise
            self.recursive_objects.pop(node, None)
            self.constructed_objects[node] = node.value
            return node.value


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))


def _parse(text: str) -> tuple[Any, yaml.Node | None]:
    """Values and nodes of a YAML text; raises `yaml.YAMLError` alone."""
    try:
        return yaml.load(text, _Loader), yaml.compose(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


def _lines(node: yaml.Node | None, prefix: str = "", depth: int = 3) -> tuple[dict[str, int], list[Mistake]]:
    """Line of every key of a mapping node, and keys that stand twice, down to the deepest setting."""
    lines: dict[str, int] = {}
    twice: list[Mistake] = []
    if not isinstance(node, yaml.MappingNode) or depth == 0:
        return lines, twice
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in lines:
            twice.append(Mistake(key, "a second entry", f"one entry; the first is on line {lines[key]}", line))
        lines[key] = line
        below, below_twice = _lines(value_node, f"{key}.", depth - 1)
        lines |= below
        twice += below_twice
    return lines, twice


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int], list[Mistake]]:
    """Values, lines and structural mistakes of a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return {}, {}, [Mistake("file", str(path), f"a readable UTF-8 text file ({error})")]
    try:
        values, node = _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        return {}, {}, [Mistake("file", error.problem, "valid YAML", mark.line + 1 if mark else 1)]
    except yaml.YAMLError as error:
        return {}, {}, [Mistake("file", str(error), "valid YAML", 1)]
    if values is None:
        return {}, {}, []
    if not isinstance(values, dict):
        return {}, {}, [Mistake("file", type(values).__name__, "a mapping of settings", 1)]
    lines, twice = _lines(node)
    return values, lines, twice


def _at_line(mistake: Mistake, lines: dict[str, int]) -> Mistake:
    return replace(mistake, line=lines.get(mistake.key, lines.get(mistake.key.split(".")[0])))


def check_file(path: str | Path) -> list[Mistake]:
    """Everything wrong with a settings file taken alone, in the order of its lines.

    Parameters
    ----------
    path : str or pathlib.Path
        YAML file.

    Returns
    -------
    list of Mistake
        Empty when the file is right.
    """
    values, lines, mistakes = _read(Path(path))
    try:
        Settings.model_validate(values)
    except ValidationError as error:
        mistakes += [_at_line(mistake, lines) for mistake in _mistakes(error)]
    return sorted(mistakes, key=lambda m: m.line or 0)


def load_settings(path: str | Path | None = None, env: Mapping[str, str] | None = None) -> Settings:
    """Settings in force for a process.

    Parameters
    ----------
    path : str or pathlib.Path, optional
        YAML file; default ``VATTN_CONFIG``, or none.
    env : mapping, optional
        Environment; default `os.environ`.

    Returns
    -------
    Settings

    Raises
    ------
    ConfigError
        With every mistake of the file and of the environment. A value of the file that a variable overrides is not
        looked at, but a key that stands twice in the file is told all the same, below such a setting too.
    """
    return load_with_sources(path, env)[0]


def load_with_sources(
    path: str | Path | None = None, env: Mapping[str, str] | None = None
) -> tuple[Settings, dict[str, str]]:
    """As `load_settings`, with where each value came from: ``default``, a file's name or a variable's."""
    env = os.environ if env is None else env
    path = path or env.get("VATTN_CONFIG") or None
    values, lines, mistakes = _read(Path(path)) if path is not None else ({}, {}, [])
    sources = dict.fromkeys(Settings.model_fields, "default") | dict.fromkeys(values, str(path))
    overridden = False
    for name in sorted(env):
        if not name.startswith(PREFIX) or name in NOT_SETTINGS:
            continue
        overridden = True
        field = name.removeprefix(PREFIX).lower()
        if field not in Settings.model_fields:
            known = [PREFIX + f.upper() for f in Settings.model_fields] + list(NOT_SETTINGS)
            mistakes.append(Mistake(name, env[name], _unknown(name, known)))
            continue
        try:
            values[field], node = _parse(env[name])
            mistakes += [replace(twice, allowed="one entry", line=None) for twice in _lines(node, f"{name}.")[1]]
        except yaml.YAMLError:
            values[field] = env[name]
        sources[field] = name
    settings = Settings()
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for mistake in _mistakes(error):
            # A key of the file may hold dots itself.
            whole = mistake.key in sources
            field, _, below = (mistake.key, "", "") if whole else mistake.key.partition(".")
            source = sources.get(field, str(path))
            if source == str(path):
                mistakes.append(_at_line(mistake, lines))
            else:
                # An empty variable is null in YAML.
                value = env[source] if mistake.value is None else mistake.value
                mistakes.append(Mistake(f"{source}.{below}".rstrip("."), value, mistake.allowed))
    if mistakes:
        places = [str(path)] * (path is not None) + ["the environment"] * overridden
        raise ConfigError(" and ".join(places), sorted(mistakes, key=lambda m: m.line or 0))
    return settings, sources


def validate_patch(patch: Any) -> dict[str, float]:
    """Check a runtime change.

    Parameters
    ----------
    patch : Any
        Parsed body; must be a mapping of `RUNTIME_FIELDS`.

    Returns
    -------
    dict
        The values as floats.

    Raises
    ------
    PatchError
        With every field that is unknown, not changeable at runtime or out of range.
    """
    if not isinstance(patch, Mapping) or not patch:
        raise PatchError([Mistake("body", patch, f"a JSON object with one or more of {', '.join(RUNTIME_FIELDS)}")])
    mistakes = []
    for field, value in patch.items():
        if field not in RUNTIME_FIELDS:
            reason = "it needs a restart; " if field in Settings.model_fields else ""
            mistakes.append(
                Mistake(str(field), value, f"{reason}changeable at runtime are {', '.join(RUNTIME_FIELDS)}")
            )
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            mistakes.append(Mistake(field, value, ALLOWED[field]))
    clean = {k: v for k, v in patch.items() if k in RUNTIME_FIELDS}
    try:
        LayerOverride.model_validate(clean)
    except ValidationError as error:
        known = {m.key for m in mistakes}
        mistakes += [m for m in _mistakes(error) if m.key not in known]
    if mistakes:
        raise PatchError(mistakes)
    return {k: float(v) for k, v in clean.items()}
