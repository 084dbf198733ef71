# PostgreSQL 15 on Debian 12 with rakam installed and preloaded.
#   docker build -t rakam .
#   docker run -e POSTGRES_PASSWORD=secret -p 5432:5432 -v rakam-data:/var/lib/postgresql/data rakam
# Both stages are the same Debian: the library links against its libc and OpenSSL.

FROM postgres:15-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      ca-certificates curl gcc g++ libc6-dev make clang libclang-dev pkg-config libssl-dev zlib1g-dev \
      postgresql-server-dev-15 \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/root/.cargo/bin:$PATH RUSTFLAGS=
COPY rust-toolchain.toml /src/
RUN curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs \
    | sh -s -- -y --profile minimal --default-toolchain "$(sed -n 's/^channel = "\(.*\)"$/\1/p' /src/rust-toolchain.toml)"
RUN cargo install cargo-pgrx --version 0.18.1 --locked --debug \
 && cargo pgrx init --pg15 /usr/lib/postgresql/15/bin/pg_config
COPY . /src
WORKDIR /src
RUN cargo pgrx package --pg-config /usr/lib/postgresql/15/bin/pg_config --out-dir /package

FROM postgres:15-bookworm
COPY --from=build /package/ /
RUN echo "CREATE EXTENSION rakam;" > /docker-entrypoint-initdb.d/rakam.sql
CMD ["postgres", "-c", "shared_preload_libraries=rakam"]
