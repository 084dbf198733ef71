-- Mappers: the functions that events go through where they enter.
--
-- A function is known by its oid: a later one of its name may be somebody else's, and would run as the role that set the mapper.
-- But oids of functions outlive neither a dump nor pg_upgrade, so the signature stands beside it and follows each renaming; that
-- of a function that was dropped finds nothing any more.

-- The function of a signature as regprocedure shows it. A row keeps what it found when it was written.
CREATE FUNCTION rakam_internal.function_named(signature text) RETURNS oid LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
RETURN pg_catalog.to_regprocedure(signature)::oid;

-- What runs where events enter. Collection '': every collection of the project. No dependency keeps function and owner:
-- the code looks at both each time, and without them events become dead letters.
CREATE TABLE rakam_internal.mapper (
  project_id   int NOT NULL REFERENCES rakam_internal.project ON DELETE CASCADE,
  collection   text COLLATE "C" NOT NULL,
  function     text COLLATE "C" NOT NULL,                -- its signature
  is_lost      boolean NOT NULL DEFAULT false,           -- it was dropped
  -- A dump does not have it. What pg_upgrade has copied is of another server than `installation` says.
  function_oid oid GENERATED ALWAYS AS (CASE WHEN NOT is_lost THEN rakam_internal.function_named(function) END) STORED,
  every_batch  boolean NOT NULL,
  owner        regrole NOT NULL,                         -- who set it: it runs as this role
  set_at       timestamptz NOT NULL DEFAULT pg_catalog.now(),
  PRIMARY KEY (project_id, collection)
);
SELECT pg_catalog.pg_extension_config_dump('rakam_internal.mapper', '');

-- After pg_upgrade functions have other oids: they are found by their signatures, once, before any of them changes.
CREATE FUNCTION rakam_internal.find_functions() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  here bigint;
BEGIN
  IF NOT EXISTS (SELECT FROM rakam_internal.mapper) THEN
    RETURN;
  END IF;
  -- Not by a function of the library: commands have to work where it is missing.
  SELECT c.system_identifier INTO here FROM pg_control_system() c;
  IF EXISTS (SELECT FROM rakam_internal.installation i WHERE i.system_identifier <> here) THEN
    UPDATE rakam_internal.mapper SET function = function;
    UPDATE rakam_internal.installation SET system_identifier = here;
  END IF;
END $$;

-- Has signatures be those that these functions (NULL: all) have now, of dropped ones none. Rows that somebody is changing are
-- left to the background: calls go by oid.
CREATE FUNCTION rakam_internal.follow_functions(changed oid[]) RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  m record;
BEGIN
  FOR m IN
    SELECT o.project_id, o.collection, p.oid::regprocedure::text AS signature
    FROM rakam_internal.mapper o LEFT JOIN pg_proc p ON p.oid = o.function_oid
    WHERE NOT o.is_lost AND o.function_oid IS NOT NULL AND (changed IS NULL OR o.function_oid = ANY (changed))
      AND p.oid::regprocedure::text IS DISTINCT FROM o.function
    FOR UPDATE OF o SKIP LOCKED
  LOOP
    UPDATE rakam_internal.mapper o SET function = coalesce(m.signature, o.function), is_lost = m.signature IS NULL
    WHERE o.project_id = m.project_id AND o.collection = m.collection;
  END LOOP;
END $$;

-- What the background does: functions that a dump brought after the mappers are found, too.
CREATE FUNCTION rakam_internal.keep_functions() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM rakam_internal.find_functions();
  UPDATE rakam_internal.mapper SET function = function
  WHERE function_oid IS NULL AND NOT is_lost AND rakam_internal.function_named(function) IS NOT NULL;
  PERFORM rakam_internal.follow_functions(NULL);
END $$;

CREATE FUNCTION rakam_internal.before_change() RETURNS event_trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM rakam_internal.find_functions();
END $$;
CREATE EVENT TRIGGER rakam_before_change ON ddl_command_start EXECUTE FUNCTION rakam_internal.before_change();

-- In the transaction that renames, moves or drops a function, so that no dump has an old name.
CREATE FUNCTION rakam_internal.function_changed() RETURNS event_trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  changed oid[];
BEGIN
  IF TG_EVENT = 'sql_drop' THEN
    SELECT array_agg(d.objid) INTO changed FROM pg_event_trigger_dropped_objects() d WHERE d.classid = 'pg_proc'::regclass;
  ELSIF TG_TAG IN ('ALTER FUNCTION', 'ALTER ROUTINE') THEN
    SELECT array_agg(c.objid) INTO changed FROM pg_event_trigger_ddl_commands() c WHERE c.classid = 'pg_proc'::regclass;
  ELSE
    PERFORM rakam_internal.follow_functions(NULL);
  END IF;
  IF changed IS NOT NULL THEN
    PERFORM rakam_internal.follow_functions(changed);
  END IF;
END $$;
CREATE EVENT TRIGGER rakam_function_renamed ON ddl_command_end
  WHEN TAG IN ('ALTER FUNCTION', 'ALTER ROUTINE', 'ALTER SCHEMA', 'ALTER EXTENSION')
  EXECUTE FUNCTION rakam_internal.function_changed();
-- Whatever command it was that took the function with it.
CREATE EVENT TRIGGER rakam_function_dropped ON sql_drop EXECUTE FUNCTION rakam_internal.function_changed();

REVOKE EXECUTE ON FUNCTION rakam_internal.function_named(text), rakam_internal.find_functions(),
  rakam_internal.follow_functions(oid[]), rakam_internal.keep_functions(), rakam_internal.before_change(),
  rakam_internal.function_changed() FROM PUBLIC;
