"""Counters, metrics and exporters of vattn-sgl; knows neither SGLang nor Triton."""
