-- Schemas and the server-wide role. `rakam` is what users call and read; `rakam_internal` is ours.
DO $$
BEGIN
  IF pg_catalog.current_setting('server_encoding') <> 'UTF8' THEN
    RAISE EXCEPTION 'rakam needs a database with server encoding UTF8, this one has %', pg_catalog.current_setting('server_encoding')
      USING ERRCODE = 'feature_not_supported', HINT = 'Create the database with ENCODING ''UTF8'' TEMPLATE template0.';
  END IF;
  -- Roles belong to the cluster: another database's installation may have made it already.
  IF NOT EXISTS (SELECT 1 FROM pg_catalog.pg_roles WHERE rolname = 'rakam_admin') THEN
    CREATE ROLE rakam_admin NOLOGIN;
  END IF;
END $$;

CREATE SCHEMA rakam_internal;
GRANT USAGE ON SCHEMA rakam TO PUBLIC;
-- Needed so that foreign tables can read the shared tables as the effective user; rows are guarded by
-- row-level security (access.sql), and nothing but SELECT is ever granted there.
GRANT USAGE ON SCHEMA rakam_internal TO PUBLIC;
