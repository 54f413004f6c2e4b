from __future__ import annotations

import subprocess
import sys

from hdpo.adapters import torchvision_shim

QWEN = "import transformers.models.qwen3_vl.modeling_qwen3_vl, torchvision, torchaudio\n" \
    "try: import torchcodec\nexcept ImportError: pass\n" \
    "print('imported')"


def run(code: str, *, site_folder: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that hasn't seen the environment's own copy of the shim."""
    forget = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, 'hdpo_torchvision_shim')]\n"
    add = f"import site; site.addsitedir({site_folder!r})\n" if site_folder else ""
    return subprocess.run([sys.executable, "-c", forget + add + code], capture_output=True, text=True)


def test_activation_imports_neither_torch_nor_torchvision():
    done = run("from hdpo.adapters import torchvision_shim as s; s.activate(); s.activate()\n"
               "print('torch' in sys.modules, 'torchvision' in sys.modules,"
               " sum(hasattr(f, 'hdpo_torchvision_shim') for f in sys.meta_path))")
    assert done.stdout.split() == ["False", "False", "1"], done.stderr


def test_installed_copy_works_at_interpreter_start_without_hdpo_and_can_be_removed(tmp_path):
    torchvision_shim.install(str(tmp_path))
    done = run(QWEN + "\nprint('hdpo' in sys.modules)", site_folder=str(tmp_path))
    assert done.stdout.split() == ["imported", "False"], done.stderr
    assert len(torchvision_shim.remove(str(tmp_path))) == 2
    assert list(tmp_path.iterdir()) == [] and torchvision_shim.remove(str(tmp_path)) == []


def test_hook_does_nothing_where_the_extension_loads(tmp_path):
    """A stand-in torchvision whose extension reports its operators as loaded: nothing may be declared."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from . import extension, _meta_registrations\n")
    (package / "extension.py").write_text("def _has_ops():\n    return True\n")
    (package / "_meta_registrations.py").write_text("")
    done = run(f"sys.path.insert(0, {str(tmp_path)!r})\n"
               "from hdpo.adapters import torchvision_shim as s; s.activate()\n"
               "import torch, torchvision; print(hasattr(torch.ops.torchvision, 'nms'))")
    assert done.stdout.strip() == "False", done.stderr
