"""The launcher behind launch/tpu_vm.sh: from a laptop to a finished run on a TPU slice.

Standard library of Python 3.10 only: it runs on a machine where nothing is installed. What it knows
is in the cloud's labels, in the workers' files and in runs/tpu/RUN; so the same command, typed
again, takes a run up where it is.
"""
