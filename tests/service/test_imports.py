"""The service is small: a fresh interpreter that has it has no torch."""

import subprocess
import sys

from tests.stack import ROOT


def test_the_service_does_not_import_torch():
    code = (
        "import service.app, service.__main__, sys; "
        "heavy = {'torch', 'diffusers', 'transformers', 'tensorrt', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_commands_that_only_read_do_not_import_torch():
    code = (
        "import distill.__main__ as command, sys; "
        "command.main(['teach', 'shapes', 'x', '--dry-run']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
