"""The runtime type checker of the tests: beartype, with int accepted for float as PEP 484 has it."""

import os

from beartype import BeartypeConf, beartype

# Test processes share the cores: threads that spin while they wait take them from others. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
