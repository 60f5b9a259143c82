"""How types and shapes in signatures are checked while the tests run."""

from beartype import BeartypeConf, beartype

# An int is a float, as for mypy (PEP 484).
typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
