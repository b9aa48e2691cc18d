# HistoStream for NVIDIA GPUs. The host needs NVIDIA's driver and container toolkit. From the root of the project:
#   docker build --file docker/cuda.Dockerfile --tag histostream:cuda .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD:/data" histostream:cuda slide.svs --out results
# More extras of pyproject.toml: --build-arg EXTRAS=cuda,crf,cloud
#
# The base is plain Python, not nvidia/cuda: the extra brings the CUDA and cuDNN libraries that ONNX Runtime
# loads, at the versions that constraints.txt pins. A CUDA base would hold a second, unused copy of them.

FROM python:3.12-slim-bookworm AS build
ARG EXTRAS=cuda
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY benchmarks benchmarks
COPY export export
COPY runtime runtime
COPY training training
COPY wsi wsi
# Older pip reads the first variable for the build's own packages too, newer pip the second.
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_BUILD_CONSTRAINT=/src/constraints.txt
RUN python -m venv /opt/histostream \
    && /opt/histostream/bin/python -m pip install --no-cache-dir ".[${EXTRAS}]"

FROM python:3.12-slim-bookworm
COPY --from=build /opt/histostream /opt/histostream
# Any user may run it (--user), so the caches are where everyone may write. The last two tell NVIDIA's container
# toolkit which parts of the driver to pass in; a CUDA base would set them.
ENV PATH=/opt/histostream/bin:$PATH XDG_CACHE_HOME=/tmp/cache NUMBA_CACHE_DIR=/tmp/cache/numba \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65534:65534
WORKDIR /data
ENTRYPOINT ["histo-infer"]
