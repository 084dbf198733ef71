-- Last: who may call what of ours, and what it is for.

-- Called by triggers only, which need no right to it.
REVOKE EXECUTE ON FUNCTION rakam_internal.announce_change() FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION rakam_internal.set_apart() FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION rakam_internal.follow_roles() FROM PUBLIC;
-- Who could put it on a table would write into the project that the trigger names.
REVOKE EXECUTE ON FUNCTION rakam_internal.track_change() FROM PUBLIC;

-- Called by CREATE EXTENSION: it starts a worker.
REVOKE EXECUTE ON FUNCTION rakam_internal.installed() FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION rakam_internal.note_project(), rakam_internal.note_definition(), rakam_internal.note_file(),
  rakam_internal.note_deletion(), rakam_internal.note_intent() FROM PUBLIC;

COMMENT ON SCHEMA rakam_internal IS 'Tables of rakam, guarded by row-level security: use the functions and views of schema rakam';
COMMENT ON FUNCTION rakam_internal.readable_projects() IS 'Projects whose data the current role may read; row-level policies call it';
COMMENT ON FUNCTION rakam_internal.member_projects() IS 'Projects of which the current role is a member; row-level policies call it';
COMMENT ON FUNCTION rakam.create_project(text, text) IS 'Creates a project: schema, roles, users table, one key set, shown this once';
COMMENT ON FUNCTION rakam.drop_project(text) IS 'Drops a project with all its events (needs rakam.allow_project_drop)';
COMMENT ON FUNCTION rakam.repair_roles() IS 'Makes the roles of projects that are missing, as after a restore without pg_dumpall -g, with their privileges';
COMMENT ON FUNCTION rakam.create_keys(text) IS 'Makes another key set of a project, shown this once';
COMMENT ON FUNCTION rakam.revoke_keys(text, uuid) IS 'Revokes a key set at once, for every session';
COMMENT ON FUNCTION rakam.authenticate(text, boolean) IS 'Becomes the role that a key stands for, to the end of the transaction or (local => false) of the session';
COMMENT ON FUNCTION rakam.collect(text, text, jsonb) IS 'Stores one event';
COMMENT ON FUNCTION rakam.collect_batch(text, text, jsonb) IS 'Stores a JSON array of events; bad ones are rejected alone';
COMMENT ON FUNCTION rakam.collect_batch(text, jsonb, jsonb) IS 'Stores a JSON array of events; bad ones are rejected alone';
COMMENT ON FUNCTION rakam.collect_with_key(text, text, jsonb) IS 'Stores one event in the project of a write or master key';
COMMENT ON FUNCTION rakam.collect_batch_with_key(text, text, jsonb) IS 'Stores a JSON array of events in the project of a write or master key';
COMMENT ON FUNCTION rakam.set_quota(text, bigint, bigint, int, int) IS 'Limits what a project may send and have; NULL is no limit';
COMMENT ON FUNCTION rakam.set_schema_mode(text, text) IS 'open: new fields and collections are taken as they come; fixed: not from the write role';
COMMENT ON FUNCTION rakam.set_time_bounds(text, interval, interval) IS 'How far back and ahead of its receipt an event''s _time may be';
COMMENT ON FUNCTION rakam.field_values(text, text, text, text, int) IS 'The most frequent values of a field';
COMMENT ON FUNCTION rakam.compact(text, text) IS 'Merges small data files and removes what is kept no longer (NULL: of all that one may); gives what it merged';
COMMENT ON FUNCTION rakam.set_retention(text, text, interval) IS 'Keeps events of a collection for so long after their _time; NULL: for ever';
COMMENT ON FUNCTION rakam.drop_collection(text, text) IS 'Drops a collection with all its events';
COMMENT ON FUNCTION rakam.rename_collection(text, text, text) IS 'Gives a collection another name';
COMMENT ON FUNCTION rakam.drop_field(text, text, text) IS 'Drops a field: its values are not read any more';
COMMENT ON FUNCTION rakam.rebuild_catalog(text) IS 'Makes projects, collections and files of an empty database anew from what lies in a storage';
COMMENT ON FUNCTION rakam.set_event_store(text, text, jsonb) IS 'Sends what is collected in a project to Kafka or Kinesis; with NULL as server it stays in Postgres';
COMMENT ON FUNCTION rakam.set_mapper(text, text, regprocedure, boolean) IS 'Sets the function that events of a collection (NULL: of all) go through before they are stored; NULL removes it';
COMMENT ON FUNCTION rakam.register_avro_schema(text, text, int, text) IS 'Says what schema a source''s records with this id were written with';
COMMENT ON FUNCTION rakam.replay_dead_letters(text, text) IS 'Tries dead letters again; returns how many are dead letters no more';
COMMENT ON FUNCTION rakam.attach(text, text, text, text) IS 'Makes a read-only table of the files below a URL, whoever writes them';
COMMENT ON FUNCTION rakam.detach(text, text) IS 'Takes an attached table away; its files stay';
COMMENT ON FUNCTION rakam.check_storage(text) IS 'Compares a storage with the manifest: missing and corrupt files, orphans, which are queued for deletion';
COMMENT ON FUNCTION rakam.adopt_storage(text) IS 'Makes a storage this database''s, after a restore or promotion: deletions in it go on here and nowhere else';
COMMENT ON FUNCTION rakam.track_table(text, text, regclass) IS 'Makes each change of a table an event, in the same transaction';
COMMENT ON FUNCTION rakam.untrack_table(text, regclass) IS 'Ends what track_table began';
COMMENT ON FUNCTION rakam.map_user_agent(jsonb) IS 'Mapper: browser, browser_version, os, device by _user_agent';
COMMENT ON FUNCTION rakam.map_referrer(jsonb) IS 'Mapper: referrer_host, referrer_medium, referrer_term by _referrer';
COMMENT ON FUNCTION rakam.map_geoip(jsonb) IS 'Mapper: country, region, city by _ip, from rakam.geoip_database';
COMMENT ON FUNCTION rakam.map_session(jsonb[]) IS 'Mapper of batches: _session_id where it is missing';
COMMENT ON FUNCTION rakam.tick() IS 'One round of all background work, now';
COMMENT ON FUNCTION rakam.flush(text, text) IS 'Writes everything committed so far to data files (NULL: of all that one may); gives what it wrote';
COMMENT ON FUNCTION rakam.create_collection(text, text) IS 'Makes the table of a collection ahead of its first event';
COMMENT ON FUNCTION rakam.add_field(text, text, text, text) IS 'Declares a field and its type ahead of its first value';
COMMENT ON FUNCTION rakam.delete_events(text, text, text) IS 'Deletes the events for which a condition is true, in every tier; returns how many';
COMMENT ON FUNCTION rakam.copy_from(text, text, text, text, jsonb) IS 'Loads files into a collection; returns the events stored';
COMMENT ON FUNCTION rakam.copy_to(text, text, text, text) IS 'Writes the result of a query to a file; returns the rows';
COMMENT ON FUNCTION rakam.create_source(text, text, text, jsonb) IS 'Begins to read topics, a stream or files into a project, each record once';
COMMENT ON FUNCTION rakam.pause_source(text, text) IS 'Lets a source wait';
COMMENT ON FUNCTION rakam.resume_source(text, text) IS 'Lets a paused source go on';
COMMENT ON FUNCTION rakam.drop_source(text, text) IS 'Reads a source no more; its events stay';
COMMENT ON FUNCTION rakam.seek_source(text, text, text, boolean) IS 'Lets a source go on elsewhere: earliest, latest, a timestamp, or offsets of splits';
COMMENT ON FUNCTION rakam.health() IS 'One look at everything: what is well, what is not, and what to do about it';
