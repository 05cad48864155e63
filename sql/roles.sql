-- The two logins of pgrealtime: one reads the replication stream, one is asked about rules.
-- Run it in the database that is to be served, as a superuser or whatever your service gives you
-- in place of one. Safe to run again.
--
--   psql -d app -f sql/roles.sql
--
-- Other names than these, also for sql/tables.sql:
--   PGOPTIONS='-c pgrealtime.stream_role=pgrealtime -c pgrealtime.query_role=pgrealtime_query'
--
-- Then give both a password. psql's \password keeps it out of logs and histories:
--   \password pgrealtime
--   \password pgrealtime_query
--
-- Rules must see every row. If row security hides some of a served table, run as a superuser:
--   ALTER ROLE pgrealtime_query BYPASSRLS;
-- or, where nobody may, as the owner of each such table:
--   CREATE POLICY pgrealtime ON tasks FOR SELECT TO pgrealtime_query USING (true);
--
-- Who has REPLICATION reads every change of every table, whatever its grants and policies: keep
-- that login as you keep a superuser's.
DO $$
DECLARE
  stream_role text :=
    coalesce(nullif(current_setting('pgrealtime.stream_role', true), ''), 'pgrealtime');
  query_role text :=
    coalesce(nullif(current_setting('pgrealtime.query_role', true), ''), 'pgrealtime_query');
  role text;
BEGIN
  FOREACH role IN ARRAY ARRAY[stream_role, query_role] LOOP
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = role) THEN
      EXECUTE format('CREATE ROLE %I LOGIN', role);
    END IF;
    EXECUTE format('ALTER ROLE %I LOGIN', role);
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), role);
  END LOOP;

  EXECUTE format('ALTER ROLE %I REPLICATION', stream_role);
  -- A belt only, since SQL can switch it off: what the role may write is decided by grants.
  EXECUTE format('ALTER ROLE %I SET default_transaction_read_only = on', query_role);

  IF EXISTS (SELECT FROM pg_catalog.pg_roles
             WHERE rolname = query_role AND (rolsuper OR rolreplication OR rolcreaterole)) THEN
    RAISE WARNING 'role "%" may do more than it needs', query_role
      USING HINT = 'It needs to log in and to read the served tables, and nothing else.';
  END IF;
END $$;
