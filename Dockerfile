# An image of vit_scale and its pinned dependencies.
#
#   docker build -t IMAGE .                               for TPUs
#   docker build -t IMAGE --build-arg ACCELERATOR=gpu .   for GPUs, or cpu
#   docker build -t IMAGE --target dependencies .         without the code, for launch/gke.py --base-image
#
# pip installs pinned versions; the base image, python:PYTHON-slim, moves, unless PYTHON names a whole version.
# It contains this folder's files as they are, without those of .dockerignore. The TPU image runs as
# root: the device plugin leaves /dev/vfio and /dev/accel* to root, and locking memory needs a privilege.
ARG PYTHON=3.12
ARG ACCELERATOR=tpu

FROM python:${PYTHON}-slim AS dependencies
ARG ACCELERATOR
ENV PATH=/app/.venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /app
# Nothing else, so that an edit of the code does not install the dependencies again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY launch/environment.sh launch/
RUN launch/environment.sh ${ACCELERATOR#cpu}

FROM dependencies AS tpu
COPY . .

FROM tpu AS gpu
RUN useradd --create-home vit && install -d -o vit runs .data .cache
USER vit

FROM gpu AS cpu

FROM ${ACCELERATOR}
CMD ["vit-scale", "--help"]
