from __future__ import annotations

from pathlib import Path

from vattn_telemetry.docs import main, render

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == render(), (
        "run `python -m vattn_telemetry.docs` and commit docs/metrics.md"
    )


def test_main_writes_the_page(tmp_path):
    main([str(tmp_path / "new" / "metrics.md")])
    assert (tmp_path / "new" / "metrics.md").read_text(encoding="utf-8") == render()
