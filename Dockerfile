# pgrealtime as one process: docker run -v ./pgrealtime.yaml:/etc/pgrealtime/pgrealtime.yaml:ro ...
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY .ci/constraints.txt constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY pgrealtime pgrealtime
COPY sql sql
COPY config/pgrealtime.yaml config/pgrealtime.yaml
# The environment goes to the next stage as it is, and without pip: nothing is installed there.
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && python -m venv --without-pip /opt/pgrealtime \
    && python -m pip --python /opt/pgrealtime/bin/python install --no-cache-dir \
       --constraint constraints.txt "$(echo /wheels/pgrealtime-*.whl)[nats]"

FROM python:${PYTHON}-slim
LABEL org.opencontainers.image.title="pgrealtime" \
      org.opencontainers.image.description="PocketBase's realtime API for the PostgreSQL database you already have." \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /opt/pgrealtime /opt/pgrealtime
# Bytecode was compiled above, so that a read-only root file system costs nothing.
# The driver's own OpenSSL looks for the system's roots where no Debian has them.
ENV PATH=/opt/pgrealtime/bin:$PATH \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /etc/pgrealtime
# A number, so that Kubernetes can tell that it isn't root (runAsNonRoot).
USER 65532:65532
EXPOSE 8090
# Asks the port of the configuration, which is /etc/pgrealtime/pgrealtime.yaml or PGREALTIME_CONFIG.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["pgrealtime", "live"]
# No shell in between: SIGTERM reaches the process, which drains its connections.
ENTRYPOINT ["pgrealtime"]
CMD ["run"]
