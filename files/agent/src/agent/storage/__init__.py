"""The clients of the stores: Postgres and Redis."""
