# SPDX-License-Identifier: Apache-2.0
"""The entry point: harmless for those who did not choose kvsplice, picklable and idempotent for those who did."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import vllm_kvsplice
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving import cpu_dispatch, registration

pytest.importorskip("vllm")


@pytest.fixture
def registered() -> type:
    registration.register_with_vllm()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum


@pytest.fixture
def select(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Pretend that an engine with this backend is being built."""
    import vllm.config

    def selected(backend: object, per_kind: dict[str, object] | None = None) -> None:
        attention = SimpleNamespace(backend=backend, backend_per_kind=per_kind)
        config = SimpleNamespace(attention_config=attention)
        monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: config)

    return selected


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, vllm_kvsplice; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'vllm', 'triton', 'transformers', 'pydantic'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_entry_point_is_installed() -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="vllm.general_plugins", name="kvsplice")
    assert entry.load() is vllm_kvsplice.register


def test_register_logs_and_returns_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ImportError("no such name in this vLLM")

    monkeypatch.setattr(registration, "register_with_vllm", fail)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        vllm_kvsplice.register()
    assert "was not registered with vLLM (ImportError: no such name in this vLLM)" in caplog.text


def test_a_second_call_changes_nothing(registered: type) -> None:
    members, paths = list(registered.__members__), dict(cpu_dispatch.stock_paths)
    vllm_kvsplice.register()
    assert list(registered.__members__) == members and cpu_dispatch.stock_paths == paths
    assert not any(path.startswith("vllm_kvsplice") for path in paths.values())


def test_the_member_survives_a_pickle_into_a_process_without_plugins(registered: type, tmp_path: Path) -> None:
    member = registered.__members__["KVSPLICE"]
    assert pickle.loads(pickle.dumps(member)) is member
    (tmp_path / "member").write_bytes(pickle.dumps({"backend": member}))
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'member')!r}, 'rb'))['backend'].get_path())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip().splitlines()[-1] == registration.BACKEND, out.stderr


@pytest.mark.parametrize("spelling", ["kvsplice", "KVSPLICE", "KvSplice"])
def test_any_case_selects_it(registered: type, spelling: str) -> None:
    from vllm.config.attention import AttentionConfig

    assert AttentionConfig(backend=spelling).backend is registered.__members__["KVSPLICE"]


def test_engines_that_did_not_choose_it_get_the_stock_class(registered: type, select) -> None:  # type: ignore[no-untyped-def]
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    for backend in (None, registered.__members__["FLASH_ATTN"]):
        select(backend)
        assert registered.__members__["CPU_ATTN"].get_class() is CPUAttentionBackend
        assert registered.__members__["CPU_MLA"].get_class().get_name() == "CPU_MLA"


def test_engines_that_chose_it_get_ours_and_are_told(registered: type, select, caplog, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from vllm_kvsplice.serving.backend import KVSpliceBackend

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    select(registered.__members__["KVSPLICE"])
    with caplog.at_level(logging.INFO):
        assert registered.__members__["CPU_ATTN"].get_class() is KVSpliceBackend
    assert "kvsplice is active on this CPU" in caplog.text and "does not hold" in caplog.text
    assert KVSpliceBackend.get_name() in registered.__members__  # vLLM looks the member up by it


def test_latent_attention_models_are_refused_on_cpu(registered: type, select) -> None:  # type: ignore[no-untyped-def]
    select(registered.__members__["KVSPLICE"])
    for name in ("CPU_MLA", "AMX_MLA"):
        with pytest.raises(KVSpliceError, match=r"multi-head latent attention \(MLA\)"):
            registered.__members__[name].get_class()


def test_a_choice_by_kind_of_layer_is_refused_on_cpu(registered: type, select) -> None:  # type: ignore[no-untyped-def]
    select(None, {"full_attention": registered.__members__["KVSPLICE"]})
    with pytest.raises(KVSpliceError, match="all layers or none"):
        registered.__members__["CPU_ATTN"].get_class()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.post1", "0.33.9", "0.32.0rc1+cpu", "0.33.0.dev7"])
def test_supported_versions(version: str) -> None:
    assert registration.version_refusal(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0rc1", "1.0", "dev"])
def test_other_versions_are_refused_by_name(version: str) -> None:
    sentence = registration.version_refusal(version)
    assert sentence is not None
    for word in (f"vLLM {version}", f"kvsplice {vllm_kvsplice.__version__}", ">=0.32,<0.34", "pip install"):
        assert word in sentence


def test_under_another_version_choosing_it_answers_with_our_sentence() -> None:
    code = """
import vllm; vllm.__version__ = "0.40.1"
from vllm_kvsplice import register; register(); register
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends.registry import AttentionBackendEnum as E
print(E.CPU_ATTN.get_class().get_name())
config = VllmConfig(); config.attention_config.backend = E["KVSPLICE"]
with set_current_vllm_config(config):
    for name in ("KVSPLICE", "CPU_ATTN"):
        try: E[name].get_class()
        except ValueError as error: print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith(("CPU_ATTN", "kvsplice 0"))]
    assert lines[0] == "CPU_ATTN" and len(lines) == 3, run.stdout + run.stderr
    assert all("this is vLLM 0.40.1" in line for line in lines[1:])
    assert (run.stdout + run.stderr).count("kvsplice cannot be selected") == 1
