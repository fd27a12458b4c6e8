"""The ledger's longer statements. Each is one transaction and one round trip, and may be sent again."""

from typing import LiteralString

# What the workers tell each other, and those who wait for a run.
CHANNEL = "agent_runs"

INSERT: LiteralString = """
WITH found AS (SELECT owner FROM threads WHERE thread_id = %(thread)s),
made AS (
    INSERT INTO threads (thread_id, owner, metadata, bytes)
    SELECT %(thread)s, %(owner)s, %(metadata)s::jsonb, %(bytes)s WHERE %(create)s AND NOT EXISTS (SELECT FROM found)
    ON CONFLICT DO NOTHING RETURNING owner
),
thread AS (SELECT owner FROM found UNION ALL SELECT owner FROM made),
busy AS (
    SELECT EXISTS (SELECT FROM runs WHERE thread_id = %(thread)s AND status = 'running')
        OR EXISTS (SELECT FROM runs WHERE thread_id = %(thread)s AND status = 'pending') AS busy
)
INSERT INTO runs (run_id, thread_id, owner, turn_id, status, worker, watched, input, options)
SELECT %(run)s, %(thread)s, %(owner)s, %(turn)s, CASE WHEN busy THEN 'pending' ELSE 'running' END,
    CASE WHEN NOT busy THEN %(worker)s::uuid END, busy, %(input)s, %(options)s
FROM thread, busy WHERE thread.owner = %(owner)s AND NOT (busy AND %(reject)s)
ON CONFLICT DO NOTHING
RETURNING status, created_at, EXISTS (SELECT FROM made) AS first
"""

# The run waits, so that any worker takes it, also where this one dies now.
FIRE: LiteralString = """
WITH due AS (
    UPDATE crons SET next_at = %(following)s, taken_until = NULL, last_run = %(run)s WHERE cron_id = %(cron)s AND next_at = %(due)s
    RETURNING cron_id
),
made AS (
    INSERT INTO threads (thread_id, owner, metadata, bytes) SELECT %(thread)s, %(owner)s, '{}', %(bytes)s FROM due WHERE %(create)s
),
busy AS (SELECT EXISTS (SELECT FROM runs WHERE thread_id = %(thread)s AND status IN ('pending', 'running')) AS busy)
INSERT INTO runs (run_id, thread_id, owner, status, input, options)
SELECT %(run)s, %(thread)s, %(owner)s, 'pending', %(input)s, %(options)s FROM due, busy WHERE NOT (busy AND %(reject)s)
RETURNING created_at
"""

# Checkpoints, blobs and writes, as the saver itself would store them, all of them if the run is this worker's.
STORE: LiteralString = """
c AS (
    INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
    SELECT mine.thread_id, ns, id, parent, checkpoint, metadata
    FROM mine, unnest(%s::text[], %s::text[], %s::text[], %s::jsonb[], %s::jsonb[])
        AS rows (ns, id, parent, checkpoint, metadata)
    ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id)
    DO UPDATE SET checkpoint = EXCLUDED.checkpoint, metadata = EXCLUDED.metadata
),
b AS (
    INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    SELECT mine.thread_id, rows.* FROM mine, unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::bytea[])
        AS rows (ns, channel, version, type, blob)
    ON CONFLICT DO NOTHING
),
w AS (
    INSERT INTO checkpoint_writes
        (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, blob)
    SELECT mine.thread_id, rows.*
    FROM mine,
        unnest(%s::text[], %s::text[], %s::text[], %s::int[], %s::text[], %s::text[], %s::text[], %s::bytea[])
        AS rows (ns, checkpoint_id, task_id, idx, task_path, channel, type, blob)
    ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx)
    DO UPDATE SET channel = EXCLUDED.channel, type = EXCLUDED.type, blob = EXCLUDED.blob
)
"""

SAVE: LiteralString = f"""
WITH mine AS (
    UPDATE runs SET updated_at = now() WHERE run_id = %s AND worker = %s AND attempt = %s AND status = 'running'
    RETURNING thread_id
),
{STORE}
SELECT EXISTS (SELECT FROM mine) AS mine
"""

STORE_ONE: LiteralString = """
c AS (
    INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
    SELECT mine.thread_id, %s, %s, %s, %s::jsonb, %s::jsonb FROM mine
    ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id)
    DO UPDATE SET checkpoint = EXCLUDED.checkpoint, metadata = EXCLUDED.metadata
),
b AS (
    INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    SELECT mine.thread_id, %s, %s, %s, %s, %b::bytea FROM mine
    ON CONFLICT DO NOTHING
)
"""

END: LiteralString = """
WITH mine AS (
    UPDATE runs SET status = %s, result = %s, error = %s, updated_at = now()
    WHERE run_id = %s AND worker = %s AND attempt = %s AND status = 'running'
    RETURNING thread_id, run_id, watched
),"""

NOTIFY: LiteralString = f"""
t AS (
    UPDATE threads SET status = coalesce(%s, threads.status), updated_at = now(), last_active = now(), bytes = threads.bytes + %s
    FROM mine WHERE threads.thread_id = mine.thread_id
),
told AS (SELECT pg_notify('{CHANNEL}', 'done ' || run_id) FROM mine WHERE watched)
SELECT EXISTS (SELECT FROM mine) AS mine, now() AS now, (SELECT count(*) FROM told) AS told,
    EXISTS (SELECT FROM runs WHERE thread_id = %s AND status = 'pending') AS more
"""

FINISH: LiteralString = f"{END}{STORE},{NOTIFY}"
FINISH_ONE: LiteralString = f"{END}{STORE_ONE},{NOTIFY}"

# A blob goes with the last checkpoint that has its version of a channel.
ROLL_BACK: LiteralString = """
WITH mine AS (
    DELETE FROM runs WHERE run_id = %s AND worker = %s AND attempt = %s AND status = 'running'
    RETURNING thread_id, run_id::text
),
gone AS (
    DELETE FROM checkpoints c USING mine WHERE c.thread_id = mine.thread_id AND c.metadata->>'run_id' = mine.run_id
    RETURNING c.thread_id, c.checkpoint_ns, c.checkpoint_id, c.checkpoint
),
w AS (
    DELETE FROM checkpoint_writes w USING gone WHERE w.thread_id = gone.thread_id
    AND w.checkpoint_ns = gone.checkpoint_ns AND w.checkpoint_id = gone.checkpoint_id
),
b AS (
    DELETE FROM checkpoint_blobs b USING gone, jsonb_each_text(gone.checkpoint->'channel_versions') v
    WHERE b.thread_id = gone.thread_id AND b.checkpoint_ns = gone.checkpoint_ns
    AND b.channel = v.key AND b.version = v.value AND NOT EXISTS (
        SELECT FROM checkpoints c, mine WHERE c.thread_id = b.thread_id AND c.checkpoint_ns = b.checkpoint_ns
        AND c.metadata->>'run_id' IS DISTINCT FROM mine.run_id
        AND c.checkpoint->'channel_versions'->>b.channel = b.version
    )
)
SELECT EXISTS (SELECT FROM mine) AS mine
"""

CANCEL: LiteralString = f"""
WITH was AS (SELECT run_id, status FROM runs WHERE run_id = %(run)s FOR UPDATE),
now AS (
    UPDATE runs SET cancel = %(action)s, updated_at = now(),
        status = CASE WHEN was.status = 'pending' THEN 'interrupted' ELSE was.status END,
        error = CASE WHEN was.status = 'pending'
            THEN '{{"code": "cancelled", "message": "The answer was stopped.", "status": 409}}'::json END
    FROM was WHERE runs.run_id = was.run_id AND was.status IN ('pending', 'running')
    RETURNING was.status AS was, runs.owner, runs.run_id
)
SELECT was, owner, CASE WHEN was = 'pending' THEN pg_notify('{CHANNEL}', 'done ' || run_id)
    ELSE pg_notify('{CHANNEL}', 'cancel ' || run_id) END FROM now
"""
