# HistoStream as a task of the Digital Slide Archive. After docker/cpu.Dockerfile or docker/cuda.Dockerfile:
#   docker build --file docker/dsa.Dockerfile --tag histostream:dsa docker
#   docker build --file docker/dsa.Dockerfile --tag histostream:dsa --build-arg BASE=histostream:cuda docker
# Then in the archive: Admin console > Plugins > Slicer CLI Web, or its Analyses menu, the image histostream:dsa.

ARG BASE=histostream:cpu
FROM ${BASE}
# The archive's worker mounts a folder of its own user for the results.
USER root
WORKDIR /
ENTRYPOINT ["histo-infer", "dsa"]
