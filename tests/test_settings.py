# SPDX-License-Identifier: Apache-2.0
"""Settings, and where a projector is looked for. No vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from httpx import Request, Response

from vllm_kvsplice.codec import projector_source
from vllm_kvsplice.codec.projector import FILE_NAME, Projector, build_metadata, default_layer
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving.settings import parse_settings, read_settings


class Config:
    """A transformers config, as far as the fingerprint reads one."""

    model_type, vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim = (
        "tiny", 9, 64, 1, 2, 1, 32)  # fmt: skip


@pytest.fixture
def projector() -> Projector:
    return Projector(build_metadata(Config, "test"), {0: default_layer(32, 1)})


def test_defaults_need_no_entry_and_leave_other_entries_alone() -> None:
    for config in (None, {}, {"gdn": 3}, {"kvsplice": {}}):
        settings = read_settings(config)
        assert settings.projector is None and settings.prefill == "exact"


@pytest.mark.parametrize(
    "given, words",
    [
        pytest.param({"projektor": "x"}, ["'projektor'", "projector, prefill"], id="misspelt"),
        pytest.param({"a": 1, "prefill": "exact", "b": 2}, ["'a', 'b'", "projector, prefill"], id="two-unknown"),
        pytest.param({"prefill": "fast"}, ["prefill", "'fast'", "'exact' or 'latent'"], id="bad-choice"),
        pytest.param({"projector": 7}, ["projector", "'7'", "string"], id="bad-type"),
        pytest.param("file", ["str 'file'", "projector, prefill"], id="not-an-object"),
    ],
)
def test_a_bad_entry_is_named_in_one_sentence(given: object, words: list[str]) -> None:
    with pytest.raises(KVSpliceError) as caught:
        parse_settings(given)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.count(".") == 1 and "\n" not in message


def test_a_setting_names_a_file_or_a_folder(tmp_path: Path, projector: Projector) -> None:
    projector.save(tmp_path / "any-name")
    projector.save(tmp_path / FILE_NAME)
    assert projector_source.locate(str(tmp_path / "any-name"), "model") == tmp_path / "any-name"
    assert projector_source.locate(str(tmp_path), "model") == tmp_path / FILE_NAME


@pytest.mark.parametrize("setting", ["/no/such/file", "./near.safetensors", "a/b/c", "owner/name.safetensors"])
def test_a_setting_that_leads_nowhere_is_refused_when_read(setting: str) -> None:
    projector_source.forget()
    with pytest.raises(KVSpliceError, match="does not exist: make it with `kvsplice calibrate"):
        projector_source.for_engine(setting, "model", None)


def test_a_repo_id_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    asked = []

    def download(repo: str, place: str, revision: str | None = None) -> str:
        asked.append((repo, place, revision))
        if "/" in place:
            raise RemoteEntryNotFoundError("404", response=Response(404, request=Request("GET", "https://hub.example")))
        return str(tmp_path / place)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert projector_source.locate("owner/name", "model") == tmp_path / FILE_NAME
    assert projector_source.locate(None, "owner/model", "v2") == tmp_path / FILE_NAME
    assert asked[1] == ("owner/name", FILE_NAME, None) and asked[3] == ("owner/model", FILE_NAME, "v2")


def test_an_unreachable_repo_is_refused_if_asked_for_and_passed_over_if_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    calls = []

    def download(*args: object, **kwargs: object) -> str:
        calls.append(args)
        raise LocalEntryNotFoundError("offline. ")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(KVSpliceError, match=r"neither a file here nor a Hugging Face repo .*offline\)"):
        projector_source.locate("owner/name", "model")
    assert projector_source.locate(None, "owner/model") is None
    assert len(calls) == 2  # a second file of an unreachable repo is not tried: each costs half a minute of retries


def test_beside_the_weights(tmp_path: Path, projector: Projector) -> None:
    assert projector_source.locate(None, str(tmp_path)) is None
    projector.save(tmp_path / FILE_NAME)
    assert projector_source.locate(None, str(tmp_path)) == tmp_path / FILE_NAME
    (tmp_path / "kvsplice").mkdir()
    projector.save(tmp_path / "kvsplice" / FILE_NAME)
    assert projector_source.locate(None, str(tmp_path)) == tmp_path / "kvsplice" / FILE_NAME
    (tmp_path / "weights.gguf").touch()
    assert projector_source.locate(None, str(tmp_path / "weights.gguf")) == tmp_path / "kvsplice" / FILE_NAME


def test_a_projector_that_vllm_would_read_as_weights_is_refused(tmp_path: Path, projector: Projector) -> None:
    projector_source.check_beside(str(tmp_path))
    projector.save(tmp_path / FILE_NAME)
    with pytest.raises(KVSpliceError, match="as weights of the model.*move it with `mkdir"):
        projector_source.check_beside(str(tmp_path))
    (tmp_path / projector_source.WEIGHT_INDEX).write_text("{}")  # lists the weights: others are left alone
    projector_source.check_beside(str(tmp_path))


def test_a_file_is_read_once_for_all_layers_and_anew_after_forget(tmp_path: Path, projector: Projector) -> None:
    projector_source.forget()
    projector.save(tmp_path / "p")
    first = projector_source.for_engine(str(tmp_path / "p"), "model", None)
    assert projector_source.for_engine(str(tmp_path / "p"), "model", None) is first
    projector_source.forget()
    assert projector_source.for_engine(str(tmp_path / "p"), "model", None) is not first


def test_a_hub_that_will_not_say_is_not_taken_for_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    def download(*args: object, **kwargs: object) -> str:
        raise HfHubHTTPError("503", response=Response(503, request=Request("GET", "https://hub.example")))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(KVSpliceError, match="did not say whether owner/model holds"):
        projector_source.locate(None, "owner/model")


def test_a_repo_that_the_hub_does_not_know_has_no_projector(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def download(*args: object, **kwargs: object) -> str:
        raise RepositoryNotFoundError("401", response=Response(401, request=Request("GET", "https://hub.example")))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert projector_source.locate(None, "owner/model") is None
    with pytest.raises(KVSpliceError, match="RepositoryNotFoundError: 401"):
        projector_source.locate("owner/name", "model")
