"""The version of Longspan, which the members of a cluster must share."""

__version__ = "0.1.0"
