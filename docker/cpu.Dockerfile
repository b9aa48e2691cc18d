# HistoStream for CPUs. From the root of the project:
#   docker build --file docker/cpu.Dockerfile --tag histostream:cpu .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/data" histostream:cpu slide.svs --out results
# More extras of pyproject.toml: --build-arg EXTRAS=cpu,crf,cloud

FROM python:3.12-slim-bookworm AS build
ARG EXTRAS=cpu
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
# Any user may run it (--user), so the caches are where everyone may write.
ENV PATH=/opt/histostream/bin:$PATH XDG_CACHE_HOME=/tmp/cache NUMBA_CACHE_DIR=/tmp/cache/numba
USER 65534:65534
WORKDIR /data
ENTRYPOINT ["histo-infer"]
