"""Measurements on this machine: `cost` of a look (`relook bench`), and a server under `load` (`relook bench load`)."""
