-- The two logins of pgrealtime: one reads the replication stream, one evaluates rules.
-- Run it in the database to be served, as a superuser or the substitute for one that your
-- provider has. Safe to run again.
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
-- or, without a superuser, as the owner of each such table:
--   CREATE POLICY pgrealtime ON tasks FOR SELECT TO pgrealtime_query USING (true);
--
-- A role with REPLICATION reads every change of every table, whatever the grants and policies:
-- protect that login like a superuser's.
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
  -- A precaution only, since SQL can switch it off: grants decide what the role may write.
  EXECUTE format('ALTER ROLE %I SET default_transaction_read_only = on', query_role);

  IF EXISTS (SELECT FROM pg_catalog.pg_roles
             WHERE rolname = query_role AND (rolsuper OR rolreplication OR rolcreaterole)) THEN
    RAISE WARNING 'role "%" may do more than it needs', query_role
      USING HINT = 'It needs to log in and to read the served tables, and nothing else.';
  END IF;
END $$;
