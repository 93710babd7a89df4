from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from vattn_telemetry.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "telemetry" / "vattn_telemetry" / "alerts" / "vattention.yaml"
CASES = Path(__file__).with_name("alerts_test.yaml")
KNOWN = {name for metric in METRICS for name in metric.series_names}


def alerts():
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_promtool_accepts_the_rules(promtool):
    promtool("check", "rules", RULES)


def test_promtool_passes_the_cases(promtool):
    promtool("test", "rules", CASES)


def test_metrics_exist():
    used = set(re.findall(r"\bvattention_[a-z0-9_]+", RULES.read_text(encoding="utf-8")))
    assert used
    assert used <= KNOWN


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_alert_has_a_runbook_a_severity_and_a_case(alert):
    page = ROOT / alert["annotations"]["runbook_url"]
    assert alert["alert"] in page.read_text(encoding="utf-8").splitlines()[0]
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert f"alertname: {alert['alert']}\n" in CASES.read_text(encoding="utf-8")


def test_every_runbook_has_an_alert():
    used = {alert["annotations"]["runbook_url"] for alert in alerts()}
    assert used == {f"docs/runbooks/{path.name}" for path in (ROOT / "docs" / "runbooks").glob("*.md")}
