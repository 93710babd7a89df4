from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from sglang.srt.environ import third_party_cache_defaults

from vattn_sgl.config import Settings, check_file, load_settings

CI_VALUES = sorted((Path(__file__).resolve().parents[2] / "helm" / "vattn-sgl" / "ci").glob("*-values.yaml"))
KUBERNETES_VERSIONS = ("1.25", "1.37")


def one(manifests, kind):
    (manifest,) = [m for m in manifests if m["kind"] == kind]
    return manifest


def pod(manifests):
    return one(manifests, "Deployment")["spec"]["template"]["spec"]


def container(manifests):
    (server,) = pod(manifests)["containers"]
    return server


def environment(manifests):
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(manifests)["env"]}


@pytest.fixture(params=CI_VALUES, ids=lambda path: path.stem)
def values_file(request):
    return request.param


def test_lint_is_clean(helm, chart, values_file):
    done = helm("lint", "--strict", chart, "-f", values_file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_manifests_are_valid(render, values_file, version):
    manifests = render("-f", values_file, "--kube-version", version)
    assert {"Deployment", "Service", "ConfigMap"} <= {m["kind"] for m in manifests}
    for manifest in manifests:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", manifest["metadata"]["name"])
        if not manifest["apiVersion"].startswith("monitoring.coreos.com/"):
            kubernetes_validate.validate(manifest, version, strict=True)


def test_volumes_and_mounts_match(render, values_file):
    manifests = render("-f", values_file)
    volumes = {volume["name"] for volume in pod(manifests)["volumes"]}
    assert {mount["name"] for mount in container(manifests)["volumeMounts"]} == volumes


def test_selectors_match_the_pods(render, values_file):
    manifests = render("-f", values_file)
    deployment = one(manifests, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    service = one(manifests, "Service")
    assert service["spec"]["selector"].items() <= labels
    names = [port["name"] for port in container(manifests)["ports"]]
    assert [port["targetPort"] for port in service["spec"]["ports"]] == names == ["http"]


def test_settings_reach_the_file_that_vattn_config_names(render):
    manifests = render("--set-json", "settings.epsilon=0.1", "--set", "settings.selector=oracle")
    folder = next(m["mountPath"] for m in container(manifests)["volumeMounts"] if m["name"] == "settings")
    ((name, text),) = one(manifests, "ConfigMap")["data"].items()
    assert environment(manifests)["VATTN_CONFIG"] == f"{folder}/{name}"
    assert yaml.safe_load(text) == {"epsilon": 0.1, "delta": 0.05, "selector": "oracle"}


def test_layers_mean_in_the_values_what_they_mean_on_the_server(render, tmp_path):
    values = tmp_path / "values.yaml"
    layers = {"4": {"epsilon": 0.2}, "0-9": {"epsilon": 0.3, "delta": 0.1}, "20": {"epsilon": 1e-6}}
    values.write_text(yaml.safe_dump({"settings": {"layers": layers}}, sort_keys=False), encoding="utf-8")
    path = tmp_path / "settings.yaml"
    path.write_text(one(render("-f", values), "ConfigMap")["data"]["settings.yaml"], encoding="utf-8")
    found = load_settings(path, {})
    assert list(found.layers) != list(layers), "Helm sorts the keys, so their order must not matter"
    assert found.layer_overrides() == Settings(layers=layers).layer_overrides()
    assert found.layer_overrides()[4] == {"epsilon": 0.2, "delta": 0.1}


def test_variables_are_known_to_the_settings(render):
    manifests = render("--set", "admin.key=k,otel.endpoint=http://c:4318")
    env = {name: value for name, value in environment(manifests).items() if isinstance(value, str)}
    assert pod(manifests)["enableServiceLinks"] is False
    load_settings(env={**env, "VATTN_CONFIG": ""})
    assert not [name for name in environment(manifests) if name.startswith("VATTN_") and name not in env]


def test_schema_names_the_same_settings_as_the_server(chart):
    schema = json.loads((chart / "values.schema.json").read_text(encoding="utf-8"))
    assert set(schema["properties"]["settings"]["properties"]) == set(Settings.model_fields)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("epsilon", v) for v in (0, 1e-6, 0.05, 1, 1.5, 2)],
        *[("delta", v) for v in (0, 9e-10, 1e-9, 0.01, 0.49, 0.5)],
        *[("sampler", v) for v in ("uniform", "random")],
        *[("target", v) for v in ("denominator", "none")],
        *[("bound", v) for v in (None, "f8", "f9")],
        *[("sink", v) for v in (0, -1, 1.5, 2**31)],
        *[("window", v) for v in (0, 1)],
        *[("top_k", v) for v in (0, 64, 0.02, 1.5, -1)],
        *[("pilot", v) for v in (0, 0.02, 2)],
        *[("pilot_min", v) for v in (3, 4)],
        *[("cap", v) for v in (0, 0.5, 1.1)],
        *[("selector", v) for v in ("oracle", "quest", "pqcache")],
        *[("sketch_bits", v) for v in (32, 64, 96)],
        *[("group_score", v) for v in ("mean", "sum")],
        *[(field, v) for field in ("hash_weights", "prefill_backend", "dense_backend") for v in ("a", None, "", 3)],
        *[("seed", v) for v in (-1, 2**32 - 1, 2**32)],
        *[("audit_rate", v) for v in (0, 1, 1.1)],
        *[("calibration_tokens", v) for v in (511, 512, 2**31 - 1, 2**31)],
        *[
            ("layers", v)
            for v in (
                {"3": {"epsilon": 0.1}},
                {"9999": {}},
                {"10000": {}},
                {"0-4": {"delta": 0.7}},
                {"x": {}},
                {"3": {"sink": 1}},
            )
        ],
    ],
)
def test_schema_and_server_agree(helm, chart, setting, value, tmp_path):
    done = helm("template", "test", chart, "--set-json", f"settings={json.dumps({setting: value})}")
    text = yaml.safe_dump({setting: value})
    if done.returncode == 0:
        text = one([m for m in yaml.safe_load_all(done.stdout) if m], "ConfigMap")["data"]["settings.yaml"]
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    mistakes = check_file(path)
    assert bool(mistakes) == (done.returncode != 0), done.stderr or mistakes


@pytest.mark.parametrize(
    "key",
    [
        *("probes", "probes.startup", "probes.readiness", "probes.liveness", "probes.startup.path"),
        *("cache", "cache.persistence", "cache.persistence.size", "sharedMemory", "sharedMemory.sizeLimit"),
        *("metrics", "metrics.serviceMonitor", "metrics.serviceMonitor.interval", "otel", "admin"),
        *("admin.existingSecretKey", "updateStrategy", "serviceAccount", "service", "service.port", "server.port"),
        *("image", "image.pullPolicy", "model", "settings", "replicaCount", "terminationGracePeriodSeconds"),
    ],
)
def test_what_the_templates_need_cannot_be_taken_away(helm, chart, key):
    done = helm("template", "test", chart, "--set", f"{key}=null")
    assert done.returncode != 0
    assert f"{key.rpartition('.')[2]} is required" in done.stderr or "missing propert" in done.stderr


@pytest.mark.parametrize("key", ["resources", "podLabels", "extraEnv", "affinity", "otel.endpoint", "settings.epsilon"])
def test_the_rest_can(render, key):
    assert render("--set", f"{key}=null")


def test_changed_settings_replace_the_pods(render):
    def checksum(*arguments):
        template = one(render(*arguments), "Deployment")["spec"]["template"]
        return template["metadata"]["annotations"]["checksum/settings"]

    assert checksum() == checksum()
    assert checksum() != checksum("--set-json", "settings.epsilon=0.1")


def test_server_command(render):
    server = container(render("--set", "model.path=/m", "--set", "server.port=8000", "--set", "model.servedName=n"))
    text = " ".join(server["args"])
    assert text.startswith("sglang serve --model-path /m --served-model-name n --host 0.0.0.0 --port 8000")
    assert "--attention-backend vattention" in text
    assert "--enable-metrics" in text
    assert server["ports"][0]["containerPort"] == 8000


def test_flags_exist_in_the_installed_sglang(render):
    # The source is searched rather than imported: sglang without a GPU imports only with the plugin's help.
    sglang = Path(importlib.util.find_spec("sglang").origin).parent / "srt"
    paths = [sglang / "server_args.py", *sglang.glob("arg_groups/**/*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    args = container(render("--set", "admin.key=k,model.servedName=n"))["args"]
    flags = [a.partition("=")[0] for a in args if a.startswith("--")]
    assert flags
    for flag in flags:
        assert re.search(rf"\b{flag.removeprefix('--').replace('-', '_')}: ", source), flag


def test_start_removes_metrics_of_the_container_before(render, tmp_path):
    (tmp_path / "counter_7.db").write_text("old")
    command = container(render())["command"]
    done = subprocess.run(
        [*command, "echo", "a b", "c"],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "a b c\n"
    assert not list(tmp_path.iterdir())


def test_without_a_key_there_is_no_secret_and_no_flag(render):
    manifests = render()
    assert "Secret" not in {m["kind"] for m in manifests}
    assert not [a for a in container(manifests)["args"] if a.startswith("--admin-api-key")]


def test_key_from_values_becomes_a_secret(render):
    manifests = render("--set", "admin.key=k3y")
    secret = one(manifests, "Secret")
    reference = environment(manifests)["ADMIN_API_KEY"]["secretKeyRef"]
    assert reference["name"] == secret["metadata"]["name"]
    assert base64.b64decode(secret["data"][reference["key"]]) == b"k3y"
    assert "--admin-api-key=$(ADMIN_API_KEY)" in container(manifests)["args"]
    others = [m for m in manifests if m["kind"] != "Secret"]
    assert "k3y" not in json.dumps(others)


def test_existing_secret_is_used_and_none_is_made(render):
    manifests = render("--set", "admin.existingSecret=mine,admin.existingSecretKey=k,admin.key=ignored")
    assert "Secret" not in {m["kind"] for m in manifests}
    assert environment(manifests)["ADMIN_API_KEY"]["secretKeyRef"] == {"name": "mine", "key": "k"}


def test_probes(render):
    server = container(render())
    assert server["startupProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert server["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    assert server["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    for probe in ("startupProbe", "livenessProbe"):
        assert server[probe]["timeoutSeconds"] > 20, "SGLang's /health itself waits up to 20 s"


def test_stopping_pod_has_time_to_drain(render):
    manifests = render()
    sleep = int(container(manifests)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod(manifests)["terminationGracePeriodSeconds"] > sleep + 60


def test_multiprocess_metrics_have_an_empty_dir(render):
    manifests = render()
    path = environment(manifests)["PROMETHEUS_MULTIPROC_DIR"]
    name = next(m["name"] for m in container(manifests)["volumeMounts"] if m["mountPath"] == path)
    assert "emptyDir" in next(v for v in pod(manifests)["volumes"] if v["name"] == name)


@pytest.mark.parametrize(
    ("arguments", "claim", "makes_one"),
    [
        ((), None, False),
        (("--set", "cache.persistence.enabled=true"), "test-vattn-sgl-cache", True),
        (("--set", "cache.persistence.existingClaim=mine"), "mine", False),
    ],
    ids=["empty-dir", "new-claim", "existing-claim"],
)
def test_cache(render, arguments, claim, makes_one):
    manifests = render(*arguments)
    volume = next(v for v in pod(manifests)["volumes"] if v["name"] == "cache")
    assert volume.get("persistentVolumeClaim", {}).get("claimName") == claim
    assert ("PersistentVolumeClaim" in {m["kind"] for m in manifests}) == makes_one


def test_what_is_fetched_learnt_and_compiled_lies_in_the_cache(render, monkeypatch):
    manifests = render()
    mount = next(m["mountPath"] for m in container(manifests)["volumeMounts"] if m["name"] == "cache")
    given = environment(manifests)
    for name in ("VATTN_CACHE", "HF_HOME", "XDG_CACHE_HOME", "SGLANG_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert Path(given[name]).is_relative_to(mount), name
    monkeypatch.setenv("SGLANG_CACHE_DIR", given["SGLANG_CACHE_DIR"])
    assert third_party_cache_defaults()["TRITON_CACHE_DIR"] == given["TRITON_CACHE_DIR"]


def test_service_monitor_is_off_by_default_and_scrapes_metrics(render):
    assert "ServiceMonitor" not in {m["kind"] for m in render()}
    manifests = render("--set", "metrics.serviceMonitor.enabled=true,metrics.serviceMonitor.labels.release=p")
    monitor = one(manifests, "ServiceMonitor")
    service = one(manifests, "Service")
    assert monitor["metadata"]["labels"]["release"] == "p"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["path"] == "/metrics"


def test_recreate_carries_no_rolling_update(render):
    strategy = one(render("--set", "updateStrategy.type=Recreate"), "Deployment")["spec"]["strategy"]
    assert strategy == {"type": "Recreate"}


def test_long_release_names_stay_valid(render):
    manifests = render("--set", "admin.key=k,cache.persistence.enabled=true", release="r" * 53)
    names = [m["metadata"]["name"] for m in manifests]
    assert all(len(name) <= 63 for name in names)
    assert len({(m["kind"], m["metadata"]["name"]) for m in manifests}) == len(names)


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("settings.epsilon=2", "epsilon"),
        ("settings.epsilon=0", "epsilon"),
        ("settings.delta=1", "delta"),
        ("settings.sampler=random", "sampler"),
        ("settings.top_k=-1", "top_k"),
        ("settings.epsilom=0.1", "epsilom"),
        ("image.repository=", "repository"),
        ("server.port=70000", "port"),
        ("sharedMemory.sizeLimit=lots", "sizeLimit"),
        ("otel.endpoint=collector", "endpoint"),
        ("unknown=1", "unknown"),
    ],
)
def test_schema_rejects(helm, chart, setting, field):
    done = helm("template", "test", chart, "--set", setting)
    assert done.returncode != 0
    assert field in done.stderr


def test_schema_knows_every_value(chart):
    """Each object of values.yaml is closed in the schema, so that a misspelt value is refused."""
    schema = json.loads((chart / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    assert schema["additionalProperties"] is False
    assert set(values) <= set(schema["properties"])


def test_notes_render(helm, chart, values_file, tmp_path):
    """`helm template` leaves the notes out, so a copy of the chart carries them in a ConfigMap."""
    copy = shutil.copytree(chart, tmp_path / "chart")
    notes = copy / "templates" / "NOTES.txt"
    text = notes.read_text(encoding="utf-8")
    (copy / "templates" / "_notes.tpl").write_text(f'{{{{- define "notes" }}}}{text}{{{{ end }}}}', encoding="utf-8")
    (copy / "templates" / "notes.yaml").write_text('notes: {{ include "notes" . | toJson }}\n', encoding="utf-8")
    notes.unlink()
    done = helm("template", "test", copy, "-f", values_file, "--show-only", "templates/notes.yaml")
    assert done.returncode == 0, done.stderr
    rendered = yaml.safe_load(done.stdout)["notes"]
    assert "rollout status deployment/" in rendered
    assert ("PATCH" in rendered) == bool((yaml.safe_load(values_file.read_text(encoding="utf-8")) or {}).get("admin"))
