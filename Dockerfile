# The image: two stages, wheels only, checked by hash; no compiler and no driver library inside.
#
# BASE is any glibc image with libstdc++, Python 3.11 or newer and its venv module. Both stages use it, so that the
# interpreter behind the installed environment is the same. Pin it by digest for a release.
#
#   docker build --build-arg VERSION=0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" -t REGISTRY/migplugin:0.1.0 .
ARG BASE=docker.io/library/python:3.13-slim-bookworm

FROM ${BASE} AS build
# For a build without a network: PIP_NO_INDEX=1, and PIP_FIND_LINKS a mounted directory of wheels.
ARG PIP_NO_INDEX=
ARG PIP_FIND_LINKS=
ARG PIP_OPTIONS="--disable-pip-version-check --no-cache-dir --require-hashes --only-binary=:all:"
WORKDIR /src
RUN python3 -m venv /tools && python3 -m venv --without-pip /opt/migplugin
COPY requirements.lock requirements-dev.lock ./
# hatchling makes our wheel; it and what it needs are taken from the lock of the development tools.
RUN sed -n '/^\(hatchling\|packaging\|pathspec\|pluggy\|tomlkit\|trove-classifiers\)==/,/[^\\]$/p' \
        requirements-dev.lock > /tools/build.lock \
    && /tools/bin/pip install ${PIP_OPTIONS} -r /tools/build.lock \
    && /tools/bin/pip --python /opt/migplugin/bin/python install ${PIP_OPTIONS} --no-compile -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY migplugin migplugin
# Bytecode that is never checked against its source: nothing here is ever edited, or even writable.
RUN /tools/bin/pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir /tools/wheel . \
    && /tools/bin/pip --python /opt/migplugin/bin/python install --disable-pip-version-check --no-index \
        --no-deps --no-compile /tools/wheel/*.whl \
    && find /opt/migplugin -name '*.pyi' -delete \
    && /opt/migplugin/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/migplugin/lib

FROM ${BASE}
ARG BASE
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=
ARG SOURCE=
LABEL org.opencontainers.image.title="migplugin" \
      org.opencontainers.image.description="NVIDIA MIG on Kubernetes as a live resource" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.url="${SOURCE}" \
      org.opencontainers.image.documentation="${SOURCE}" \
      org.opencontainers.image.vendor="migplugin maintainers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}" \
      io.k8s.display-name="migplugin" \
      name="migplugin" \
      vendor="migplugin maintainers" \
      version="${VERSION}" \
      release="${REVISION}" \
      summary="NVIDIA MIG on Kubernetes as a live resource"
COPY --from=build /opt/migplugin /opt/migplugin
COPY LICENSE /licenses/LICENSE
# As NVIDIA's image has it: what their container runtime is to bring, if it runs us.
ENV PATH=/opt/migplugin/bin:${PATH} \
    NVIDIA_DISABLE_REQUIRE=true \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Some bases ship the standard library without bytecode, and a read-only root could never get it: a run
# of what the agent imports leaves it behind. It is the first test of the image, too.
RUN python3 -c 'import grpc.aio, migplugin.app, migplugin.kubelet.manager, migplugin.telemetry.log, watchdog.observers' \
    && migplugin status --simulate=1xa30=1g.6gb > /dev/null
ENV PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["migplugin"]
CMD ["serve"]
