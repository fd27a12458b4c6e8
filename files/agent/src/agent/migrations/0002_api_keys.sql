-- Only digests are kept: whoever reads this table cannot use a key. A revoked key stays as a record, and its name is free again.
CREATE TABLE api_keys (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL CHECK (name ~ '^[a-z0-9][a-z0-9-]{0,31}$'),
    hash bytea NOT NULL UNIQUE CHECK (length(hash) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz,
    last_used timestamptz,
    -- Limits of this key alone. NULL is the service's own setting, 0 no limit.
    requests_per_minute integer CHECK (requests_per_minute BETWEEN 0 AND 100000),
    tokens_per_minute integer CHECK (tokens_per_minute BETWEEN 0 AND 100000000),
    concurrent_runs integer CHECK (concurrent_runs BETWEEN 0 AND 10000)
);
CREATE UNIQUE INDEX api_keys_active ON api_keys (name) WHERE revoked_at IS NULL;
