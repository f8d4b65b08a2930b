"""Devices and processes: the mesh, the sharding rules, several hosts as one, and preemption.

Guaranteed: the layout of every array follows from its name and the mesh; hosts that disagree on
config, code or data are refused before training; an error on one host ends all of them with its
message; SIGTERM on any host stops all after the same step. With one process nothing here costs
time. Import its modules one by one: `preemption` is loaded before jax.
"""
