from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

from vattn_telemetry.metrics import METRICS

FOLDER = Path(__file__).resolve().parents[2] / "telemetry" / "vattn_telemetry" / "dashboards"
DASHBOARDS = sorted(FOLDER.glob("*.json"))
KNOWN = {name for metric in METRICS for name in metric.series_names}
LABELS = {"job", "instance", "model_name", "le", "tp_rank"} | {label for m in METRICS for label in m.labels}


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def expressions(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


@pytest.fixture(params=DASHBOARDS, ids=lambda path: path.stem)
def dashboard(request):
    return load(request.param)


def test_there_is_a_dashboard():
    assert DASHBOARDS


def test_metrics_exist(dashboard):
    used = set(re.findall(r"\bvattention_[a-z0-9_]+", json.dumps(dashboard)))
    assert used
    assert used <= KNOWN


def test_labels_exist(dashboard):
    for title, expression in expressions(dashboard):
        selectors = re.findall(r"\{([^}]*)\}", expression)
        used = {label for selector in selectors for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)}
        assert used <= LABELS, title


def test_expressions_parse(dashboard, promtool, tmp_path):
    rules = [
        {"record": f"panel:{index}", "expr": expression.replace("$__rate_interval", "5m")}
        for index, (_, expression) in enumerate(expressions(dashboard))
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", path)


def test_panels_do_not_overlap_and_fit_the_grid(dashboard):
    cells = set()
    for panel in dashboard["panels"]:
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24, panel["title"]
        columns = range(position["x"], position["x"] + position["w"])
        own = set(itertools.product(columns, range(position["y"], position["y"] + position["h"])))
        assert not cells & own, panel["title"]
        cells |= own
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_every_query_obeys_the_variables(dashboard):
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert names == {"datasource", "job", "model", "instance"}
    for title, expression in expressions(dashboard):
        metrics = re.findall(r"\b(?:vattention_|sglang:)\w+", expression)
        assert expression.count('job=~"$job", instance=~"$instance", model_name=~"$model"') == len(metrics), title
