"""A run's folder: lock, description, watchdog, goodput, report, rollbacks, and verification."""
