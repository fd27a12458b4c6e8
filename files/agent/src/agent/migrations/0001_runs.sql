-- Threads and whose they are. What is said in them is in the tables of the LangGraph saver, under the same id.
CREATE TABLE threads (
    thread_id text PRIMARY KEY,
    owner text NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{}',
    -- How the last run left it; a thread is busy while it has a run that is not final.
    status text NOT NULL DEFAULT 'idle' CHECK (status IN ('idle', 'interrupted', 'error')),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    last_active timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX threads_owner ON threads (owner, updated_at DESC);
CREATE INDEX threads_last_active ON threads (last_active);

-- Everything that was accepted. json and not jsonb: a model may say NUL, which jsonb cannot hold.
CREATE TABLE runs (
    run_id uuid PRIMARY KEY,
    thread_id text NOT NULL REFERENCES threads ON DELETE CASCADE,
    owner text NOT NULL,
    turn_id text,
    status text NOT NULL CHECK (status IN ('pending', 'running', 'success', 'error', 'timeout', 'interrupted')),
    worker uuid,
    -- Counts up whenever the run changes hands; first_attempt is where the present tries began.
    attempt integer NOT NULL DEFAULT 1,
    first_attempt integer NOT NULL DEFAULT 1,
    cancel text CHECK (cancel IN ('interrupt', 'rollback')),
    -- Somebody in another worker waits for its end and is to be told.
    watched boolean NOT NULL DEFAULT false,
    input json NOT NULL,
    options json NOT NULL,
    result json,
    error json,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
-- A retry with the same turn id finds the first one.
CREATE UNIQUE INDEX runs_turn ON runs (owner, turn_id) WHERE turn_id IS NOT NULL;
-- One runner a thread, whatever the workers believe.
CREATE UNIQUE INDEX runs_running ON runs (thread_id) WHERE status = 'running';
CREATE INDEX runs_pending ON runs (thread_id, created_at, run_id) WHERE status = 'pending';
CREATE INDEX runs_thread ON runs (thread_id, created_at DESC);

-- Processes that take runs. One that was not seen for some seconds is dead, and its runs are taken over.
CREATE TABLE workers (
    worker uuid PRIMARY KEY,
    seen timestamptz NOT NULL DEFAULT now()
);

-- Threads of the time before they had owners belong to nobody: nobody can show that one is theirs. An operator who
-- knows better changes the owner here.
DO $$
BEGIN
    IF to_regclass('checkpoints') IS NOT NULL THEN
        INSERT INTO threads (thread_id, owner) SELECT DISTINCT thread_id, '' FROM checkpoints;
    END IF;
END
$$;
