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

-- Servers of sources: nothing is read through them, so there is no handler.
REVOKE ALL ON FUNCTION rakam_internal.source_validator(text[], oid) FROM PUBLIC;
CREATE FOREIGN DATA WRAPPER rakam_source VALIDATOR rakam_internal.source_validator;
GRANT USAGE ON FOREIGN DATA WRAPPER rakam_source TO rakam_admin;
