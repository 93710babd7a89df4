"""What the demonstration prints."""

from __future__ import annotations

from vattn_sgl import demo


def test_layers_that_were_read_whole_are_shown(capsys):
    figures = dict.fromkeys(("density", "budget", "estimated_error", "certified"))
    about = {"epsilon_before": 0.05, "epsilon_after": 0.2, "agreement_with_dense": 1.0, "positions_compared": 3}
    about |= {"density": 1.0, "density_after": 1.0, "tokens_per_second": 9.0, "prompt_tokens": 100}
    demo._show(about | {"layers": [{"layer": 0} | figures | {"density": 1.0}]})
    assert "1.000" in capsys.readouterr().err
