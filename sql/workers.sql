-- What runs in the background, and the look at everything.

CREATE VIEW rakam.stat_worker AS
  SELECT pid, database, kind, target, state, since, restarts, last_error FROM rakam_internal.workers();
GRANT SELECT ON rakam.stat_worker TO PUBLIC;
COMMENT ON VIEW rakam.stat_worker IS 'Background workers, and databases that wait for one';

-- Last of all: a resident worker starts now and waits for this transaction's commit.
SELECT rakam_internal.installed();
