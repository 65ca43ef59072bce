# Built in one stage, run in another that has no compiler. Behind a proxy that ends TLS: nothing else is needed.
#   docker build -t fastsig . && docker run --rm -p 8080:8080 fastsig
# Options come from the environment (-e FASTSIG_LIMITS_MESSAGE_BYTES=…) or from a command of your own (fastsig serve …).

FROM python:3.13-slim-bookworm AS build
# hadolint ignore=DL3008 # Debian keeps no old versions to pin; the base image's tag says which Debian
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md CHANGELOG.md LICENSE ./
COPY fastsig/ fastsig/
RUN python -m venv /opt/fastsig \
    && /opt/fastsig/bin/pip install --no-cache-dir --disable-pip-version-check .

FROM python:3.13-slim-bookworm
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin fastsig
COPY --from=build /opt/fastsig /opt/fastsig
ENV PATH=/opt/fastsig/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["fastsig", "health"]
# The supervisor waits for its workers itself: no init is needed in front of it.
CMD ["fastsig", "serve", "--host", "0.0.0.0"]
