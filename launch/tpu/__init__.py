"""The launcher behind launch/tpu_vm.sh: from a laptop to a finished run on a TPU slice.

It needs only the standard library of Python 3.10. All state is in the cloud's labels, in the
workers' files and in runs/tpu/RUN, so rerunning the same command resumes the run.
"""
