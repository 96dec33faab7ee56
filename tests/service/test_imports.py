"""Service and trainer are small: a fresh interpreter that has either has no torch."""

import subprocess
import sys

import pytest

from tests.stack import ROOT


@pytest.mark.parametrize("modules", ["service.app, service.__main__", "worker.trainer"])
def test_service_and_trainer_do_not_import_torch(modules):
    code = (
        f"import {modules}, sys; "
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
