"""The type checker that `conftest.py` puts behind every annotation of the library."""

from beartype import BeartypeConf, beartype

# An int is a float, as static checkers (PEP 484) have it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
