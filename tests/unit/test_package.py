import subprocess
import sys

CODE = """
import time
started = time.perf_counter()
import pipelines
seconds = time.perf_counter() - started
import sys
print(seconds, *(name for name in ("torch", "ray", "transformers", "sklearn") if name in sys.modules))
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_is_cheap():
    seconds, *loaded = run(CODE)
    assert float(seconds) < 0.2
    assert loaded == []


def test_the_core_needs_neither_torch_nor_ray():
    rooms = ["errors", "settings", "windows", "labels", "batching", "evaluation"]
    rooms += ["tables", "summary", "shards", "tokenization", "model_folder"]
    imports = "; ".join(f"import pipelines.{room}" for room in rooms)
    loaded = run(f"{imports}; import sys; print(*(n for n in ('torch', 'ray', 'transformers') if n in sys.modules))")
    assert loaded == []


def test_the_command_line_helps_without_torch_or_ray():
    code = "from pipelines.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    shown = run(f"{code}import sys; print('LOADED', *(n for n in ('torch', 'ray') if n in sys.modules))")
    assert shown[-1] == "LOADED"
    assert "learning_rate=5e-05" in shown
