-- The foreign data wrapper and the one server that all collections use.

CREATE FUNCTION rakam_internal.fdw_handler() RETURNS fdw_handler
  LANGUAGE c STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'rakam_fdw_handler';
REVOKE ALL ON FUNCTION rakam_internal.fdw_handler() FROM PUBLIC;
REVOKE ALL ON FUNCTION rakam_internal.fdw_validator(text[], oid) FROM PUBLIC;

-- USAGE on the wrapper, by which servers (storages) are made, is granted to nobody but rakam_admin.
CREATE FOREIGN DATA WRAPPER rakam HANDLER rakam_internal.fdw_handler VALIDATOR rakam_internal.fdw_validator;
GRANT USAGE ON FOREIGN DATA WRAPPER rakam TO rakam_admin;

-- Whoever may use this server can make a foreign table of any name on it: what it reads is checked at each read.
CREATE SERVER rakam FOREIGN DATA WRAPPER rakam;
GRANT USAGE ON FOREIGN SERVER rakam TO PUBLIC;

-- Storages in use have places of their own, also after one of their servers was changed.
REVOKE ALL ON FUNCTION rakam_internal.ensure_server_apart(oid) FROM PUBLIC;
CREATE FUNCTION rakam_internal.server_changed() RETURNS event_trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  server oid;
BEGIN
  FOR server IN
    SELECT c.objid FROM pg_event_trigger_ddl_commands() c JOIN pg_foreign_server s ON s.oid = c.objid
    JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw AND w.fdwname = 'rakam'
    WHERE c.classid = 'pg_foreign_server'::regclass AND NOT c.in_extension LOOP
    PERFORM rakam_internal.ensure_server_apart(server);
  END LOOP;
END $$;
REVOKE ALL ON FUNCTION rakam_internal.server_changed() FROM PUBLIC;
CREATE EVENT TRIGGER rakam_server_changed ON ddl_command_end WHEN TAG IN ('CREATE SERVER', 'ALTER SERVER')
  EXECUTE FUNCTION rakam_internal.server_changed();

-- Servers of sources: nothing is read through them, so there is no handler.
REVOKE ALL ON FUNCTION rakam_internal.source_validator(text[], oid) FROM PUBLIC;
CREATE FOREIGN DATA WRAPPER rakam_source VALIDATOR rakam_internal.source_validator;
GRANT USAGE ON FOREIGN DATA WRAPPER rakam_source TO rakam_admin;
