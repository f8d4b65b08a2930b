"""Devices and processes: the mesh, the sharding rules, hosts that act as one, and preemption."""
