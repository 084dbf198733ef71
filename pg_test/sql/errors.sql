-- Every documented error of this version: SQLSTATE, message, hint.
\set VERBOSITY default
\set ON_ERROR_STOP 0
SELECT project FROM rakam.create_project('errors');
SELECT rakam.create_collection('errors', 'known');

-- ======== names ========
SELECT rakam.create_project('1st');                                          -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.create_project('rakam_x');                                      -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.create_project('errors');                                       -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.create_collection('errors', '');                                -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.create_collection('errors', 'users');                           -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.create_collection('errors', NULL);                              -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.create_collection('nowhere', 'c');                              -- should fail
\echo :LAST_ERROR_SQLSTATE

-- ======== fields ========
SELECT rakam.add_field('errors', 'known', 'n', 'numeric');                   -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.add_field('errors', 'known', 'n', 'money');                     -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.add_field('errors', 'unknown', 'n', 'text');                    -- should fail
\echo :LAST_ERROR_SQLSTATE

-- ======== events ========
SELECT rakam.collect('errors', 'known', NULL);                               -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.collect('errors', 'known', '[1]');                              -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.collect('errors', 'known', '{"_received_at": 1}');              -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.collect('errors', '_all', '{}');                                -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.collect_batch('errors', '[{"collection": "known"');             -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.collect_batch('errors', '{}'::text);                            -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.collect_batch('errors', '[]'::text, '{"checksum": "0"}');       -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.collect_batch('errors', '[]'::text, '{"colour": "red"}');       -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.collect_batch('errors', '[{"collection": "known", "properties": {"a": "\u0000"}}, {"collection": "known", "properties": {}}, {}]'::text);

-- ======== keys ========
SELECT rakam.collect_with_key('rk_w_unknown', 'known', '{}');                -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.authenticate('rk_r_unknown');                                   -- should fail
\echo :LAST_ERROR_SQLSTATE

-- ======== changing events ========
UPDATE errors.known SET _user = 'x';                                         -- should fail
\echo :LAST_ERROR_SQLSTATE
DELETE FROM errors.known;                                                    -- should fail
\echo :LAST_ERROR_SQLSTATE
TRUNCATE errors.known;                                                       -- should fail
\echo :LAST_ERROR_SQLSTATE

-- ======== storages ========
CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'hdfs://namenode/lake');   -- should fail
\echo :LAST_ERROR_SQLSTATE
CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (urls 'file:///tmp/lake');      -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT project FROM rakam.create_project('elsewhere', 'nowhere');            -- should fail
\echo :LAST_ERROR_SQLSTATE

-- ======== dropping ========
SELECT rakam.drop_project('errors');                                         -- should fail
\echo :LAST_ERROR_SQLSTATE
SELECT rakam.drop_project('nowhere');                                        -- should fail
\echo :LAST_ERROR_SQLSTATE

SET client_min_messages = warning;

SET rakam.allow_project_drop = on;
SELECT rakam.drop_project('errors');
