-- How far `python -m agent.retention` got, and all that it ever deleted. One row.
CREATE TABLE retention (
    single boolean PRIMARY KEY DEFAULT true CHECK (single),
    -- Threads up to this one, in the order of their last activity, have had their history pruned to so many checkpoints.
    pruned_active timestamptz NOT NULL DEFAULT 'epoch',
    pruned_thread text NOT NULL DEFAULT '',
    pruned_to integer NOT NULL DEFAULT 0,
    finished_at timestamptz,
    seconds double precision,
    threads bigint NOT NULL DEFAULT 0,
    pruned_threads bigint NOT NULL DEFAULT 0,
    runs bigint NOT NULL DEFAULT 0,
    checkpoints bigint NOT NULL DEFAULT 0,
    writes bigint NOT NULL DEFAULT 0,
    blobs bigint NOT NULL DEFAULT 0
);
INSERT INTO retention DEFAULT VALUES;

-- The order in which threads are looked at. Many may have the same time: those from before times were kept have.
DROP INDEX threads_last_active;
CREATE INDEX threads_last_active ON threads (last_active, thread_id);
