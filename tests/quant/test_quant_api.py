"""The public names, the error classes, and that importing them loads little."""

import subprocess
import sys
from types import ModuleType

import quant
from quant import errors


def test_all_lists_exactly_what_the_package_offers():
    public = {
        name
        for name, value in vars(quant).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(quant.__all__) == public
    assert quant.__all__ == sorted(quant.__all__)


def test_all_errors_have_one_root_and_are_public():
    classes = {value for value in vars(errors).values() if isinstance(value, type)}
    assert all(issubclass(error, errors.QuantError) for error in classes)
    assert {error.__name__ for error in classes} <= set(quant.__all__)


def test_importing_the_toolkit_loads_no_pipeline_and_touches_no_device():
    code = (
        "import sys, quant, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "loaded = {'diffusers', 'transformers', 'redis', 'fastapi'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
