-- What a thread takes: its row, its runs, and all that LangGraph's saver keeps of it. NULL is not measured yet, as of the threads that were there before
-- this column, and of those that a worker of the version before makes: the retention job measures them.
ALTER TABLE threads ADD COLUMN bytes bigint;
CREATE INDEX threads_unmeasured ON threads (thread_id) WHERE bytes IS NULL;
