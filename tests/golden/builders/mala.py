"""MALA's layer on a map, which has the keys of RALA's."""

from golden.builders.rala import rala_op

BUILDERS = {"mala_op": rala_op}
