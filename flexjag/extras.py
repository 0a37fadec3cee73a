"""Optional packages: an error that names the extra of ``pip install`` to install where one is missing."""

from __future__ import annotations

import importlib

from flexjag.errors import MissingExtraError


def needs(extra: str, *modules: str) -> None:
    """Check that the modules of an extra can be imported.

    Args:
        extra: The extra's name in ``pip install "flexjag[extra]"``.
        modules: Names of the modules about to be imported.

    Raises:
        MissingExtraError: If one is not installed.

    >>> needs("pictures", "not_there")
    Traceback (most recent call last):
    ...
    flexjag.errors.MissingExtraError: not_there is not installed: pip install 'flexjag[pictures]'
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # it is there, but lacks something itself
            package = module.partition(".")[0]
            raise MissingExtraError(f"{package} is not installed: pip install 'flexjag[{extra}]'") from None
