-- Schedules of runs, each of one owner. next_at is NULL where none is to come: it is disabled, or has ended.
CREATE TABLE crons (
    cron_id uuid PRIMARY KEY,
    owner text NOT NULL,
    -- NULL makes a thread for each run.
    thread_id text REFERENCES threads ON DELETE CASCADE,
    -- NULL is the agent as it was deployed.
    assistant_id uuid REFERENCES assistants ON DELETE CASCADE,
    schedule text NOT NULL,
    timezone text,
    end_time timestamptz,
    enabled boolean NOT NULL,
    on_run_completed text CHECK (on_run_completed IN ('delete', 'keep')),
    -- What each run is given, as its client wrote it.
    payload jsonb NOT NULL,
    metadata jsonb NOT NULL,
    next_at timestamptz,
    -- Until then one worker sees to it, or it waits for its owner's limits.
    taken_until timestamptz,
    last_run uuid,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX crons_owner ON crons (owner);
CREATE INDEX crons_thread ON crons (thread_id) WHERE thread_id IS NOT NULL;
CREATE INDEX crons_assistant ON crons (assistant_id) WHERE assistant_id IS NOT NULL;
CREATE INDEX crons_due ON crons (next_at) WHERE next_at IS NOT NULL;
