"""Papers, a file each: what they published of their models, in all hosts. Every module here registers itself."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
